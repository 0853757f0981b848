#!/usr/bin/env python3
"""Conversations and preferences -> flagged rows for --stage sft and --stage dpo.

    python3 data/chat.py chats.jsonl --stage sft --tokenizer model/ --seq-len 2048 --out data/chats
    python3 data/chat.py alpaca.json --stage sft --tokenizer tokenizer.model --template mistral --seq-len 512 --out data/a
    python3 data/chat.py pairs.parquet --stage dpo --tokenizer model/tokenizer.json --seq-len 2048 --out data/pairs
    python3 data/chat.py --inspect data/chats/train/train_000.ds
    python3 data/test_chat.py

Inputs are .jsonl, .ndjson or .json (a list, or one row per line), plain, .gz, .zst, .xz or .bz2, .parquet and .arrow
(also a folder that `datasets` saved). Rows are
    sft   messages or conversations (role/content or from/value), or the bare list of them
          prompt, completion (strings or messages) | instruction, input, output | text
          input_ids with labels (-100: not trained), completion_mask or assistant_masks
    dpo   chosen, rejected (strings or messages) with prompt, conversations or instruction; without: their common beginning
          prompt_ids, chosen_ids, rejected_ids
Outputs (byte tables in data/README.md): OUT/train/train_000.ds ..., OUT/validation/val_000.ds ..., each folder with
metadata.json, tokenizer.bin, the files of the tokenizer and chat_template.jinja; OUT/chat.json with the counts.

What holds, whatever the input:
    - A conversation is rendered by its Jinja template as transformers does, and tokenized once: the template owns BOS and
      the end marks. Strings get BOS as the tokenizer puts it, and EOS unless they end with it.
    - What is no target costs no loss: a document's first token, its prompt, padding. A document without a target is dropped.
    - Two passes: rows are tokenized to a file in OUT, their lengths packed best fit decreasing over the whole set, then
      written. In memory are some 200 bytes per document.
    - Every row that is dropped or changed is counted under its reason, with the place of the first.
    - The same inputs and options give the same bytes, for any --jobs. After a kill the same command starts again.
"""
import argparse, array, collections, hashlib, json, os, re, struct, sys, time

import tokens
from tokens import UserError, need

TARGET, START, ID = 1 << 31, 1 << 30, (1 << 24) - 1      # bits of a word; START alone is padding
ROW_MAX = 1 << 26               # the longest row of text, in bytes
FIELDS = ("messages conversations system tools prompt completion instruction input output history text chosen rejected "
          "chosen_messages rejected_messages chat_template_kwargs input_ids labels attention_mask completion_mask "
          "assistant_masks prompt_ids chosen_ids rejected_ids").split()
ROLES = {**{r: r for r in ("system", "developer", "user", "assistant", "tool", "function", "ipython")}, "human": "user",
         "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
         "function_call": "assistant", "observation": "tool", "function_response": "tool"}      # ShareGPT's names

# The published templates, with marks around what the assistant says (text and end mark).
TEMPLATES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
              "{% if message['role'] == 'assistant' %}"
              "{% generation %}{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}{% else %}"
              "{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "llama3": "{{ bos_token }}{% for message in messages %}"
              "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
              "{% if message['role'] == 'assistant' %}"
              "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}"
              "{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    "mistral": "{{ bos_token }}{% set ns = namespace(system='') %}{% set turns = messages %}"
               "{% if messages[0]['role'] == 'system' %}{% set ns.system = messages[0]['content'] + '\\n\\n' %}"
               "{% set turns = messages[1:] %}{% endif %}{% for message in turns %}"
               "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
               "{{ raise_exception('roles must alternate: user, assistant, user, assistant') }}{% endif %}"
               "{% if message['role'] == 'user' %}"
               "{{ '[INST] ' + (ns.system if loop.first else '') + message['content'] + ' [/INST]' }}"
               "{% elif message['role'] == 'assistant' %}"
               "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
               "{% else %}{{ raise_exception('only system, user and assistant roles') }}{% endif %}{% endfor %}",
    "zephyr": "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}{% if message['role'] == 'assistant' %}"
              "{% generation %}{{ message['content'] + eos_token + '\\n' }}{% endgeneration %}{% else %}"
              "{{ message['content'] + eos_token + '\\n' }}{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
    "alpaca": "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ 'Below is an instruction that describes a task. "
              "Write a response that appropriately completes the request.\\n\\n' }}{% endif %}{% for message in messages %}"
              "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}{% elif message['role'] == 'user' %}"
              "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}{% elif message['role'] == 'assistant' %}"
              "{{ '### Response:\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n\\n' }}"
              "{% else %}{{ raise_exception('only system, user and assistant roles') }}{% endif %}{% endfor %}"
              "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
}


class Drop(Exception):
    """A row that is left out: (reason, what to add to it)."""
    def __init__(self, reason, detail=""):
        super().__init__(reason, detail)


# ---- The tokenizer: text with special tokens in it -> ids and the characters of each -------------------------
OPEN, CLOSE = "\U000f0000", "\U000f0001"        # around text that spells a special token, but is none


class LibraryEncoder:
    """A tokenizer.json. What special_text marked is encoded as text, as transformers does (encode_marked_chat)."""
    def __init__(self, text, trim):
        spec = json.loads(text)
        if not trim:       # the post-processor only ever trims the spaces off offsets here
            spec["post_processor"] = None
        self.specials = [t["content"] for t in spec.get("added_tokens", []) if t["special"]]
        self.markers = marker_pattern(self.specials)
        self.spec, self.tokenizers = json.dumps(spec), {}
        self.newline = self.plain("\n", False)[0]

    def tokenizer(self, as_text):
        library = need("tokenizers")
        try:
            t = library.Tokenizer.from_str(self.spec)
        except Exception as e:       # the library raises bare Exceptions
            raise UserError(f"tokenizers {library.__version__} cannot read this tokenizer.json ({e}); "
                            "run: pip install -U tokenizers")
        t.no_padding()
        t.no_truncation()
        t.encode_special_tokens = as_text
        return t

    def plain(self, text, offsets, as_text=False):
        if as_text not in self.tokenizers:
            self.tokenizers[as_text] = self.tokenizer(as_text)
        e = self.tokenizers[as_text].encode(text, add_special_tokens=False)
        return e.ids, e.offsets if offsets else ()

    def encode(self, text, offsets=False, marked=False):
        if not marked:
            return self.plain(text, offsets)
        ids, spans, at = [], [], 0
        for m in [*self.markers.finditer(text), None]:
            end = m.start() if m else len(text)
            for start, piece, as_text in ((at, text[at:end], False), (end + 1, m and m[1], True)):
                if piece:
                    more, where = self.later(piece, offsets, as_text) if start else self.plain(piece, offsets)
                    ids += more
                    spans += [(a + start, b + start) for a, b in where]
            at = m.end() if m else end
        return ids, spans

    def later(self, piece, offsets, as_text):
        """After a newline, so that no space goes before a piece that begins no text."""
        ids, spans = self.plain("\n" + piece, offsets, as_text)
        n = len(self.newline)
        if ids[:n] == self.newline:
            return ids[n:], [(max(a - 1, 0), b - 1) for a, b in spans[n:]]
        return self.plain(piece, offsets, as_text)


class GreedyEncoder:
    """The longest piece at each place, else bytes: tokenizer.bin of kind 1."""
    def __init__(self, t):
        byte = re.compile(rb"<0x[0-9A-F]{2}>")
        special = {i for i, (p, s) in enumerate(zip(t.pieces, t.scores)) if i in (t.bos, t.eos) or
                   s == tokens.NEVER and not byte.fullmatch(p) and len(p) > 1}
        self.special = {t.pieces[i].decode(errors="replace"): i for i in sorted(special)}
        self.specials = list(self.special)
        self.markers, self.stops = marker_pattern(self.specials), special_pattern(self.specials)
        self.ids = {p: i for i, p in reversed(list(enumerate(t.pieces))) if i not in special and not byte.fullmatch(p) and p}
        for i, p in enumerate(t.pieces):
            if byte.fullmatch(p):
                self.ids.setdefault(bytes([int(p[3:5], 16)]), i)
        self.longest = [1] * 256         # of the pieces that begin with this byte
        for p in self.ids:
            self.longest[p[0]] = max(self.longest[p[0]], len(p))

    def encode(self, text, offsets=False, marked=False):
        ids, spans, at = [], [], 0
        stops = re.compile(f"{OPEN}(?:{self.stops.pattern}){CLOSE}|({self.stops.pattern})"
                           if marked else f"({self.stops.pattern})")
        for m in [*(m for m in stops.finditer(text) if m[1]), None]:
            end = m.start() if m else len(text)
            self.greedy(text[at:end], at, ids, spans, offsets, marked)
            if m:
                ids.append(self.special[m[1]])
                spans.append(m.span())
                at = m.end()
        return ids, spans

    def greedy(self, text, base, ids, spans, offsets, marked):
        where = range(base, base + len(text))        # the character of each byte
        if marked:
            kept = [i for i, c in enumerate(text) if c not in (OPEN, CLOSE)]
            text, where = "".join(text[i] for i in kept), [where[i] for i in kept]
        data = text.encode()
        if offsets and len(data) > len(text):
            where = [w for w, c in zip(where, text) for _ in range(len(c.encode()))]
        known, longest, at = self.ids, self.longest, 0
        while at < len(data):
            n = min(longest[data[at]], len(data) - at)
            while n and data[at:at + n] not in known:
                n -= 1
            if not n:
                raise Drop("text that the tokenizer cannot write", f"byte {data[at]}")
            ids.append(known[data[at:at + n]])
            if offsets:
                spans.append((where[at], where[at + n - 1] + 1))
            at += n


def special_pattern(specials):
    return re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or "(?!)")


def marker_pattern(specials):
    return re.compile(f"{OPEN}({special_pattern(specials).pattern}){CLOSE}|[{OPEN}{CLOSE}]")


def strings(value):
    if isinstance(value, str):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(child)


def mark(value, pattern):
    """Inside what a user wrote, "</s>" is text."""
    if isinstance(value, str):
        return pattern.sub(f"{OPEN}\\g<0>{CLOSE}", value.replace(OPEN, "").replace(CLOSE, ""))
    if isinstance(value, dict):
        return {k: mark(v, pattern) for k, v in value.items()}
    return [mark(v, pattern) for v in value] if isinstance(value, list) else value


def tokenizer_path(path):
    """A folder stands for the tokenizer in it."""
    if os.path.isdir(path):
        names = ("tokenizer.json", "tokenizer.model", "tokenizer.bin")
        found = next((os.path.join(path, n) for n in names if os.path.exists(os.path.join(path, n))), None)
        if not found:
            raise UserError(f"{path}: no {', '.join(names)} in this folder; name the tokenizer's file")
        return found
    return path


def from_tokenizer_bin(path, data):
    """The file that lies beside shards and in checkpoints (data/README.md), as tokens.py's loaders give a tokenizer."""
    magic, version, kind, size, bos, eos, prefix, rule = struct.unpack_from("<8i", data)
    at, pieces, scores = 32 + (4 + 4 * struct.unpack_from("<i", data, 32)[0] if version == 2 else 0), [], []
    for _ in range(size):
        score, n = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8:at + 8 + n])
        scores.append(score)
        at += 8 + n
    words = list(tokens.WORDS)[rule & 255]
    name = lambda i: pieces[i].decode() if i >= 0 else None
    never = lambda i: scores[i] <= tokens.NEVER and not re.fullmatch(rb"<0x[0-9A-F]{2}>", pieces[i]) and len(pieces[i]) > 1
    special = {name(i): i for i in range(size) if i in (bos, eos) or never(i)}

    def side_files():
        if kind == 1:
            config = {k: v for k, v in (("bos_token", name(bos)), ("eos_token", name(eos))) if v}
            return {"tokenizer_config.json": json.dumps(config).encode()}
        if words or prefix == 2:
            raise UserError(f"{path}: name the tokenizer file that this tokenizer.bin was made from")
        text = [p.decode().replace(" ", "\u2581") for p in pieces]
        parts = tokens.sentencepiece_parts(text, {t: -scores[i] for i, t in enumerate(text) if not never(i) and scores[i] >
                                                  tokens.NEVER}, prefix, "<unk>" if "<unk>" in text else None, True)
        return tokens.hugging_face(parts, special, name(bos), name(eos))
    return tokens.Tokenizer(name=path, kind=kind, pieces=pieces, scores=scores, bos=bos, eos=eos, add_bos=bos >= 0,
                            prefix_space=prefix, words=words, encoder=lambda: None, side_files=side_files, data=data)


class Setup(argparse.Namespace):
    """All that a worker needs: options, tokenizer.json or the pieces, template and its variables."""


def load(args):
    """-> (Setup for the workers, tokenizer, files to lie beside the shards)."""
    path = tokenizer_path(args.tokenizer)
    data = b""
    if path != "bytes":
        with open(path, "rb") as f:
            data = f.read()
    if data[:4] == struct.pack("<i", 20251002):
        try:
            t = from_tokenizer_bin(path, data)
        except (struct.error, IndexError, UnicodeDecodeError) as e:
            raise UserError(f"{path}: damaged tokenizer.bin ({e}); write it again")
    else:
        t = tokens.load_tokenizer(path, args.tiktoken_pattern)
    files, export = t.side_files(), data
    if not hasattr(t, "data"):
        export, _ = tokens.tokenizer_bin(t)
    if t.kind == 0 and "tokenizer.json" not in files:
        raise UserError(f"{path}: this SentencePiece model {t.unlike}; chat.py needs one that is BPE and takes text as it "
                        "is, tiktoken ranks, or a tokenizer.json")
    config = {k: v for n in ("special_tokens_map.json", "tokenizer_config.json")
              for k, v in json.loads(files.get(n, b"{}")).items()}
    text = lambda v: v.get("content") if isinstance(v, dict) else v
    variables = {k: text(v) for k, v in config.items() if k.endswith("_token") and isinstance(text(v), str)}
    template, name = find_template(args.template, os.path.dirname(os.path.abspath(path)) if data else None)
    if template is not None:
        files["chat_template.jinja"] = template.encode()
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        config.pop("chat_template", None)
        if config.get("split_special_tokens"):       # the template writes special tokens as text
            config["split_special_tokens"] = False
        if t.kind == 0 or "tokenizer.json" in files:
            files["tokenizer_config.json"] = json.dumps(config, indent=1, ensure_ascii=False).encode()
    if "tokenizer.json" not in files:
        files.pop("tokenizer_config.json", None)
    setup = Setup(**vars(args), kind=t.kind, pieces=t.pieces if t.kind else None, scores=t.scores if t.kind else None,
                  spec=None if t.kind else files["tokenizer.json"].decode(), bos=t.bos, eos=t.eos, add_bos=t.add_bos,
                  eos_text=t.pieces[t.eos].decode() if t.eos >= 0 else "", vocab=len(t.pieces), template_text=template,
                  template_name=name, variables=variables, now=time.time(),
                  tokenizer_sha256=hashlib.sha256(data or export).hexdigest(),
                  template_sha256=hashlib.sha256(template.encode()).hexdigest() if template is not None else None)
    if t.kind == 0 and setup.eos_text:        # tokenizer.bin holds U+2581 as a space
        setup.eos_text = next((a["content"] for a in json.loads(setup.spec)["added_tokens"] if a["id"] == t.eos),
                              setup.eos_text)
    if setup.vocab > ID + 1:
        raise UserError(f"{path}: {setup.vocab:,} pieces; flagged rows have 24 bits for an id")
    return setup, t, {"tokenizer.bin": export, **files}


def find_template(choice, folder):
    """-> (text, name) of --template, or of the tokenizer's own: chat_template.jinja, or in tokenizer_config.json."""
    if choice in TEMPLATES:
        return TEMPLATES[choice], choice
    if choice and not os.path.exists(choice):
        raise UserError(f"--template {choice}: neither a file nor one of {', '.join(TEMPLATES)}")
    names = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json") if folder else ()
    for path in [choice] if choice else [os.path.join(folder, n) for n in names]:
        if not os.path.exists(path):
            continue
        try:
            with open(path, encoding="utf-8") as f:
                text = f.read()
            if not choice and path.endswith(".json"):
                text = json.loads(text).get("chat_template")
            if isinstance(text, list):
                text = next((t["template"] for t in text if t.get("name") == "default"), None)
            if not isinstance(text, (str, type(None))):
                raise TypeError(f"it is {type(text).__name__}, not text")
        except (ValueError, AttributeError, KeyError, TypeError) as e:
            raise UserError(f"{path}: no readable chat template ({e}); mend the file, or choose a --template")
        if text:
            return text, os.path.basename(path)
    return None, None


# ---- The template, rendered as transformers does ------------------------------------------------------------
class Template:
    def __init__(self, text, variables, now):
        jinja2, ext, sandbox = need("jinja2"), need("jinja2.ext", "jinja2"), need("jinja2.sandbox", "jinja2")
        if tuple(int(n) for n in re.findall(r"\d+", jinja2.__version__)[:3]) < (3, 1, 6):
            raise UserError(f"jinja2 {jinja2.__version__} has known holes in its sandbox; run: pip install -U jinja2")

        class Generation(ext.Extension):
            """{% generation %} ... {% endgeneration %}: what the assistant says."""
            tags = {"generation"}

            def parse(self, parser):
                line = next(parser.stream).lineno
                body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
                return jinja2.nodes.CallBlock(self.call_method("support"), [], [], body).set_lineno(line)

            @jinja2.pass_eval_context
            def support(self, context, caller):
                text, start = caller(), sum(map(len, self.environment.blocks))
                self.environment.spans.append((start, start + len(text)))
                return text

        class Namespace(jinja2.utils.Namespace):
            """Without names that reach into Python."""
            def __init__(*args, **kw):
                for name in dict(*args[1:], **kw):
                    Namespace.check(name)
                jinja2.utils.Namespace.__init__(args[0], dict(*args[1:], **kw))

            def __setitem__(self, name, value):
                Namespace.check(name)
                jinja2.utils.Namespace.__setitem__(self, name, value)

            @staticmethod
            def check(name):
                if str(name).startswith("_"):
                    raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")

        class Dict:
            def __call__(self, *args, **kw):
                return dict(*args, **kw)

        def raise_exception(message):
            raise jinja2.exceptions.TemplateError(message)

        def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
            return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        env = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=[Generation, ext.loopcontrols])
        env.extend(blocks=[], spans=[])
        env.filters["tojson"] = tojson
        env.globals.update(raise_exception=raise_exception, namespace=Namespace, dict=Dict(), strftime_now=lambda form:
                           time.strftime(form, time.localtime(now)))
        try:
            self.template = env.from_string(text)
        except jinja2.exceptions.TemplateError as e:
            raise UserError(f"the chat template, line {getattr(e, 'lineno', '?')}: {e}; mend it or choose another --template")
        self.env, self.variables = env, variables
        self.marked = re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None

    def __call__(self, messages, prompt=False, more={}):
        """-> (text, [(first character, end) of what {% generation %} marks])."""
        self.env.blocks, self.env.spans = [], []
        try:
            for block in self.template.generate(**{**self.variables, "tools": None, "documents": None, **more},
                                                messages=messages, add_generation_prompt=prompt):
                self.env.blocks.append(block)
        except Exception as e:       # a template may fail in any way that Python has
            raise Drop("the template refuses it", f"{type(e).__name__}: {e}".replace("\n", " ")[:200])
        return "".join(self.env.blocks), self.env.spans


def common(a, b):
    """Length of the common beginning."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    low, high = 0, n         # a[:low] == b[:low]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low


def said(message):
    """What of a message must stand in the rendered text: without the reasoning, which templates drop from earlier turns."""
    return message["content"].rsplit("</think>", 1)[-1].strip() if isinstance(message.get("content"), str) else ""


def spans_by_prefix(render, messages, full):
    """What the assistant says, for templates without marks: turn i reaches from the end of the text of turns 0..i-1 with the
    generation prompt to the end of the text of turns 0..i. Where the template writes turns 0..i by themselves in another
    way (an empty think block in the last turn), it ends after its content and as much of the end mark of the last turn as
    follows there. -> ([(first character, end)], how many generation prompts are not in the full text as they are)"""
    spans, other, at = [], 0, 0
    lost = lambda i: Drop("an assistant turn is not found in the rendered text", f"turn {i + 1}; give the template "
                          "{% generation %} marks")
    last = said(messages[-1]) if messages[-1]["role"] == "assistant" else ""
    tail = full[full.rfind(last) + len(last):] if last else ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not i:
            raise Drop("a conversation begins with the assistant", "give the template {% generation %} marks")
        head = render(messages[:i], True)
        start = common(head, full)
        if start < len(head):
            bare = render(messages[:i], False)
            if not full.startswith(bare) or start < len(bare):
                raise lost(i)
            other += 1
        through, text = render(messages[:i + 1], False) if i + 1 < len(messages) else full, said(message)
        end = len(through)
        if not full.startswith(through):
            end = full.find(text, start) + len(text) if text else -1
            end += common(full[end:], tail)
        if start < at or end < start or text and text not in full[start:end]:
            raise lost(i)
        spans.append((start, end))
        at = end
    return spans, other


# ---- A row -> messages or strings -> ids and targets --------------------------------------------------------
def to_messages(value, system=None):
    """OpenAI's and ShareGPT's forms -> [{"role", "content", ...}]; 0 weights become "untrained"."""
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise Drop("a field of another kind", "messages are a list of objects")
    out = [{"role": "system", "content": system}] if system else []
    for m in value:
        m = {k: v for k, v in m.items() if v is not None}
        role, content = m.pop("role", None) or m.pop("from", None), m.pop("content", m.pop("value", None))
        if role is None:
            raise Drop("a message lacks its role", ", ".join(list(m)[:5]))
        if not isinstance(role, str) or role not in ROLES:
            raise Drop("an unknown role", repr(role)[:40])
        if isinstance(content, list):        # parts of text; images and the like cannot be tokenized
            parts = [p if isinstance(p, str) else p.get("text", p.get("value")) if isinstance(p, dict) and
                     p.get("type", "text") == "text" else None for p in content]
            if not all(isinstance(p, str) for p in parts):
                raise Drop("content that is not text")
            content = "".join(parts)
        if content is None and not m.get("tool_calls"):
            raise Drop("a message lacks its content", f"role {role}")
        if content is not None and not isinstance(content, str):
            raise Drop("content that is not text")
        weights = [m.pop(k, 1) for k in ("loss_weight", "weight", "train")]
        for key in ("reasoning_content", "thinking", "reasoning"):        # the names of the same thing, as transformers
            if m.get(key) is not None:
                m = {"thinking": m[key], **m, "reasoning_content": m[key]}
                break
        out.append({"role": ROLES[role], **({} if content is None else {"content": content}), **m,
                    **({} if all(weights) else {"untrained": True})})
    if sum(m["role"] in ("system", "developer") for m in out) > 1:
        raise Drop("two system turns")
    return out


def check_answers(messages, reason="an empty answer"):
    for m in messages:
        if m["role"] == "assistant" and not m.get("content", "").strip() and not m.get("tool_calls"):
            raise Drop(reason)


def field(row, key, kinds=(str,), need_it=True):
    value = row.get(key)
    if value is None and need_it:
        raise Drop("a missing field", key)
    if value is not None and not isinstance(value, kinds):
        raise Drop("a field of another kind", f"{key} is {type(value).__name__}")
    return value


def instruction(row):
    """alpaca's prompt as messages: system, history of (question, answer), then instruction and input."""
    text, more = field(row, "instruction"), field(row, "input", need_it=False)
    out = [{"role": "system", "content": row["system"]}] if field(row, "system", need_it=False) else []
    for turn in field(row, "history", (list,), False) or []:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(t, str) for t in turn):
            raise Drop("a field of another kind", "history is a list of [question, answer]")
        out += [{"role": r, "content": t} for r, t in zip(("user", "assistant"), turn)]
    return out + [{"role": "user", "content": text + "\n" + more if more else text}]


def as_ids(value, vocab, name):
    np = need("numpy")
    if not isinstance(value, list) or not all(type(i) is int for i in value):
        raise Drop("a field of another kind", f"{name} is a list of numbers")
    if value and not (0 <= min(value) and max(value) < vocab):
        raise Drop("token ids outside the vocabulary", f"{min(value)} .. {max(value)} of {vocab}")
    return np.array(value, np.uint32)


class Preparer:
    """One row of input -> documents of words, in a worker."""
    def __init__(self, setup):
        self.np, self.o = need("numpy"), setup
        self.template = Template(setup.template_text, setup.variables, setup.now) if setup.template_text is not None else None
        if setup.kind:
            self.encoder = GreedyEncoder(setup)
        else:
            self.encoder = LibraryEncoder(setup.spec, self.template is not None and self.template.marked)
        self.specials = special_pattern(self.encoder.specials)
        self.counts, self.numbers, self.marked = {}, collections.Counter(), False

    # -- what is counted
    def count(self, reason, detail=""):
        entry = self.counts.setdefault(reason, [0, self.place, detail])
        entry[0] += 1

    # -- text
    def encode(self, text, offsets=False):
        try:
            ids, spans = self.encoder.encode(text, offsets, self.marked)
        except (UnicodeEncodeError, TypeError):       # the latter: tokenizers, whose Rust takes UTF-8 alone
            raise Drop("not UTF-8", "a lone surrogate")
        return self.np.array(ids, self.np.uint32), spans

    def encode_string(self, text):
        """A text by itself: BOS as the tokenizer puts it, not twice; special tokens are known by their text."""
        self.marked = False
        ids, _ = self.encode(text)
        if self.o.add_bos and not (len(ids) and ids[0] == self.o.bos):
            ids = self.np.concatenate([self.np.array([self.o.bos], self.np.uint32), ids])
        return ids

    def with_eos(self, text):
        return text if not self.o.eos_text or text.endswith(self.o.eos_text) else text + self.o.eos_text

    def border(self, prompt, *wholes):
        """Where the answer begins: the shortest common beginning of the prompt's ids with those of prompt and answer."""
        np, n = self.np, len(prompt)
        for whole in wholes:
            m = min(n, len(whole))
            other = np.nonzero(prompt[:m] != whole[:m])[0]
            n = int(other[0]) if len(other) else m
        if n < len(prompt):
            self.count("prompts shortened, their end joins the answer")
        return n

    # -- conversations
    def more(self, row):
        tools, more = row.get("tools"), row.get("chat_template_kwargs") or {}
        if isinstance(tools, str):
            try:
                tools = json.loads(tools) if tools.strip() else None
            except ValueError:
                raise Drop("a field of another kind", "tools is not JSON")
        if not isinstance(more, dict):
            raise Drop("a field of another kind", "chat_template_kwargs is an object")
        return {**({"tools": tools} if tools else {}), **more}

    def conversation(self, row, *lists):
        """-> render(messages, prompt) and the lists, marked where they spell special tokens."""
        if self.template is None:
            raise UserError(f"{self.place}: a conversation, but the tokenizer has no chat template; name one: --template "
                            f"{'|'.join(TEMPLATES)} or a file")
        more, lists, self.marked = self.more(row), [list(messages) for messages in lists], False
        if self.specials.pattern != "(?!)" and any(self.specials.search(s) for s in strings([lists, more])):
            self.count("a message spells a special token" + (", kept as text" if self.o.special_text == "text" else ""))
            if self.o.special_text == "text":
                more, lists, self.marked = mark(more, self.specials), mark(lists, self.specials), True
        lists = [[{k: v for k, v in m.items() if k != "untrained"} for m in messages] for messages in lists]
        return (lambda messages, prompt=False: self.template(messages, prompt, more)), lists

    def assistant_targets(self, render, messages, untrained):
        """ids and targets of a conversation whose assistant turns are trained."""
        np, (full, spans) = self.np, render(messages)
        if self.template.marked:
            turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
            if any(untrained):
                if len(spans) != len(turns):
                    raise Drop("an assistant turn is not found in the rendered text",
                               f"{len(spans)} marks, {len(turns)} turns")
                spans = [s for s, i in zip(spans, turns) if not untrained[i]]
        else:
            spans, other = spans_by_prefix(lambda m, p: render(m, p)[0], messages, full)
            if other:
                self.count("prompts shortened, their end joins the answer")
            turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
            spans = [s for s, i in zip(spans, turns) if not untrained[i]]
        ids, where = self.encode(full, True)
        target, (first, end) = np.zeros(len(ids), bool), np.array(where, np.int64).reshape(-1, 2).T
        for a, b in spans:         # a token that only reaches into a span belongs to it
            target |= (first < b) & (end > a)
        return ids, target

    def sft_conversation(self, row, messages, mask, answer=None):
        """mask: all, assistant, completion (the messages of `answer`, by default the last one)."""
        np = self.np
        if not messages and not answer:
            raise Drop("an empty conversation")
        whole = messages + (answer or [])
        check_answers(whole)
        if not any(m["role"] == "assistant" for m in whole):
            raise Drop("no assistant turn")
        untrained = [m.get("untrained", False) for m in whole]
        render, (whole,) = self.conversation(row, whole)
        if mask == "assistant":
            return self.assistant_targets(render, whole, untrained)
        ids, _ = self.encode(render(whole)[0])
        if mask == "all":
            return ids, np.ones(len(ids), bool)
        if answer is None and (whole[-1]["role"] != "assistant" or len(whole) < 2):
            raise Drop("the last turn is no answer")
        n = len(messages) if answer else len(whole) - 1
        prompt, _ = self.encode(render(whole[:n], True)[0])
        return ids, (np.arange(len(ids)) >= self.border(prompt, ids)) & (not all(untrained[n:]))

    # -- the two stages
    def sft_ids(self, row):
        np, ids = self.np, as_ids(row["input_ids"], self.o.vocab, "input_ids")
        target, seen = np.ones(len(ids), bool), np.ones(len(ids), bool)
        for key in ("labels", "completion_mask", "assistant_masks", "attention_mask"):
            value = row.get(key)
            if value is None:
                continue
            if not isinstance(value, list) or len(value) != len(ids) or not all(
                    isinstance(i, int) and abs(i) < 1 << 62 for i in value):
                raise Drop("a field of another kind", f"{key} is a list of as many numbers as input_ids")
            value = np.array(value, np.int64)
            if key == "labels" and not ((value == -100) | (value == ids)).all():
                raise Drop("labels that are neither -100 nor the token")
            if key == "attention_mask":
                seen = value != 0
            else:
                target &= value != -100 if key == "labels" else value != 0
        return ids[seen], target[seen]

    def sft(self, row):
        """-> (form, ids, targets)"""
        np, mask = self.np, self.o.mask
        if row.get("input_ids") is not None:
            return ("input_ids", *self.sft_ids(row))
        if row.get("prompt") is not None and row.get("completion") is not None:
            prompt, answer = row["prompt"], row["completion"]
            if isinstance(prompt, str) and isinstance(answer, str):
                if not answer.strip():
                    raise Drop("an empty answer")
                prompt_ids, ids = self.encode_string(prompt), self.encode_string(prompt + self.with_eos(answer))
                start = 0 if mask == "all" else self.border(prompt_ids, ids)
                return "prompt, completion", ids, np.arange(len(ids)) >= start
            prompt = to_messages({"role": "user", "content": prompt} if isinstance(prompt, str) else prompt,
                                 field(row, "system", need_it=False))
            answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else to_messages(answer)
            if not prompt or not answer:
                raise Drop("an empty answer" if prompt else "an empty conversation")
            return ("prompt, completion of messages", *self.sft_conversation(row, prompt, mask or "completion", answer))
        for key in ("messages", "conversations"):
            if row.get(key) is not None:
                return (key, *self.sft_conversation(row, to_messages(row[key], field(row, "system", need_it=False)),
                                                    mask or "assistant"))
        if row.get("instruction") is not None:
            answer = [{"role": "assistant", "content": field(row, "output")}]
            return ("instruction, output", *self.sft_conversation(row, instruction(row), mask or "completion", answer))
        if row.get("prompt") is not None:
            raise Drop("a missing field", "completion")
        if row.get("text") is not None:
            text = field(row, "text")
            if not text.strip():
                raise Drop("an empty text")
            if mask in ("completion", "assistant"):
                raise Drop("a text has no answer to mask", f"--mask {mask}")
            ids = self.encode_string(self.with_eos(text))
            return "text", ids, np.ones(len(ids), bool)
        raise Drop("no known fields", ", ".join(map(str, list(row)[:6])) + ("; for --stage dpo" if "chosen" in row else ""))

    def dpo(self, row):
        """-> (form, prompt ids, chosen ids, rejected ids)"""
        np, o = self.np, self.o
        if row.get("chosen_ids") is not None or row.get("rejected_ids") is not None:
            return ("prompt_ids, chosen_ids, rejected_ids", *(as_ids(field(row, k, (list,)), o.vocab, k) for k in
                                                              ("prompt_ids", "chosen_ids", "rejected_ids")))
        sides = [row[k] if row.get(k) is not None else row.get(k + "_messages") for k in ("chosen", "rejected")]
        for key, side in zip(("chosen", "rejected"), sides):
            if side is None:
                raise Drop("a missing field" if any(k in row for k in ("chosen", "rejected", "chosen_messages",
                           "rejected_messages")) else "no known fields", key + ("; for --stage sft" if "text" in row or
                                                                                "messages" in row else ""))
        prompt, before = row.get("prompt"), row.get("messages")
        before = row.get("conversations") if before is None else before
        if all(isinstance(s, str) for s in sides) and before is None and row.get("instruction") is None and not isinstance(
                prompt, (list, dict)):
            return ("chosen, rejected" + " and prompt" * (prompt is not None), *self.dpo_strings(prompt, *sides))
        return ("chosen, rejected of messages", *self.dpo_messages(row, prompt, before, sides))

    def dpo_strings(self, prompt, chosen, rejected):
        if prompt is None:       # the common beginning; a space right before the difference goes to the answers
            n = common(chosen, rejected)
            if n == min(len(chosen), len(rejected)):
                n -= 1           # as TRL: where one answer begins the other, its last character is an answer's
            elif n and chosen[n - 1] == " ":
                n -= 1
            if chosen == rejected:
                raise Drop("an answer equals its rejection")
            prompt, chosen, rejected = chosen[:max(n, 0)], chosen[max(n, 0):], rejected[max(n, 0):]
        elif not isinstance(prompt, str):
            raise Drop("a field of another kind", f"prompt is {type(prompt).__name__}")
        if not chosen.strip() or not rejected.strip():
            raise Drop("an empty answer")
        ids = self.encode_string(prompt)
        sides = [self.encode_string(prompt + self.with_eos(s)) for s in (chosen, rejected)]
        n = self.border(ids, *sides)
        return ids[:n], sides[0][n:], sides[1][n:]

    def dpo_messages(self, row, prompt, before, sides):
        sides = [[{"role": "assistant", "content": s}] if isinstance(s, str) else to_messages(s) for s in sides]
        if not sides[0] or not sides[1]:
            raise Drop("an empty answer")
        system = field(row, "system", need_it=False)
        if isinstance(prompt, str) and sides[0][0]["role"] != "assistant":
            prompt = None        # UltraFeedback: the answers hold the prompt, too
        if before is not None:
            messages = to_messages(before, system)
        elif isinstance(prompt, str):
            messages = to_messages({"role": "user", "content": prompt}, system)
        elif prompt is not None:
            messages = to_messages(prompt, system)
        elif row.get("instruction") is not None:
            messages = instruction(row)
        else:
            bare = [[(m["role"], m.get("content"), m.get("tool_calls")) for m in s] for s in sides]
            n = next((i for i, (a, b) in enumerate(zip(*bare)) if a != b), min(map(len, bare)) - 1)
            messages, sides = to_messages(sides[0][:n], system), [s[n:] for s in sides]
        if not messages:
            raise Drop("no prompt before the answers")
        if any(s[0]["role"] != "assistant" for s in sides):
            raise Drop("chosen and rejected differ before the answer")
        for s in sides:
            check_answers(s)
        if [(m["role"], m.get("content"), m.get("tool_calls")) for m in sides[0]] == [
                (m["role"], m.get("content"), m.get("tool_calls")) for m in sides[1]]:
            raise Drop("an answer equals its rejection")
        render, (messages, *sides) = self.conversation(row, messages, *sides)
        ids = self.encode(render(messages, True)[0])[0]
        wholes = [self.encode(render(messages + s)[0])[0] for s in sides]
        n = self.border(ids, *wholes)
        return ids[:n], wholes[0][n:], wholes[1][n:]

    # -- documents
    def documents(self, ids, target):
        """The documents of an SFT row, each of at most max_length tokens and with a target."""
        np, o, n = self.np, self.o, len(ids)
        ids, target = ids.copy(), target.copy()
        target[:1] = False       # nothing of its own document predicts the first token
        if not target.any():
            raise Drop("no target")
        if n > o.max_length and o.long == "drop":
            raise Drop("longer than --max-length")
        if n > o.max_length and o.long == "cut":
            if not target[:o.max_length].any():
                raise Drop("the prompt fills the row", f"{int(np.argmax(target)):,} tokens before the first target")
            self.count(f"documents cut to {o.max_length:,} tokens")
            if o.eos >= 0 and (target[o.max_length:] & (ids[o.max_length:] == o.eos)).any():
                self.count("documents that lost their EOS to the cut")
            ids, target = ids[:o.max_length], target[:o.max_length]
        elif n > o.max_length:
            self.count(f"documents split after {o.max_length:,} tokens")
        words = ids | np.where(target, np.uint32(TARGET), np.uint32(0))
        out = []
        for at in range(0, n if o.long == "split" else 1, o.max_length):
            piece = words[at:at + o.max_length].copy()
            piece[0] = piece[0] & ID | START
            if (piece >> 31).any():
                out.append(piece)
            else:
                self.count("pieces without a target")
        return out

    def pair(self, prompt, chosen, rejected):
        """chosen, then rejected; each keeps its first max_length tokens, or as many as let the pair fit in a row."""
        np, o, P = self.np, self.o, len(prompt)
        if not len(chosen) or not len(rejected):
            raise Drop("an empty answer")
        if np.array_equal(chosen, rejected):
            raise Drop("an answer equals its rejection")
        sizes = [P + len(chosen), P + len(rejected)]
        limit, room = o.max_length, o.seq_len + 1
        if P >= limit:
            raise Drop("the prompt fills the row", f"{P:,} tokens")
        if sum(min(s, limit) for s in sizes) > room:
            limit = max(room // 2, room - min(sizes))
        if max(sizes) > limit and o.long == "drop":
            raise Drop("longer than --max-length" if max(sizes) > o.max_length else "a pair longer than a row")
        if P >= limit:
            raise Drop("the prompt fills half the row", f"{P:,} tokens")
        docs = []
        for answer in (chosen, rejected):
            if P + len(answer) > limit:
                self.count("answers cut to --max-length" if limit == o.max_length
                           else "answers cut so that the pair fits a row")
                if o.eos >= 0 and answer[-1] == o.eos:
                    self.count("answers that lost their EOS to the cut")
            words = np.concatenate([prompt, answer[:limit - P] | np.uint32(TARGET)])
            words[0] = words[0] & ID | START
            if not (words >> 31).any():
                raise Drop("no target")
            docs.append(words)
        if np.array_equal(*docs):
            raise Drop("the answers are equal after the cut")
        return docs

    def row(self, data):
        """-> documents; the pair of a dpo row"""
        try:
            row = json.loads(data.decode("utf-8").lstrip("\ufeff"))
        except UnicodeDecodeError as e:
            raise Drop("not UTF-8", f"byte {e.start}")
        except (ValueError, RecursionError) as e:
            raise Drop("not JSON", str(e)[:100])
        row = {"messages": row} if isinstance(row, list) else row
        if not isinstance(row, dict):
            raise Drop("not an object")
        form, *parts = self.sft(row) if self.o.stage == "sft" else self.dpo(row)
        docs = self.documents(*parts) if self.o.stage == "sft" else self.pair(*parts)
        self.numbers["form " + form] += 1
        return docs

    def batch(self, rows):
        """-> (words of all documents, their lengths, targets, 64 bits of the hash of each document's row, counts, numbers)"""
        np, o = self.np, self.o
        words, lengths, targets, hashes = [], array.array("i"), array.array("i"), array.array("Q")
        self.counts, self.numbers = {}, collections.Counter()
        for _, _, _, path, where, kind, _, data in rows:
            self.place = f"{path}: row {where}" if kind == "row" else f"{path}:{where}"
            self.numbers["rows"] += 1
            before = {k: v[0] for k, v in self.counts.items()}
            try:
                if not data:
                    raise Drop(f"a line longer than {ROW_MAX >> 20} MiB")
                docs = self.row(data)
            except Drop as e:
                reason, detail = e.args
                if o.strict and not reason.startswith(("longer than", "a pair longer")):
                    raise UserError(f"{self.place}: {reason}{f' ({detail})' if detail else ''}; mend or remove the row, or "
                                    "leave --strict out")
                for k in [k for k in self.counts if self.counts[k][0] != before.get(k, 0)]:      # what a dropped row changed
                    self.counts[k][0] = before.get(k, 0)
                    if not self.counts[k][0]:
                        del self.counts[k]
                self.count("dropped: " + reason, detail)
                continue
            self.numbers["kept"] += 1
            digest = hashlib.blake2b(b"".join(d.tobytes() for d in docs), digest_size=8, key=str(o.seed).encode()).digest()
            for d in docs:
                words.append(d)
                lengths.append(len(d))
                targets.append(int((d >> 31).sum()))
                hashes.append(int.from_bytes(digest, "little"))
                self.numbers["end"] += int(o.eos >= 0 and (d[d >= TARGET] & ID == o.eos).any())
        return np.concatenate(words).tobytes() if words else b"", lengths, targets, hashes, self.counts, self.numbers


preparer = []        # of this process


def start_preparer(setup, parent):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    preparer[:] = [Preparer(setup)]
    tokens.leave_with(parent)


def prepare_batch(rows):
    return preparer[0].batch(rows)


# ---- Reading ------------------------------------------------------------------------------------------------
def json_rows(path, stream):
    """One row per line, or one list of rows. -> (line, True, True, bytes); no bytes: the line is too long."""
    first, number = b"", 0
    while not first.strip():
        first, number = stream.readline(ROW_MAX + 1), number + 1
        if not first:
            return
    if first.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        try:
            one = json.loads(first)
            bare = all(isinstance(m, dict) and {"role", "from"} & m.keys() for m in one)
        except ValueError:
            bare = False
        if not bare:
            yield from list_rows(path, stream, first, number)
            return
    line = first
    while line:
        if len(line) > ROW_MAX:
            yield number, True, True, b""
            while line and not line.endswith(b"\n"):
                line = stream.readline(ROW_MAX)
        elif line.strip():
            yield number, True, True, line
        line, number = stream.readline(ROW_MAX + 1), number + 1


def list_rows(path, stream, text, line):
    """The items of a JSON list that may be larger than memory."""
    text = text.decode("utf-8", "surrogateescape").lstrip("\ufeff")
    decoder, space, at, size, more = json.JSONDecoder(), re.compile(r"[\s,]*"), text.index("[") + 1, 1 << 20, True
    broken = lambda why: UserError(f"{path}:{line}: not JSON in this list ({why}); mend it, or write one row per line "
                                   "(jq -c '.[]')")
    rest = b""           # bytes of a character that the last read cut
    while True:
        end = space.match(text, at).end()
        line, at = line + text.count("\n", at, end), end
        try:
            if text[at:at + 1] == "]":
                if rest or text[at + 1:].strip() or any(map(bytes.strip, stream)):
                    raise UserError(f"{path}:{line}: there is more after the list; make one list of all (jq -s add)")
                return
            _, end = decoder.raw_decode(text, at)
            yield line, True, True, text[at:end].encode("utf-8", "surrogateescape")
            line, at, size = line + text.count("\n", at, end), end, 1 << 20
        except ValueError as e:
            if not more or len(text) - at > ROW_MAX:
                raise broken(str(e)[:100] if at < len(text) else "it ends without ]")
            data = rest + stream.read(size)
            more, size = len(data) > len(rest), min(2 * size, ROW_MAX)
            keep = len(data)
            while more and keep > len(data) - 4 and keep and data[keep - 1] & 0xC0 == 0x80:      # not inside a character
                keep -= 1
            keep -= bool(more and keep and data[keep - 1] >= 0xC0)
            text, at, rest = text[at:] + data[:keep].decode("utf-8", "surrogateescape"), 0, data[keep:]


def table_rows(path, *_):
    """The known columns of each row of a table, as JSON."""
    def columns(names):
        known = [n for n in names if n in FIELDS]
        if not known:
            raise UserError(f"{path}: no column that chat.py knows (it has {', '.join(names)})")
        return known
    number = 0
    for batch, at in tokens.tables(path, columns):
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            rows = []
            for i in range(batch.num_rows):
                try:
                    rows += batch.slice(i, 1).to_pylist()
                except UnicodeDecodeError:
                    rows.append(None)
        for row in rows:
            number += 1
            yield number, True, True, b"\xff" if row is None else json.dumps(row, default=str).encode(), None, at


def batches(items):
    """As tokens.batches, but smaller: a template takes longer than a tokenizer."""
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += len(item[-1]) + 64
        if size >= tokens.BATCH // 4:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- Packing ------------------------------------------------------------------------------------------------
def pack(lengths, room):
    """Best fit decreasing over all lengths -> (pack of each, how many). Longest first, equal ones in their order, each into
    the open pack with the least room that is enough, of equal ones the one that got that room first, else a new one."""
    np = need("numpy")
    lengths, out, packs, open_rooms = np.asarray(lengths), np.zeros(len(lengths), np.int64), 0, 0
    waiting = [None] * (room + 1)        # packs by room left, oldest first; bit r of open_rooms: waiting[r] is not empty
    for i in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[i])
        fits = open_rooms >> n
        if fits:
            left = n + (fits & -fits).bit_length() - 1
            queue = waiting[left]
            p = queue.popleft()
            if not queue:
                open_rooms ^= 1 << left
        else:
            left, p, packs = room, packs, packs + 1
        out[i], left = p, left - n
        if left:
            if waiting[left] is None:
                waiting[left] = collections.deque()
            waiting[left].append(p)
            open_rooms |= 1 << left
    return out, packs


class Units:
    """What is packed: a document (sft) or a pair of them (dpo); where each lies in the spool."""
    def __init__(self, lengths, targets, hashes, per):
        np = need("numpy")
        self.docs = np.frombuffer(lengths, np.int32).astype(np.int64).reshape(-1, per)
        self.targets = np.frombuffer(targets, np.int32).astype(np.int64).reshape(-1, per).sum(1)
        self.hashes = np.frombuffer(hashes, np.uint64).reshape(-1, per)[:, 0]
        self.lengths = self.docs.sum(1)
        self.starts = np.cumsum(self.lengths) - self.lengths


def choose_validation(units, args, rows):
    """A row validates if the hash of its tokens says so, so repeated rows lie on one side; of 20 rows at least one."""
    np = need("numpy")
    chosen = np.zeros(len(units.hashes), bool)
    if args.val_fraction:
        chosen = units.hashes < np.uint64(int(args.val_fraction * 2.0 ** 64))
        if not chosen.any() and rows >= 20:
            chosen = units.hashes == units.hashes.min()
        if chosen.all():
            chosen[:] = False
    return chosen


def write_split(units, which, spool, shards, args, progress):
    """Packs the units `which` and writes their rows in the order in which the packs were opened. -> totals"""
    np = need("numpy")
    width, index = args.seq_len + 1, np.nonzero(which)[0]
    lengths = units.lengths[index]
    where, rows = pack(lengths, width) if args.pack == "on" else (np.arange(len(index)), len(index))
    order = np.lexsort((np.arange(len(index)), -lengths, where))         # in a pack: longest first, as they came
    per = units.docs.shape[1]
    first = np.searchsorted(where[order], np.arange(rows + 1))
    in_shard, block = max(1, args.shard_tokens // width), max(1, (1 << 22) // width)
    starts, sizes = units.starts[index][order].tolist(), lengths[order].tolist()
    row, done = 0, 0
    while row < rows:
        n = min(block, rows - row, in_shard - (shards.in_shard // width if shards.file else 0))
        out = np.full((n, width), START, np.uint32)
        for r in range(n):
            at = 0
            for k in range(first[row + r], first[row + r + 1]):
                out[r, at:at + sizes[k]] = spool[starts[k]:starts[k] + sizes[k]]
                at += sizes[k]
            done += at
        shards.write(out.astype("<u4", copy=False).reshape(-1), n * width)
        if shards.in_shard >= in_shard * width:
            shards.close()
        row += n
        shards.rows += n
        progress.done += int(sum(sizes[first[row - n]:first[row]])) * 4
        progress.show(done)
    shards.close()
    most = int(np.diff(first).max()) * per if rows else 0
    return {"rows": rows, "documents": len(index) * per, "documents_per_row": most, "tokens": int(lengths.sum()),
            "targets": int(units.targets[index].sum()), "lengths": units.docs[index].reshape(-1)}


# ---- The whole preparation ----------------------------------------------------------------------------------
def find_inputs(paths):
    files = tokens.find_inputs(paths)
    texts = [f for f in files if re.search(r"(?i)\.txt(\.\w+)?$", f)]
    if texts:
        raise UserError(f"{texts[0]}: plain text has no rows; name .jsonl, .json or .parquet files")
    return files


def tokenize(setup, files, spool, progress):
    """First pass: all documents to the spool. -> lengths, targets, hashes, counts, numbers"""
    lengths, targets, hashes = array.array("i"), array.array("i"), array.array("Q")
    counts, numbers, total = {}, collections.Counter(), 0
    rows = tokens.read_documents(files, None, None, progress, lines=json_rows, rows=table_rows)
    work = ((batch, None) for batch in batches(rows))
    for (words, n, t, h, some, more), _ in tokens.in_order(prepare_batch, work, setup, start_preparer):
        spool.write(words)
        lengths.extend(n)
        targets.extend(t)
        hashes.extend(h)
        numbers.update(more)
        total += len(words) // 4
        for reason, (k, place, detail) in some.items():
            counts.setdefault(reason, [0, place, detail])[0] += k
        progress.show(total)
    spool.flush()
    return lengths, targets, hashes, counts, numbers


def prepare(args):
    np = need("numpy")
    files = find_inputs(args.inputs)
    total = sum(os.path.getsize(f) for f in files)
    setup, tokenizer, beside = load(args)
    Preparer(setup)          # a missing library or a broken template is told before any work
    args.jobs = max(1, min(args.jobs, total // tokens.BATCH))
    setup.jobs = args.jobs
    options = {k: v for k, v in vars(args).items() if k not in ("jobs", "out", "inspect", "rows", "format", "strict")}
    options.update(tokenizer_sha256=setup.tokenizer_sha256, template_sha256=setup.template_sha256)
    state = os.path.join(args.out, "chat.json")
    if os.path.exists(state):        # a template may write the date: that of the first start
        with open(state, encoding="utf-8") as f:
            setup.now = json.load(f).get("time", setup.now)
    tokens.claim_folder(args, options, name="chat.json")
    tokens.write_whole(state, json.dumps({"options": options, "complete": False, "time": setup.now}, indent=1).encode())
    if setup.template_text and "strftime_now" in setup.template_text:
        print(f"note: the template may write the date: {time.strftime('%d %b %Y', time.localtime(setup.now))}",
              file=sys.stderr)
    began, progress, path = time.time(), tokens.Progress(total), os.path.join(args.out, ".spool.tmp")
    splits = {n: tokens.Shards(f, p, args, None) for f, n, p in zip(tokens.split_folders(args), ("train", "validation"),
                                                                    ("train", "val"))}
    try:
        with open(path, "wb") as spool:
            lengths, targets, hashes, counts, numbers = tokenize(setup, files, spool, progress)
        per = 2 if args.stage == "dpo" else 1
        if not lengths:
            reasons = ", ".join(f"{n} {r[9:]} (first {place}{': ' + detail if detail else ''})" for r, (n, place, detail) in
                                counts.items() if r.startswith("dropped: "))
            raise UserError(f"no row of {', '.join(args.inputs[:3])} is left: {reasons or 'there is none'}")
        units = Units(lengths, targets, hashes, per)
        spool = np.memmap(path, np.uint32, "r")
        progress.clear()
        progress = tokens.Progress(4 * len(spool))
        val = choose_validation(units, args, numbers["kept"])
        done = {name: write_split(units, which, spool, splits[name], args, progress) for name, which in
                (("train", ~val), ("validation", val))}
        del spool
    except OSError as e:
        raise UserError(f"{e.filename}: {e.strerror}" if e.filename else
                        f"{args.out}: {e.strerror}; free space or choose another --out")
    finally:
        for s in splits.values():
            s.abandon()
        progress.clear()
        if os.path.exists(path):
            os.unlink(path)
    counted = {reason: n for reason, (n, _, _) in counts.items()}
    for name, s in splits.items():
        if s.files:
            finish_folder(s, name, args, setup, tokenizer, beside, done[name], counted)
    repeats = len(units.hashes) - len(np.unique(units.hashes)) if args.long != "split" else 0
    report(args, setup, tokenizer, numbers, counts, done, splits, repeats, time.time() - began)
    for d in done.values():
        del d["lengths"]
    tokens.write_whole(state, json.dumps({
        "options": options, "complete": True, "time": setup.now, "rows": numbers["rows"], "kept": numbers["kept"],
        "forms": {k[5:]: v for k, v in sorted(numbers.items()) if k.startswith("form ")}, "counts": {
            r: {"rows": n, "first": place, "what": detail} for r, (n, place, detail) in counts.items()}, **done},
            indent=1).encode())


def finish_folder(shards, name, args, setup, tokenizer, beside, done, counts):
    for target, data in beside.items():
        tokens.write_whole(os.path.join(shards.folder, target), data)
    meta = {"dataset": os.path.basename(os.path.abspath(args.out)), "split": name, "tokenizer": tokenizer.name,
            "vocab_size": len(tokenizer.pieces), "sequence_length": args.seq_len, "token_size_bytes": 4,
            "eos_token_id": tokenizer.eos, "stage": args.stage, "documents_per_row": done["documents_per_row"],
            "total_sequences": done["rows"], "total_tokens": done["rows"] * (args.seq_len + 1),
            "documents": done["documents"],
            **({"pairs": done["documents"] // 2} if args.stage == "dpo" else {}), "targets": done["targets"],
            "document_tokens": done["tokens"], "mask": args.mask or "by form", "max_length": args.max_length,
            "long": args.long,
            "pack": args.pack, "special_text": args.special_text, "template": setup.template_name,
            "template_sha256": setup.template_sha256, "tokenizer_sha256": setup.tokenizer_sha256, "counts": counts}
    tokens.write_whole(os.path.join(shards.folder, "metadata.json"), json.dumps(meta, indent=1, ensure_ascii=False).encode())
    if hasattr(os, "O_DIRECTORY"):       # the renames themselves reach the disk
        fd = os.open(shards.folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(fd)
        os.close(fd)


def report(args, setup, tokenizer, numbers, counts, done, splits, repeats, seconds):
    np = need("numpy")
    forms = ", ".join(f"{v:,} {k[5:]}" for k, v in sorted(numbers.items()) if k.startswith("form "))
    print(f"rows  | {numbers['rows']:,} read | {numbers['kept']:,} kept ({forms}) | "
          f"{numbers['rows'] - numbers['kept']:,} dropped" + (f" | {repeats:,} repeat another" if repeats else ""))
    for reason, (n, place, detail) in sorted(counts.items(), key=lambda x: (not x[0].startswith("dropped"), -x[1][0], x[0])):
        print(f"{n:9,}  {reason}; first {place}{f' ({detail})' if detail else ''}")
    lengths = np.concatenate([d["lengths"] for d in done.values()])
    bins = np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int))
    for i in np.nonzero(bins)[0]:
        name = f"{2 ** (i - 1) + 1 if i else 1:,}-{2 ** i:,}"
        print(f"{name:>15s} tokens | {'#' * -(-40 * int(bins[i]) // int(bins.max())):40s} {bins[i]:,}")
    unit = "pairs" if args.stage == "dpo" else "documents"
    for name, d in done.items():
        if d["rows"]:
            room = d["rows"] * (args.seq_len + 1)
            print(f"{name if name == 'train' else 'val':5s} | {d['documents'] // (2 if unit == 'pairs' else 1):,} {unit} | "
                  f"{d['rows']:,} rows of {args.seq_len} + 1, {100 * d['tokens'] / room:.2f}% filled, at most "
                  f"{d['documents_per_row']} documents | {d['targets']:,} targets, "
                  f"{100 * d['targets'] / d['tokens']:.1f}% of the tokens | {len(splits[name].files)} shards")
    print(f"mask {args.mask or 'by form'}, template {setup.template_name or 'none'}, "
          f"{numbers['rows'] / max(seconds, 1e-6):,.0f} rows per second, {seconds:.1f} s -> {args.out}")
    total = sum(d["documents"] for d in done.values())
    given = sum(v for k, v in numbers.items() if re.match("form (input|prompt)_ids", k))
    if tokenizer.eos >= 0 and numbers["end"] < total // 2 and given < numbers["kept"]:
        print(f"note: {numbers['end']:,} of {total:,} documents train EOS ({setup.eos_text}); where the template has an end "
              "mark of its own, generation stops only if that is the tokenizer's EOS", file=sys.stderr)
    if args.val_fraction and not done["validation"]["rows"]:
        print("note: validation got no row; for some use a larger --val-fraction, or more rows", file=sys.stderr)


# ---- Looking ------------------------------------------------------------------------------------------------
def padding_of(rows):
    """START with id 0, unless a document goes on after it: one of this token alone has no target, so none is written."""
    np = need("numpy")
    ends = np.ones(rows.shape, bool)
    ends[:, :-1] = rows[:, 1:] >> 30 & 1
    return (rows == START) & ends


def check_rows(path, rows, meta):
    """Every rule of the format (data/README.md)."""
    np, width = need("numpy"), meta["sequence_length"] + 1
    stage, vocab = meta["stage"], meta["vocab_size"]

    def bad(which, what):
        if len(which):
            raise UserError(f"{path}: row {int(which[0])}: {what}; write the shard again")
    totals, step = collections.Counter(), max(1, (1 << 22) // width)
    for at in range(0, len(rows), step):
        block = np.array(rows[at:at + step])
        start, target, ids = block >> 30 & 1, block >> 31, block & ID
        padding, place = padding_of(block), lambda which: at + np.nonzero(which)[0]
        bad(place((block >> 24 & 63).any(1)), "bits 24-29 are not 0")
        bad(place(start[:, 0] == 0), "no document begins it")
        bad(place((start & target).any(1)), "a document's first token is a target")
        bad(place((ids >= vocab).any(1)), f"a token id is outside the vocabulary of {vocab}")
        bad(place((padding[:, :-1] & ~padding[:, 1:]).any(1)), "padding before a document")
        real = start.astype(bool) & ~padding
        bad(place(~real.any(1)), "no document in it")
        if stage == "dpo":
            bad(place(real.sum(1) % 2 == 1), "an odd number of documents")
        r, c = np.nonzero(start.astype(bool))
        sums = np.add.reduceat(target.reshape(-1), r * width + c)
        bad(at + r[(sums == 0) & ~padding[r, c]], "a document without a target")
        totals.update(documents=int(real.sum()), targets=int(target.sum()), tokens=int((~padding).sum()))
        totals["most"] = max(totals["most"], int(real.sum(1).max()))
    return totals


def inspect(path, count):
    np, meta = need("numpy"), tokens.beside(path, "metadata.json")
    if not meta:
        raise UserError(f"{path}: no metadata.json beside it, so its row length is unknown")
    with open(meta, encoding="utf-8") as f:
        meta = json.load(f)
    if "stage" not in meta:
        raise UserError(f"{path}: not flagged rows (metadata.json names no stage); use data/tokens.py --inspect")
    width, size = meta["sequence_length"] + 1, os.path.getsize(path)
    if size % (4 * width) or not size:
        raise UserError(f"{path}: {size} bytes are not whole rows of {width} words; write the shard again")
    rows = np.memmap(path, "<u4", "r").reshape(-1, width)
    t = check_rows(path, rows, meta)
    print(f"{path}: stage {meta['stage']}, {len(rows):,} rows of {width - 1} + 1 tokens, vocabulary {meta['vocab_size']}, "
          f"mask {meta.get('mask')}, template {meta.get('template')}")
    print(f"{t['documents']:,} documents, at most {t['most']} in a row; {100 * t['tokens'] / rows.size:.2f}% filled; "
          f"{t['targets']:,} targets, {100 * t['targets'] / max(t['tokens'], 1):.1f}% of the tokens; all rows keep the "
          "format")
    tokenizer = tokens.beside(path, "tokenizer.bin")
    if not tokenizer:
        return print("no tokenizer.bin beside it: no text")
    pieces = tokens.read_tokenizer_bin(tokenizer)[0]
    colour = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("\u27e6", "\u27e7")
    print(f"targets are {'green' if sys.stdout.isatty() else 'between ' + ' and '.join(colour)}")
    for r in range(min(count, len(rows))):
        row = np.array(rows[r])
        padding = padding_of(row[None])[0]
        starts = [*np.nonzero((row >> 30 & 1 == 1) & ~padding)[0], int((~padding).sum())]
        for d, (a, b) in enumerate(zip(starts, starts[1:])):
            side = ("chosen", "rejected")[d % 2] + f" {d // 2}" if meta["stage"] == "dpo" else f"document {d}"
            print(f"-- row {r}, {side}, {b - a} tokens")
            flags, text = (row[a:b] >> 31).tolist() + [0], ""
            cuts = [0, *(i for i in range(1, b - a) if flags[i] != flags[i - 1]), b - a]
            for x, y in zip(cuts, cuts[1:]):
                part = tokens.decode(row[a + x:a + y] & ID, pieces, -1, -1).decode("utf-8", "replace")
                text += colour[0] + part + colour[1] if flags[x] else part
            print(text)


# ---- Command line -------------------------------------------------------------------------------------------
def parse(argv):
    p = tokens.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("inputs", nargs="*", metavar="FILES")
    p.add_argument("--out", metavar="DIR", help="new or empty folder")
    p.add_argument("--stage", choices=["sft", "dpo"])
    p.add_argument("--tokenizer", metavar="bytes|PATH",
                   help="SentencePiece model, tiktoken ranks, tokenizer.json, tokenizer.bin, or a folder with one of them")
    p.add_argument("--tiktoken-pattern", choices=list(tokens.RANKS),
                   help="how tiktoken ranks split words (default: that of the "
                   "published file)")
    p.add_argument("--seq-len", type=int, default=0, metavar="S", help="of the training: rows hold S + 1 tokens")
    p.add_argument("--mask", choices=["completion", "assistant", "all"],
                   help="sft: what is trained: the last answer, every assistant "
                   "turn, or the whole text (default: assistant for messages, completion for prompt and completion or "
                   "instruction and output, all for text)")
    p.add_argument("--template", metavar="NAME|FILE",
                   help=f"{', '.join(TEMPLATES)}, or a Jinja file (default: the tokenizer's own: chat_template.jinja beside "
                   "it or in tokenizer_config.json)")
    p.add_argument("--max-length", type=int, default=0, metavar="N", help="most tokens of a document, for dpo of prompt and "
                   "one answer (default S + 1)")
    p.add_argument("--long", choices=["cut", "split", "drop"], default="cut",
                   help="a longer document keeps its first N tokens "
                   "(default), goes on in further documents (sft), or is left out")
    p.add_argument("--pack", choices=["on", "off"], default="on", help="off: one document or pair per row")
    p.add_argument("--special-text", choices=["text", "token"], default="text",
                   help="what becomes of text that spells a special "
                   "token inside a message: text (default), or the token, as transformers does unless told to sanitize")
    p.add_argument("--val-fraction", type=float, default=0.02, metavar="F",
                   help="share of rows (default 0.02; at least one of 20)")
    p.add_argument("--strict", choices=["on", "off"], nargs="?", const="on", default="off",
                   help="on: the first bad row is an error")
    p.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N",
                   help="a shard holds N tokens (default 100,000,000)")
    p.add_argument("--seed", type=int, default=1, help="of the train/validation split")
    p.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="worker processes")
    p.add_argument("--inspect", metavar="FILE", help="check a .ds shard and print its first rows, targets marked")
    p.add_argument("--rows", type=int, default=2, metavar="N", help="that --inspect prints (default 2)")
    args = p.parse_args(argv)
    if args.inspect:
        return args
    args.format, args.strict, args.max_length = "ds", args.strict == "on", args.max_length or args.seq_len + 1
    for option in ("out", "stage", "tokenizer", "inputs"):
        if not getattr(args, option):
            raise UserError(f"{'--' + option if option != 'inputs' else 'FILES'} is missing; see --help")
    if not 1 <= args.seq_len < 1 << 24:
        raise UserError("--seq-len S is missing or out of range (1 to 2^24)")
    if not 2 <= args.max_length <= args.seq_len + 1:
        raise UserError(f"--max-length {args.max_length}: a document has 2 to S + 1 = {args.seq_len + 1} tokens")
    if args.stage == "dpo" and (args.mask or args.long == "split"):
        raise UserError(f"{'--mask' if args.mask else '--long split'} is for --stage sft; a pair trains both its answers")
    if not 1 <= args.shard_tokens <= 1 << 30 or args.jobs < 1 or not 0 <= args.val_fraction < 1:
        raise UserError("out of range: --shard-tokens 1..2^30, --jobs >= 1, --val-fraction 0..1")
    return args


def main(argv):
    try:
        args = parse(argv)
        inspect(args.inspect, args.rows) if args.inspect else prepare(args)
        return 0
    except UserError as e:
        message = e
    except OSError as e:
        message = f"{e.filename}: {e.strerror}"
    except MemoryError:
        message = "out of memory; use a smaller --jobs"
    except KeyboardInterrupt:
        message = "interrupted; the same command starts again"
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
