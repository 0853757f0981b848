#!/usr/bin/env python3
"""Tests of data/chat.py.

    python3 data/test_chat.py             # all; the last line is "N passed, N failed"
    python3 data/test_chat.py pack masks  # only the tests whose name contains one of these words

The oracles are transformers (apply_chat_template: ids and assistant masks), TRL itself where it is installed and its
numbers in ../shared/data/oracle/trl, a packing by search through all packs, and rows worked out by hand.
"""
import bz2, contextlib, copy, gzip, importlib, importlib.util, json, lzma, os, random, re, signal, subprocess, sys, time

import test_tokens as base
from test_tokens import Skip, check, library, must, refused, run, save, sentencepiece_model, shared

HERE = os.path.dirname(os.path.abspath(__file__))
base.SCRIPT = os.path.join(HERE, "chat.py")
EOS, T, S = 256, 1 << 31, 1 << 30         # of the tokenizer `bytes`; flags


# ---- Reading the rows by other code than chat.py's ---------------------------------------------------------
def rows_of(out, split="train"):
    """-> rows of documents; a document is [(id, is it a target)]. Checks what data/README.md says of the format."""
    folder = os.path.join(out, split)
    if not os.path.exists(folder):
        return []
    with open(f"{folder}/metadata.json") as f:
        meta = json.load(f)
    width, rows = meta["sequence_length"] + 1, []
    for name in sorted(n for n in os.listdir(folder) if n.endswith(".ds")):
        with open(f"{folder}/{name}", "rb") as f:
            data = f.read()
        words = memoryview(data).cast("I")
        check(f"{name}: whole rows", len(words) % width == 0 and len(words))
        for at in range(0, len(words), width):
            row, docs = words[at:at + width].tolist(), []
            while row and row[-1] == S:
                row.pop()
            for w in row:
                if w & S:
                    docs.append([])
                docs[-1].append((w & 0xFFFFFF, bool(w & T)))
            good = all(any(t for _, t in d) and not d[0][1] for d in docs) and all(
                w & 0x3F000000 == 0 and w & 0xFFFFFF < meta["vocab_size"] for w in row)
            check(f"{name}: the rules of a row", good and docs and (meta["stage"] != "dpo" or len(docs) % 2 == 0),
                  at // width)
            rows.append(docs)
    docs = [d for r in rows for d in r]
    ours = {"total_sequences": len(rows), "total_tokens": len(rows) * width, "documents": len(docs), "token_size_bytes": 4,
            "documents_per_row": max(map(len, rows)), "targets": sum(t for d in docs for _, t in d),
            "document_tokens": sum(map(len, docs))}
    check(f"{split}: metadata.json", {k: meta[k] for k in ours} == ours, (meta, ours))
    return rows


def docs_of(out):
    return [d for split in ("train", "validation") for r in rows_of(out, split) for d in r]


def ids_of(doc):
    return [i for i, _ in doc]


def flags_of(doc):
    return [int(t) for _, t in doc]


def save_rows(path, rows):
    return save(path, "".join(json.dumps(r) + "\n" for r in rows))


def prepared(d, name, rows, *args, stage="sft", tokenizer="bytes", seq=256, pack="off"):
    """The documents of rows, in their order."""
    path = save_rows(f"{d}/{name}.jsonl", rows)
    must(path, "--stage", stage, "--tokenizer", tokenizer, "--seq-len", seq, "--pack", pack, "--val-fraction", 0, "--out",
         f"{d}/{name}", *args)
    return docs_of(f"{d}/{name}")


def in_process(rows, *args, stage="sft", tokenizer="bytes", seq=256):
    """The same without files: what a worker makes of each row."""
    chat = importlib.import_module("chat")
    argv = ["none.jsonl", "--stage", stage, "--tokenizer", tokenizer, "--seq-len", seq, "--out", "none", *args]
    preparer = chat.Preparer(chat.load(chat.parse(list(map(str, argv))))[0])
    words, lengths, *_ = preparer.batch([(0, True, True, "none.jsonl", i, "line", None, json.dumps(r).encode()) for i,
                                         r in enumerate(rows)])
    words, docs = memoryview(words).cast("I").tolist(), []
    for n in lengths:
        docs.append([(w & 0xFFFFFF, bool(w & T)) for w in words[:n]])
        check("a row begins with START and no target", words[0] >> 30 == 1)
        del words[:n]
    return docs


def counts(out):
    with open(f"{out}/chat.json") as f:
        return {k: v["rows"] for k, v in json.load(f)["counts"].items()}


def said(doc):
    """The bytes of the targets, EOS as $."""
    return "".join("$" if i == EOS else chr(i) for i, t in doc if t)


# ---- Tokenizers and templates to compare with -------------------------------------------------------------------
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>", "<|endoftext|>"]
THINK = ["<think>", "</think>"]        # known tokens that are not special
OTHERS = {    # templates as published, without marks; {% generation %} variants of the named ones are chat.py's own
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
             "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
             "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
             "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
             "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "zephyr of the handbook": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token "
                              "}}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
                              "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
                              "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "llama 2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
               "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
               "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + "
               "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
               "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
               "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "date and json": "{{- bos_token }}\n{%- set day = strftime_now('%d %b %Y') %}\n{{- 'Today: ' + day + '\n' }}\n"
                     "{%- for message in messages %}\n    {%- if not loop.first %}{{ '\n' }}{% endif %}\n"
                     "    {{- message | tojson(indent=1) }}\n    {%- if loop.index > 40 %}{% break %}{% endif %}\n{%- endfor %}\n"
                     "{%- set ns = namespace(found=false) %}{%- if add_generation_prompt %}{{- dict(role='assistant') | tojson }}{% endif %}",
}


def chats(n=60, seed=5, system=True):
    rng = random.Random(seed)
    words = ("the cat sat on a mat and 1234 3.14 don't WE'LL naïve Straße 東京 привет 😀 e\u0301 <b> & \" ' x=1; \t \u00a0 [INST] {{x}} "
             "{% if %} <|user|> \\n \n\n").split(" ")
    text = lambda: "".join(rng.choice(words) + rng.choice([" ", " ", "  ", "\n", ""]) for _ in range(rng.randint(1,
        25))) + "."
    out = []
    for _ in range(n):
        messages = [{"role": "system", "content": text()}] if system and rng.random() < 0.4 else []
        for _ in range(rng.randint(1, 4)):
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        out.append(messages)
    return out


def chat_tokenizers(d):
    """(name, folder with tokenizer.json, its transformers tokenizer): byte-level BPE with a BOS, and SentencePiece's rules."""
    tk, transformers = library("tokenizers"), library("transformers")
    corpus = [m["content"] for c in chats(100, 1) for m in c] + ["user assistant system"] * 5
    level = tk.Tokenizer(tk.models.BPE())
    level.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    level.decoder = tk.decoders.ByteLevel()
    level.train_from_iterator(corpus, tk.trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIALS, show_progress=False,
                                                             initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet()))
    level.post_processor = tk.processors.Sequence([tk.processors.ByteLevel(trim_offsets=True),
                                                   tk.processors.TemplateProcessing(
        "<s> $A", None, [("<s>", 1)])])
    spaces = tk.Tokenizer(tk.models.BPE(byte_fallback=True, unk_token="<unk>"))
    spaces.pre_tokenizer = tk.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spaces.decoder = tk.decoders.Metaspace(prepend_scheme="first", split=False)
    spaces.train_from_iterator(corpus, tk.trainers.BpeTrainer(vocab_size=1200, show_progress=False, special_tokens=SPECIALS +
                                                              [
        "<0x%02X>" % i for i in range(256)]))
    spaces.post_processor = tk.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    for name, tok in (("byte level", level), ("metaspace", spaces)):
        tok.add_tokens(THINK)
        folder = f"{d}/{name.replace(' ', '_')}"
        os.makedirs(folder, exist_ok=True)
        tok.save(f"{folder}/tokenizer.json")
        with open(f"{folder}/tokenizer.json") as f:
            spec = json.load(f)
        for t in spec["added_tokens"]:       # the bytes are no special tokens
            t["special"] = t["content"] in SPECIALS
        spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in SPECIALS + THINK]
        save(f"{folder}/tokenizer.json", json.dumps(spec))
        save(f"{folder}/tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
                                                            "eos_token":
             {"content": "</s>", "__type": "AddedToken"}, "unk_token": "<unk>", "clean_up_tokenization_spaces": False}))
        yield name, folder, transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def templates():
    chat = importlib.import_module("chat")
    yield from chat.TEMPLATES.items()
    yield from OTHERS.items()
    found = importlib.util.find_spec("trl")        # as published, and with marks; read as files, not imported
    folder = found and os.path.join(list(found.submodule_search_locations)[0], "chat_templates")
    for name in sorted(os.listdir(folder)) if folder and os.path.isdir(folder) else ():
        if name.endswith(".jinja"):
            with open(os.path.join(folder, name), encoding="utf-8") as f:
                yield name, f.read()


# ---- Rendering, against transformers ------------------------------------------------------------------------------
def test_rendering_equals_transformers(d):
    jinja, rows, seen = library("jinja2"), chats(), 0
    for tname, folder, tok in chat_tokenizers(d):
        for name, text in templates():
            marked = re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None
            want = []
            for messages in rows:
                try:
                    e = tok.apply_chat_template(messages, chat_template=text, return_dict=True,
                                                return_assistant_tokens_mask=marked)
                except (jinja.exceptions.TemplateError, TypeError, ValueError):
                    continue
                mask = e["assistant_masks"] if marked else [1] * len(e["input_ids"])
                if any(mask[1:]):
                    want.append([(i, bool(m and k)) for k, (i, m) in enumerate(zip(e["input_ids"], mask))])
            if not want:
                continue
            seen += 1
            got = in_process([{"messages": m} for m in rows], "--template", save(f"{d}/t.jinja", text), "--mask",
                             "assistant" if marked else "all", tokenizer=folder, seq=8191)
            bad = next((k for k, (a, b) in enumerate(zip(got, want)) if a != b), None)
            check(f"{tname}, {name}: ids{' and mask' * marked}", got == want, (len(got), len(want), bad))
    check("templates compared", seen >= 18, seen)


def test_what_transformers_then_reads(d):
    """The folder beside the rows, with AutoTokenizer, gives a prompt the ids that were trained."""
    auto, rows = library("transformers").AutoTokenizer, chats(20, 8)
    found = [("mistral", sentencepiece_model(d)), ("bytes", "bytes"), ("folder", next(chat_tokenizers(d))[1])]
    with contextlib.suppress(Skip):
        found.append(("gpt2", shared("tokenizers/r50k_base.tiktoken")))
    for name, path in found:
        for template in ("mistral", "llama3", "chatml", "zephyr", "alpaca"):
            got = prepared(d, f"{name}_{template}", [{"messages": m} for m in rows], "--template", template, tokenizer=path,
                           seq=4095)
            tok = auto.from_pretrained(f"{d}/{name}_{template}/train")
            want = [tok.apply_chat_template(m)["input_ids"] for m in rows]
            check(f"{name}, {template}: AutoTokenizer gives the trained ids", list(map(ids_of, got)) == want)
            answers = [m[-1]["content"].strip() if template == "llama3" else m[-1]["content"] for m in rows]
            # the answer and its end mark are what is trained, up to the token that reaches into it from the left
            texts = [tok.decode([i for i, t in doc if t]) for doc in got]
            check(f"{name}, {template}: the answers are trained", name == "bytes" or all(
                a[1:].replace("\u2581", " ") in t for a, t in zip(answers, texts)))


def test_special_tokens_in_messages(d):
    """Special tokens that a user writes stay text, as with sanitize_control_tokens; or not, by choice."""
    rows = chats(40, 3)
    rng = random.Random(2)
    for messages in rows:
        for m in messages:
            if rng.random() < 0.5:
                at = rng.randint(0, len(m["content"]))
                m["content"] = m["content"][:at] + rng.choice(["</s>", "<s>", " </s> ", "<|im_end|>", "</s></s>",
                                                               "<think>a</think>",
                                                               "\U000f0000", "</s\U000f0001>"]) + m["content"][at:]
    chatml = dict(templates())["chatml"]
    unmarked = re.sub(r"\{% (end)?generation %\}", "", chatml)
    for name, folder, tok in chat_tokenizers(d):
        for choice, sane in (("text", True), ("token", False)):
            tok.chat_control_tokens = []          # only special ones: <think> is a token wherever it stands
            want = [tok.apply_chat_template(m, chat_template=unmarked, sanitize_control_tokens=sane and any(
                s in x["content"] for x in m for s in SPECIALS))["input_ids"] for m in rows]
            out = f"{name}_{choice}".replace(" ", "_")
            got = prepared(d, out, [{"messages": m} for m in rows], "--template", "chatml", "--special-text", choice,
                           tokenizer=folder, seq=4095)
            bad = [(m, a, b) for m, a, b in zip(rows, map(ids_of, got), want) if a != b]
            check(f"{name}: special text as {choice}", not bad and len(got) == len(want), bad[:1])
            check(f"{name}: counted", any("spells a special token" in k for k in counts(f"{d}/{out}")))
            ends = [sum(i == 4 for i in ids_of(doc)) for doc in got]
            check(f"{name}: {choice}: one end mark per turn", (ends == [len(m) for m in rows]) == sane)


# ---- Masks ------------------------------------------------------------------------------------------------------
def test_masks_by_hand(d):
    """bytes, so that every token can be read."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ab"}, {"role": "user", "content": "r"},
            {"role": "assistant", "content": "c"}]
    t = save(f"{d}/t.jinja", "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + eos_token }}{% endfor %}"
                             "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}")
    marked = save(f"{d}/m.jinja", "{% for m in messages %}{{ '<' + m.role[0] + '>' }}{% if m.role == 'assistant' %}{% generation %}"
                                  "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
                                  "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}")
    for name, template in (("prefix", t), ("marks", marked)):
        for mask, want in (("", "ab$c$"), ("assistant", "ab$c$"), ("completion", "c$"), ("all", "u>q$<a>ab$<u>r$<a>c$")):
            more = ("--mask", mask) if mask else ()
            doc, = in_process([{"messages": chat}], "--template", template, *more)
            check(f"{name} --mask {mask}", said(doc) == want, said(doc))
        w = [dict(chat[0], loss_weight=1.0), dict(chat[1], loss_weight=0.0), dict(chat[2], weight=1), dict(chat[3], weight=1)]
        doc, = in_process([{"messages": w}], "--template", template)
        check(f"{name}: a weight of 0", said(doc) == "c$", said(doc))
    for row, mask, want in (({"prompt": "xy", "completion": "zw"}, "", "zw$"),
                            ({"prompt": "xy", "completion": "zw<|endoftext|>"}, "", "zw$"),
                            ({"prompt": "xy", "completion": "zw"}, "all", "yzw$"), ({"prompt": "", "completion": "zw"}, "",
                                "w$"),
                            ({"text": "abc"}, "", "bc$"), ({"text": "abc<|endoftext|>"}, "", "bc$"),
                            ({"input_ids": [9, 8, 7, 6], "labels": [-100, -100, 7, -100]}, "", "\x07"),
                            ({"input_ids": [9, 8, 7], "labels": [9, 8, 7]}, "", "\x08\x07"),
                            ({"input_ids": [9, 8, 7]}, "", "\x08\x07"),
                            ({"input_ids": [9, 8, 7, 6], "completion_mask": [0, 1, 1, 0], "assistant_masks": [1, 1, 0, 1]},
                             "", "\x08"),
                            ({"input_ids": [0, 0, 9, 8], "attention_mask": [0, 0, 1, 1]}, "", "\x08")):
        doc, = in_process([row], *(("--mask", mask) if mask else ()))
        check(f"{row} {mask}", said(doc) == want and not doc[0][1], said(doc))
    doc, = prepared(d, "three", [{"input_ids": [65, 66, 67], "labels": [-100, -100, 67]}], seq=4)
    raw = open(f"{d}/three/train/train_000.ds", "rb").read()
    check("three tokens, by hand", list(memoryview(raw).cast("I")) == [S | 65, 66, T | 67, S, S])


def test_masks_by_prefix(d):
    """Without marks the same tokens are trained as with them, and as a search of tokenized prefixes finds."""
    chat, rows, compared = importlib.import_module("chat"), chats(40, 9), 0
    for tname, folder, tok in chat_tokenizers(d):
        for name, text in chat.TEMPLATES.items():
            bare = re.sub(r"\{% (end)?generation %\}", "", text)
            some = [m for m in rows if name not in ("mistral",) or m[0]["role"] != "system"]
            with_marks = in_process([{"messages": m} for m in some], "--template", name, tokenizer=folder, seq=4095)
            without = in_process([{"messages": m} for m in some], "--template", save(f"{d}/b.jinja", bare),
                               tokenizer=folder, seq=4095)
            # at most the mark between turns differs: the newlines that alpaca writes after an answer
            check(f"{tname}, {name}: ids", list(map(ids_of, without)) == list(map(ids_of, with_marks)))
            if name != "alpaca" and tname != "byte level":      # with its trimmed offsets a last newline is no part of the marks
                check(f"{tname}, {name}: marks = prefix", without == with_marks)
            for m, doc in zip(some, without):
                ids, want, whole = ids_of(doc), [0] * len(doc), True
                for i, x in enumerate(m):
                    if x["role"] == "assistant":
                        heads = [tok.apply_chat_template(m[:k], chat_template=bare, add_generation_prompt=g)["input_ids"]
                                 for k, g in
                                 ((i, True), (i + 1, False))]
                        whole &= all(ids[:len(h)] == h for h in heads)
                        want[len(heads[0]):len(heads[1])] = [1] * (len(heads[1]) - len(heads[0]))
                if whole:      # GPT-2's words split "\n\n" otherwise before a letter than at the end
                    check(f"{tname}, {name}: prefix = tokenized prefixes", flags_of(doc) == want)
                compared += whole
    check("tokenized prefixes compared", compared > 200, compared)
    # a template that writes an empty think block into the last turn only, as Qwen3's does
    think = save(f"{d}/think.jinja", "{% for m in messages %}{{ '<' + m.role[0] + '>' }}{% if m.role == 'assistant' and loop.last %}{{ '~~' }}"
                                     "{% endif %}{{ m.content + '$\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<a>' }}{% endif %}")
    doc, = prepared(d, "think", [{"messages": [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2,
        "qarb")]}],
                    "--template", think)
    check("turns that are written otherwise when they are last", said(doc) == "a$\n~~b$\n", said(doc))
    odd = save(f"{d}/odd.jinja", "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    refused("a template whose turns cannot be found", ["not found in the rendered text", "{% generation %}"],
            save_rows(f"{d}/x.jsonl", [{"messages": chats(1)[0]}]), "--stage", "sft", "--tokenizer", "bytes", "--seq-len",
            999, "--template",
            odd, "--out", f"{d}/odd")


def test_prompt_is_no_token_prefix(d):
    """"ab" + "c": where the library joins the border, the joined token belongs to the answer, and it is counted."""
    rows = [{"prompt": "Once upon", "completion": " a time"}, {"prompt": "Hello wor", "completion": "ld there"}]
    model, sp = sentencepiece_model(d), library("sentencepiece")
    sp = sp.SentencePieceProcessor(model_file=model)
    got = prepared(d, "o", rows, tokenizer=model)
    for row, doc in zip(rows, got):
        whole, prompt = [1] + sp.encode(row["prompt"] + row["completion"]) + [2], [1] + sp.encode(row["prompt"])
        n = next((i for i, (a, b) in enumerate(zip(whole, prompt)) if a != b), len(prompt))
        check("ids of the whole", ids_of(doc) == whole, (ids_of(doc), whole))
        check("the border", flags_of(doc) == [0] * n + [1] * (len(whole) - n))
    n = counts(f"{d}/o").get("prompts shortened, their end joins the answer", 0)
    check("counted", n == sum(sp.encode(r["prompt"]) != sp.encode(r["prompt"] +
                                                                  r["completion"])[:len(sp.encode(r["prompt"]))]
                                                                  for r in rows) > 0)


def test_bos_and_eos(d):
    """Exactly one BOS, also where the text has it; a trained EOS in each document that is not cut."""
    model, rng = sentencepiece_model(d), random.Random(4)
    rows = [{"prompt": rng.choice(["", "<s>"]) + "Say it.", "completion": " word" * rng.randint(1, 30) + rng.choice(["",
        "</s>"])} for _ in range(80)]
    docs = prepared(d, "o", rows, tokenizer=model, seq=20)
    check("one BOS", all(ids_of(x).count(1) == 1 and x[0][0] == 1 for x in docs))
    c = counts(f"{d}/o")
    check("trained EOS = documents not cut", sum((2, True) in x for x in docs) == len(docs) - c["documents cut to 21 tokens"])
    check("and none twice", all(ids_of(x).count(2) < 2 for x in docs))
    check("EOS lost is counted", c["documents that lost their EOS to the cut"] == c["documents cut to 21 tokens"] > 0)
    docs = prepared(d, "chat", [{"messages": m} for m in chats(30)], "--template", "llama3", tokenizer=model, seq=4095)
    check("a template's BOS is the only one", all(ids_of(x).count(1) == 1 for x in docs))


# ---- Forms ------------------------------------------------------------------------------------------------------
def test_forms(d):
    t = save(f"{d}/t.jinja", "{% if tools %}{{ tools | length }}{% endif %}{{ flag if flag is defined else '' }}"
                             "{% for m in messages %}{{ m.role[0] + ':' + (m.content if m.content is defined else '') + (m.tool_calls|tojson "
                             "if m.tool_calls is defined else '') + '|' }}{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}")
    u, a, s = ({"role": r, "content": c} for r, c in (("user", "Q"), ("assistant", "A"), ("system", "Y")))
    sft = [({"messages": [u, a]}, "u:Q|a:A|"), ([u, a], "u:Q|a:A|"), ({"messages": [s, u, a, u, a]}, "s:Y|u:Q|a:A|u:Q|a:A|"),
           ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "Y"},
            "s:Y|u:Q|a:A|"),
           ({"conversations": [u, a]}, "u:Q|a:A|"),
           ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "value": "R"}]}, a]},
            "u:QR|a:A|"),
           ({"messages": [u, {"role": "assistant", "content": None, "tool_calls": [{"f": 1}]}, {"role": "tool",
               "content": "T"}, a]},
            'u:Q|a:[{"f": 1}]|t:T|a:A|'),
           ({"messages": [u, a], "tools": '[{"name": "x"}]', "chat_template_kwargs": {"flag": "F"}}, "1Fu:Q|a:A|"),
           ({"instruction": "Q", "input": "", "output": "A"}, "u:Q|a:A|"), ({"instruction": "Q", "input": "I", "output": "A"},
                                                                            "u:Q\nI|a:A|"),
           ({"instruction": "Q", "output": "A", "system": "Y", "history": [["H", "K"]]}, "s:Y|u:H|a:K|u:Q|a:A|"),
           ({"prompt": [u], "completion": [a]}, "u:Q|a:A|"), ({"prompt": [s, u], "completion": a}, "s:Y|u:Q|a:A|"),
           ({"prompt": "Q", "completion": [a]}, "u:Q|a:A|"), ({"messages": [u, a], "prompt": "Q", "score": 3}, "u:Q|a:A|"),
           ({"prompt": "Q:", "completion": "A", "score": [1]}, "Q:A$"), ({"text": "T", "meta": {}}, "T$")]
    docs = prepared(d, "sft", [r for r, _ in sft], "--template", t)
    text = lambda doc: "".join("$" if i == EOS else chr(i) for i in ids_of(doc))
    for (row, want), doc in zip(sft, docs):
        check(f"sft {row}", text(doc) == want, text(doc))
    check("sft: every form", len(docs) == len(sft))
    b, hg = {"role": "assistant", "content": "B"}, lambda v: {"from": "gpt", "value": v}
    dpo = [({"prompt": "Q", "chosen": "A", "rejected": "B"}, "Q", "A$", "B$"), ({"prompt": "Q", "chosen": "A<|endoftext|>",
        "rejected": "B"}, "Q", "A$", "B$"),
           ({"chosen": "Hi there X", "rejected": "Hi there Y", "score_chosen": 1}, "Hi there", " X$", " Y$"),
           ({"chosen": "ab", "rejected": "abc"}, "a", "b$", "bc$"),
           ({"prompt": [u], "chosen": [a], "rejected": [b]}, "u:Q|a:", "A|", "B|"), ({"chosen": [u, a], "rejected": [u, b]},
               "u:Q|a:", "A|", "B|"),
           ({"chosen": [s, u, a, u, a], "rejected": [s, u, a, u, b]}, "s:Y|u:Q|a:A|u:Q|a:", "A|", "B|"),
           ({"prompt": "Q", "chosen": [u, a], "rejected": [u, b], "score_chosen": 8.0}, "u:Q|a:", "A|", "B|"),
           ({"prompt": "Q", "chosen": a, "rejected": b, "system": "Y"}, "s:Y|u:Q|a:", "A|", "B|"),
           ({"conversations": [{"from": "human", "value": "Q"}], "chosen": hg("A"), "rejected": hg("B")}, "u:Q|a:", "A|",
            "B|"),
           ({"messages": [u], "chosen": "A", "rejected": "B"}, "u:Q|a:", "A|", "B|"),
           ({"instruction": "Q", "input": "I", "chosen": "A", "rejected": "B"}, "u:Q\nI|a:", "A|", "B|"),
           ({"chosen_messages": [u, a], "rejected_messages": [u, b]}, "u:Q|a:", "A|", "B|"),
           ({"prompt_ids": [81], "chosen_ids": [65, 36], "rejected_ids": [66]}, "Q", "A$", "B")]
    docs = prepared(d, "dpo", [r[0] for r in dpo], "--template", t, stage="dpo")
    check("dpo: every form", len(docs) == 2 * len(dpo), len(docs))
    for k, (row, prompt, *sides) in enumerate(dpo):
        for doc, side in zip(docs[2 * k:2 * k + 2], sides):
            check(f"dpo {row}", text(doc) == prompt + side and said(doc) == side, (text(doc), said(doc)))


def test_files(d):
    rows = [{"prompt": f"p{i}", "completion": "x" * (i % 7 + 1) + "é東"} for i in range(300)]
    lines, out = "".join(json.dumps(r, ensure_ascii=i % 2 == 0) + "\n" for i, r in enumerate(rows)).encode(), {}
    files = {"a.jsonl": lines, "b.ndjson": lines, "c.json": lines, "d.json": json.dumps(rows, indent=1).encode(),
             "e.json": json.dumps(rows, ensure_ascii=False).encode(), "f.jsonl.gz": gzip.compress(lines),
             "g.json.xz": lzma.compress(
                 json.dumps(rows).encode()), "h.jsonl.bz2": bz2.compress(lines), "bom.jsonl": b"\xef\xbb\xbf" + lines,
             "i.json": b"[\n" + b",\n".join(lines.splitlines()) + b"\n]\n"}
    with contextlib.suppress(Skip):
        files["z.jsonl.zst"] = library("zstandard").ZstdCompressor().compress(lines)
    for name, data in files.items():
        must(save(f"{d}/{name}", data), "--stage", "sft", "--tokenizer", "bytes", "--seq-len", 40, "--val-fraction", 0,
             "--out", f"{d}/o_{name}")
        out[name] = open(f"{d}/o_{name}/train/train_000.ds", "rb").read()
    with contextlib.suppress(Skip):
        arrow, parquet = library("pyarrow"), library("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist([dict(r, score=1.5, emb=[0.5]) for r in rows]), f"{d}/p.parquet",
                            row_group_size=77)
        must(f"{d}/p.parquet", "--stage", "sft", "--tokenizer", "bytes", "--seq-len", 40, "--val-fraction", 0, "--out",
             f"{d}/o_p")
        out["p.parquet"] = open(f"{d}/o_p/train/train_000.ds", "rb").read()
        with library("pyarrow.ipc").new_stream(f"{d}/s.arrow", arrow.Table.from_pylist(rows).schema) as f:
            f.write_table(arrow.Table.from_pylist(rows))
        must(f"{d}/s.arrow", "--stage", "sft", "--tokenizer", "bytes", "--seq-len", 40, "--val-fraction", 0, "--out", f"{d}/o_s")
        out["s.arrow"] = open(f"{d}/o_s/train/train_000.ds", "rb").read()
        chat = [{"messages": [{"role": "user", "content": "a", "tool_calls": None}, {"role": "assistant",
            "content": "b"}]}] * 3
        parquet.write_table(arrow.Table.from_pylist(chat), f"{d}/m.parquet")
        must(f"{d}/m.parquet", "--stage", "sft", "--tokenizer", "bytes", "--template", "chatml", "--seq-len", 90, "--out",
             f"{d}/o_m", "--strict")
        refused("no column known", ["m2.parquet", "no column", "other"], save_parquet(f"{d}/m2.parquet", [{"other": 1}]),
                "--stage", "sft",
                "--tokenizer", "bytes", "--seq-len", 9, "--out", f"{d}/o_m2")
    for name, more in (("j1.json", b"\n" + json.dumps(rows).encode()), ("j2.json", b", {")):      # cat a.json b.json
        refused("a list, and more", [name, "after the list"], save(f"{d}/{name}", json.dumps(rows, indent=1).encode() + more),
                "--stage", "sft", "--tokenizer", "bytes", "--seq-len", 40, "--out", f"{d}/o_{name}")
    check("every file gives the same rows", len(set(out.values())) == 1 and len(out) >= 10, {k: len(v) for k,
        v in out.items()})
    one = lines.splitlines(True)
    must(save(f"{d}/in/1.jsonl", b"".join(one[:100])), save(f"{d}/in/2.jsonl", b"".join(one[100:])), "--stage", "sft",
         "--tokenizer", "bytes",
         "--seq-len", 40, "--val-fraction", 0, "--out", f"{d}/two")
    check("two files", open(f"{d}/two/train/train_000.ds", "rb").read() == out["a.jsonl"])
    must(f"{d}/in", "--stage", "sft", "--tokenizer", "bytes", "--seq-len", 40, "--val-fraction", 0, "--out", f"{d}/dir")
    check("a folder", open(f"{d}/dir/train/train_000.ds", "rb").read() == out["a.jsonl"])
    big = [{"prompt": "q", "completion": "w" * n} for n in (3 << 20, 10, (1 << 20) - 30,
                                                            5)]        # larger than what is read at a time
    must(save(f"{d}/big.json", json.dumps(big)), "--stage", "sft", "--tokenizer", "bytes", "--seq-len", 40, "--val-fraction",
         0, "--pack", "off",
         "--out", f"{d}/big")
    check("large items of a list", [len(x) for x in docs_of(f"{d}/big")] == [41, 12, 41, 7])
    wide = ["é東😀" * 5000] * 200        # characters across the border of a read
    must(save(f"{d}/wide.json", json.dumps([{"text": t} for t in wide], ensure_ascii=False)), "--stage", "sft", "--tokenizer",
         "bytes", "--seq-len", 40,
         "--val-fraction", 0, "--out", f"{d}/wide", "--strict")
    for name, data, words in (("cut.json", json.dumps(rows)[:-9], ["cut.json:1", "list"]), ("cut2.json", json.dumps(rows,
        indent=1)[:900], ["cut2.json:"]),
                              ("cut.jsonl.gz", gzip.compress(lines)[:-9], ["cut.jsonl.gz", "damaged"]), ("t.txt", "hello",
                                  ["t.txt", "plain text"]),
                              ("utf16.jsonl", lines.decode().encode("utf-16"), ["UTF-16"]), ("empty.jsonl", b"", ["no row"])):
        refused(name, words, save(f"{d}/{name}", data), "--stage", "sft", "--tokenizer", "bytes", "--seq-len", 40, "--out",
                f"{d}/o_{name}")


def save_parquet(path, rows):
    library("pyarrow.parquet").write_table(library("pyarrow").Table.from_pylist(rows), path)
    return path


BAD = [  # what is wrong, the line, the reason
    (b'{"prompt": "x"', "not JSON"), (b'{"prompt": "\xff", "completion": "y"}', "not UTF-8"), (b'"x"', "not an object"),
    (b"7", "not an object"),
    (b'{"prompt": "\\ud800", "completion": "y"}', "not UTF-8"), (b'{"prompt": "x"}', "a missing field"), (b'{"a": 1}',
        "no known fields"),
    (b'{"prompt": "x", "completion": ""}', "an empty answer"), (b'{"prompt": "x", "completion": " \\n"}', "an empty answer"),
    (b'{"prompt": "x", "completion": 5}', "a field of another kind"), (b'{"text": "  "}', "an empty text"), (b'{"text": 5}',
        "a field of another kind"),
    (b'{"messages": []}', "an empty conversation"), (b'{"messages": "hi"}', "a field of another kind"), (b'{"messages": [1]}',
        "a field of another kind"),
    (b'{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
    (b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}', "an empty answer"),
    (b'{"messages": [{"role": "user", "content": "x"}, {"role": "wizard", "content": "y"}]}', "an unknown role"),
    (b'{"messages": [{"role": ["user"], "content": "x"}, {"role": "assistant", "content": "y"}]}', "an unknown role"),
    (b'{"messages": [{"content": "x"}, {"role": "assistant", "content": "y"}]}', "a message lacks its role"),
    (b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "y"}]}', "a message lacks its content"),
    (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "y"}]}',
     "content that is not text"),
    (b'{"messages": [{"role": "system", "content": "x"}, {"role": "system", "content": "x"}, {"role": "user", "content": "x"}, '
     b'{"role": "assistant", "content": "y"}]}', "two system turns"),
    (b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}', "the template refuses it"),
    (b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "loss_weight": 0}]}',
     "no target"),
    (b'{"instruction": "x"}', "a missing field"), (b'{"prompt": "' + b"x" * 60 + b'", "completion": "y"}',
                                                   "the prompt fills the row"),
    (b'{"input_ids": [1, 2], "labels": [-100, -100]}', "no target"), (b'{"input_ids": [1, 2], "labels": [1]}',
                                                                      "a field of another kind"),
    (b'{"input_ids": [1, 2], "labels": [2, 1]}', "labels that are neither -100 nor the token"), (b'{"input_ids": [1, 999]}',
        "token ids outside the vocabulary"),
    (b'{"input_ids": [1, 2], "labels": [-100, 1' + b"0" * 30 + b']}', "a field of another kind"),
    (b'{"input_ids": [1, -1]}', "token ids outside the vocabulary"), (b'{"input_ids": []}', "no target"),
    (b'{"input_ids": [5]}', "no target"),
    (b'{"input_ids": [1, 2.5]}', "a field of another kind"), (b"[" * 100000, "not JSON"),
    (b'{"chosen": "a", "rejected": "b"}', "no known fields"),
]
BAD_PAIRS = [
    (b'{"prompt": "x", "chosen": "a"}', "a missing field"), (b'{"prompt": "x"}', "no known fields"),
    (b'{"prompt": "x", "chosen": "a", "rejected": "a"}',
     "an answer equals its rejection"), (b'{"chosen": "a b", "rejected": "a b"}', "an answer equals its rejection"),
    (b'{"prompt": "x", "chosen": "", "rejected": "a"}', "an empty answer"),
    (b'{"prompt": "x", "chosen": "a", "rejected": " "}', "an empty answer"),
    (b'{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}',
     "no prompt before the answers"),
    (b'{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}], "rejected": [{"role": "user", "content": "a"}, '
     b'{"role": "assistant", "content": "a"}]}', "an answer equals its rejection"),
    (b'{"prompt": "' + b"x" * 60 + b'", "chosen": "a", "rejected": "b"}', "the prompt fills the row"),
    (b'{"prompt": "' + b"x" * 22 + b'", "chosen": "' + b"a" * 9 + b'", "rejected": "' + b"b" * 9 + b'"}',
     "the prompt fills half the row"),
    (b'{"prompt": "", "chosen": "' + b"a" * 40 + b'b", "rejected": "' + b"a" * 40 + b'c"}',
     "the answers are equal after the cut"),
    (b'{"prompt_ids": [1], "chosen_ids": [2]}', "a missing field"),
    (b'{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": []}', "an empty answer"),
    (b'{"prompt_ids": [], "chosen_ids": [2], "rejected_ids": [3]}', "no target"), (b'{"text": "x"}', "no known fields"),
]


def test_bad_rows(d):
    good = {"sft": b'{"prompt": "x", "completion": "y"}', "dpo": b'{"prompt": "x", "chosen": "a", "rejected": "b"}'}
    for stage, bad in (("sft", BAD), ("dpo", BAD_PAIRS)):
        path = save(f"{d}/{stage}.jsonl", b"".join(good[stage] + b"\n" + line + b"\n" for line, _ in bad))
        text = must(path, "--stage", stage, "--tokenizer", "bytes", "--template", "mistral", "--seq-len", 40,
                    "--val-fraction", 0, "--out", f"{d}/{stage}")
        c = {k[9:]: v for k, v in counts(f"{d}/{stage}").items() if k.startswith("dropped: ")}
        want = {}
        for _, reason in bad:
            want[reason] = want.get(reason, 0) + 1
        check(f"{stage}: counts per reason", c == want, {k: (c.get(k), want.get(k)) for k in c.keys() | want.keys()
                                                         if c.get(k) != want.get(k)})
        check(f"{stage}: the good rows are there", len(docs_of(f"{d}/{stage}")) == len(bad) * (2 if stage == "dpo" else 1))
        for k, (line, reason) in enumerate(bad):
            first = next(i for i, (_, r) in enumerate(bad) if r == reason)
            check(f"{stage}: {reason} is named with its place", f"dropped: {reason}; first {path}:{2 * first + 2}" in text,
                  text)
            if k == first:
                refused(f"{stage} --strict: {reason}", [f"one.jsonl:2: {reason}"], save(f"{d}/one.jsonl", good[stage] +
                    b"\n" + line + b"\n"), "--stage",
                        stage, "--tokenizer", "bytes", "--template", "mistral", "--seq-len", 40, "--out", f"{d}/x{stage}",
                        "--strict", "on")
    refused("nothing is left", ["no row", "1 an empty answer", "none.jsonl:1"], save(f"{d}/none.jsonl",
        '{"prompt": "x", "completion": ""}'), "--stage", "sft",
            "--tokenizer", "bytes", "--seq-len", 40, "--out", f"{d}/none")
    huge = save(f"{d}/huge.jsonl", b'{"prompt": "x", "completion": "' + b"y" * (70 << 20) + b'"}\n' + good["sft"] + b"\n")
    text = must(huge, "--stage", "sft", "--tokenizer", "bytes", "--seq-len", 40, "--val-fraction", 0, "--out", f"{d}/huge")
    check("one huge line", "a line longer than 64 MiB; first" in text and len(docs_of(f"{d}/huge")) == 1, text)
    with contextlib.suppress(Skip):
        arrow, parquet = library("pyarrow"), library("pyarrow.parquet")
        texts = arrow.Array.from_buffers(arrow.string(), 2, [None, arrow.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"),
                                                             arrow.py_buffer(b"\xff\xfeok")])
        parquet.write_table(arrow.table({"text": texts}), f"{d}/p.parquet")
        text = must(f"{d}/p.parquet", "--stage", "sft", "--tokenizer", "bytes", "--seq-len", 9, "--out", f"{d}/p")
        check("parquet that is not UTF-8", "not UTF-8; first" in text and "row 1" in text and len(docs_of(f"{d}/p")) == 1,
              text)


def test_lone_surrogates(d):
    rows = [{"prompt": "x", "completion": "\ud800"}, {"prompt": "x", "completion": "y"}]
    for name, folder, _ in chat_tokenizers(d):
        check(f"{name}: text that is no text is dropped, not the run", len(in_process(rows, tokenizer=folder)) == 1)


# ---- Lengths -----------------------------------------------------------------------------------------------------
def test_long(d):
    ids = list(range(1, 101))
    labels = [-100] * 30 + ids[30:60] + [-100] * 40
    row, short = {"input_ids": ids, "labels": labels}, {"input_ids": [7, 8]}
    cut = prepared(d, "cut", [row, short], seq=39)
    check("cut", [(len(x), sum(flags_of(x))) for x in cut] == [(40, 10), (2, 1)] and ids_of(cut[0]) == ids[:40])
    split = prepared(d, "split", [row, short], "--long", "split", seq=39)
    check("split", [ids_of(x) for x in split] == [ids[:40], ids[40:80], [7, 8]] and [sum(flags_of(x)) for x in split] == [10,
        19, 1],
          [(len(x), sum(flags_of(x))) for x in split])
    check("split: a piece without a target is counted", counts(f"{d}/split")["pieces without a target"] == 1)
    check("drop", [ids_of(x) for x in prepared(d, "drop", [row, short], "--long", "drop", seq=39)] == [[7, 8]])
    check("--max-length", [len(x) for x in prepared(d, "max", [row, short], "--max-length", 35, seq=39)] == [35, 2])
    pairs = [{"prompt_ids": [1] * p, "chosen_ids": [2] * c, "rejected_ids": [3] * r} for p, c, r in
             ((5, 10, 10), (5, 40, 6), (5, 6, 40), (5, 30, 40), (19, 30, 30), (4, 16, 16), (5, 3, 60))]
    docs = prepared(d, "pairs", pairs, stage="dpo", seq=39)
    check("pairs are cut so that they fit", [len(x) for x in docs] == [15, 15, 29, 11, 11, 29, 20, 20, 20, 20, 20, 20, 8, 32],
          [len(x) for x in docs])
    check("prompt and answer", all(sum(flags_of(x)) == len(x) - p["prompt_ids"].__len__() for x, p in zip(docs[::2], pairs)))
    docs = prepared(d, "pairs_max", pairs, "--max-length", 16, stage="dpo", seq=39)
    check("pairs --max-length", [len(x) for x in docs] == [15, 15, 16, 11, 11, 16, 16, 16, 16, 16, 8, 16],
          [len(x) for x in docs])
    check("pairs --max-length: dropped", counts(f"{d}/pairs_max")["dropped: the prompt fills the row"] == 1)
    docs = prepared(d, "pairs_drop", pairs, "--long", "drop", stage="dpo", seq=39)
    check("pairs --long drop", [len(x) for x in docs] == [15, 15, 20, 20], [len(x) for x in docs])


# ---- Packing -----------------------------------------------------------------------------------------------------
def best_fit_by_search(lengths, room):
    """The rule, word by word: (free, since when) of every open pack is looked at."""
    packs, clock = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [p for p in packs if p["free"] >= lengths[i]]
        p = min(fits, key=lambda p: (p["free"], p["since"])) if fits else {"free": room, "docs": []}
        if not fits:
            packs.append(p)
        clock += 1
        p["free"], p["since"] = p["free"] - lengths[i], clock
        p["docs"].append(i)
    return [p["docs"] for p in packs]


def test_packing(d):
    rng = random.Random(6)
    for case, (room, lengths) in enumerate([(33, [rng.randint(2, 33) for _ in range(400)]),
                                            (65, [min(65, int(2 + rng.expovariate(0.1))) for _ in range(700)]),
                                            (9, [rng.choice([5, 3]) for _ in range(90)])]):
        rows = [{"input_ids": [i % 200 + 1, i // 200 + 1] + [9] * (n - 2)} for i, n in enumerate(lengths)]
        prepared(d, f"o{case}", rows, seq=room - 1, pack="on")
        got = [[(a[0][0] - 1) + 200 * (a[1][0] - 1) for a in row] for row in rows_of(f"{d}/o{case}")]
        check(f"case {case}: the packs of a search", got == best_fit_by_search(lengths, room))
    # 1,000 of 5, then 1,000 of 3 in rows of 8: packing 1,000 at a time makes 1,500 packs
    rows = [{"input_ids": [1] * n} for n in [5] * 1000 + [3] * 1000]
    docs = prepared(d, "whole", rows, seq=7, pack="on")
    packed = rows_of(f"{d}/whole")
    check("the whole set is packed at once", len(packed) == 1000 and all(len(r) == 2 for r in packed), len(packed))
    check("every document once", len(docs) == 2000)
    real = [{"input_ids": [1] * max(2, min(257, int(rng.lognormvariate(4, 0.8))))} for _ in range(4000)]
    prepared(d, "fill", real, seq=256, pack="on")
    with open(f"{d}/fill/train/metadata.json") as f:
        meta = json.load(f)
    check("at least 99% filled", meta["document_tokens"] >= 0.99 * meta["total_tokens"], meta)
    pairs = [{"prompt_ids": [i % 200 + 1, i // 200 + 1], "chosen_ids": [7] * rng.randint(1, 12),
              "rejected_ids": [8] * rng.randint(1, 12)} for i in range(300)]
    prepared(d, "pairs", pairs, stage="dpo", seq=63, pack="on")
    sizes = [4 + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs]
    got = [[x[0][0] - 1 + 200 * (x[1][0] - 1) for x in r[::2]] for r in rows_of(f"{d}/pairs")]
    check("pairs are packed whole", got == best_fit_by_search(sizes, 64))
    check("chosen, rejected, chosen, rejected", all(a[:2] == b[:2] and a[2][0] == 7 and b[2][0] == 8
                                                    for r in rows_of(f"{d}/pairs") for a, b in zip(r[::2], r[1::2])))
    prepared(d, "off", pairs[:20], stage="dpo", seq=63)
    check("--pack off: a pair per row", [len(r) for r in rows_of(f"{d}/off")] == [2] * 20)


def test_a_million_documents_are_packed_in_seconds(d):
    np, chat = library("numpy"), importlib.import_module("chat")
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1, 200_000).astype(int) + 1, 2049)
    start = time.process_time()
    where, packs = chat.pack(lengths, 2049)
    seconds = time.process_time() - start
    check("200,000 documents", seconds < 5, seconds)
    check("no pack is too full", int(np.bincount(where, lengths).max()) <= 2049 and lengths.sum() > 0.999 * 2049 * packs)


# ---- TRL's numbers -------------------------------------------------------------------------------------------------
def test_trl_numbers(d):
    with open(shared("oracle/trl/oracle.json")) as f:
        oracle = json.load(f)
    dpo, sft = oracle["dpo"], oracle["sft"]
    dropped = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), dpo["dropped_row"].values()))
    pairs = [{k: p[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for p in dpo["pairs"]]
    docs = prepared(d, "dpo", pairs[:4] + [dropped] + pairs[4:], "--max-length", dpo["max_length"], stage="dpo",
                    seq=2 * dpo["max_length"] - 1)
    want = [[(i, k >= len(p["prompt_ids"])) for k, i in enumerate((p["prompt_ids"] + p[s])[:dpo["max_length"]])]
            for p in pairs
            for s in ("chosen_ids", "rejected_ids")]
    check("dpo: its pairs, the long answer cut", docs == want)
    check("dpo: its dropped row", counts(f"{d}/dpo")["dropped: the prompt fills the row"] == 1)
    rows = [{"input_ids": r["input_ids"], "labels": [-100 if k < len(r["prompt_ids"]) else i for k,
                                                     i in enumerate(r["input_ids"])]}
            for r in sft["rows_before_packing"]]
    prepared(d, "sft", rows, seq=sft["max_length"] - 1, pack="on")
    for k, (row, theirs) in enumerate(zip(rows_of(f"{d}/sft"), sft["packed"])):
        at, labels = 0, list(theirs["labels"])
        for n in theirs["seq_lengths"]:
            labels[at] = -100        # as its collator does
            at += n
        check(f"sft: pack {k}", [i for x in row for i in ids_of(x)] == theirs["input_ids"] and [len(x) for x in row] ==
              theirs["seq_lengths"]
              and [i if t else -100 for x in row for i, t in x] == labels)
    check("sft: as many packs", len(rows_of(f"{d}/sft")) == len(sft["packed"]))


def test_trl_itself(d):
    """TRL's own preparation of the same rows, where it is installed."""
    trl, datasets, transformers = library("trl"), library("datasets"), library("transformers")
    library("torch")
    importlib.import_module("logging").disable(50)
    datasets.disable_progress_bars()
    rng = random.Random(11)
    _, folder, tok = next(chat_tokenizers(d))
    chat = importlib.import_module("chat")
    tok.pad_token = "<unk>"
    tok.chat_template = chat.TEMPLATES["chatml"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tok), hidden_size=8, intermediate_size=8,
                                                                   num_hidden_layers=1,
                                                                    num_attention_heads=1, num_key_value_heads=1))
    text = lambda n: " ".join(rng.choice("the cat sat on a mat naïve 東京 1234".split()) for _ in range(rng.randint(1, n)))
    common = dict(output_dir=f"{d}/trl", report_to=[], bf16=False, max_length=64, use_cpu=True)
    forms = {"text": ([{"text": text(60)} for _ in range(60)], {}),
             "prompt, completion": ([{"prompt": text(40), "completion": rng.choice(["", " "]) + text(40)} for _ in range(60)],
                                    {}),
             "messages": ([{"messages": m} for m in chats(60, 12)], {"assistant_only_loss": True}),
             "messages, all": ([{"messages": m} for m in chats(60, 13)], {}),
             "prompt, completion of messages": ([{"prompt": m[:-1], "completion": m[-1:]} for m in chats(60, 14)], {})}
    for name, (rows, more) in forms.items():
        config = trl.SFTConfig(**common, shuffle_dataset=False, **more)
        trainer = trl.SFTTrainer(model, config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tok)
        want = [[(i, k > 0 and l != -100) for k, (i, l) in enumerate(zip(r["input_ids"], r["labels"]))]
                for r in trainer.train_dataset]
        want = [w for w in want if any(t for _, t in w)]
        got = prepared(d, f"sft_{name}".replace(" ", "_"), rows, "--template", "chatml", *(("--mask", "all") if name ==
            "messages, all" else ()),
                       tokenizer=folder, seq=63)
        check(f"sft, {name}: TRL's ids and labels", got == want, (len(got), len(want)))
    packed = [{"prompt": text(10), "completion": " " + text(60)} for _ in range(200)]
    trainer = trl.SFTTrainer(model, trl.SFTConfig(**common, shuffle_dataset=False, packing=True, eval_packing=False),
                             processing_class=tok,
                             train_dataset=datasets.Dataset.from_list(packed))
    prepared(d, "packed", packed, tokenizer=folder, seq=63, pack="on")
    got = [[i for x in r for i in ids_of(x)] for r in rows_of(f"{d}/packed")]
    check("sft packed: TRL's packs", got == [r["input_ids"] for r in trainer.train_dataset], len(got))
    word = lambda: text(40)
    forms = {"strings": [{"prompt": word(), "chosen": " " + word(), "rejected": " " + word() + "</s>"} for _ in range(50)],
             "implicit": [(lambda p: {"chosen": p + " x " + word(), "rejected": p + " y " + word()})(word())
                          for _ in range(50)],
             "messages": [{"prompt": m[:-1], "chosen": m[-1:], "rejected": [{"role": "assistant", "content": word()}]}
                          for m in chats(50, 15)],
             "implicit messages": [{"chosen": m, "rejected": m[:-1] + [{"role": "assistant", "content": word()}]}
                                   for m in chats(50, 16)]}
    for name, rows in forms.items():
        trainer = trl.DPOTrainer(model, ref_model=copy.deepcopy(model), args=trl.DPOConfig(**common),
                                 train_dataset=datasets.Dataset.from_list(rows), processing_class=tok)
        want = [[(i, k >= len(r["prompt_ids"]) and k > 0) for k, i in enumerate((r["prompt_ids"] + r[s])[:64])]
                for r in trainer.train_dataset
                for s in ("chosen_ids", "rejected_ids")]
        got = prepared(d, f"dpo_{name}".replace(" ", "_"), rows, "--template", "chatml", "--max-length", 64, stage="dpo",
                       tokenizer=folder, seq=127)
        check(f"dpo, {name}: TRL's ids", got == want, (len(got), len(want)))


# ---- The whole: splits, jobs, kills, real data -------------------------------------------------------------------------
def everything(out):
    return {os.path.join(f, n)[len(out):]: open(os.path.join(f, n), "rb").read() for f, _, names in os.walk(out)
            for n in names}


def test_validation(d):
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(1000)]
    path = save_rows(f"{d}/in.jsonl", rows)
    common = (path, "--stage", "sft", "--tokenizer", "bytes", "--seq-len", 60)
    must(*common, "--val-fraction", 0.1, "--out", f"{d}/tenth")
    val = [bytes(ids_of(x)[:-1]) for r in rows_of(f"{d}/tenth", "validation") for x in r]
    train = [bytes(ids_of(x)[:-1]) for r in rows_of(f"{d}/tenth") for x in r]
    check("about a tenth validates", 70 < len(val) < 130, len(val))
    check("every row once", sorted(val + train) == sorted((r["prompt"] + r["completion"]).encode() for r in rows))
    must(*common, "--val-fraction", 0, "--out", f"{d}/none")
    check("none", not os.path.exists(f"{d}/none/validation"))
    must(*common, "--val-fraction", 0.1, "--seed", 2, "--out", f"{d}/seed")
    check("another seed", [bytes(ids_of(x)[:-1]) for r in rows_of(f"{d}/seed", "validation") for x in r] != val)
    must(save_rows(f"{d}/twice.jsonl", rows + rows), *common[1:], "--val-fraction", 0.1, "--out", f"{d}/twice")
    again = [bytes(ids_of(x)[:-1]) for r in rows_of(f"{d}/twice", "validation") for x in r]
    check("a row that comes twice lies on one side", sorted(again) == sorted(val + val))
    must(save_rows(f"{d}/few.jsonl", rows[:20]), *common[1:], "--val-fraction", 0.0001, "--out", f"{d}/few")
    check("20 rows have one that validates", len([x for r in rows_of(f"{d}/few", "validation") for x in r]) == 1)
    r = run(save_rows(f"{d}/fewer.jsonl", rows[:19]), *common[1:], "--val-fraction", 0.0001, "--out", f"{d}/fewer")
    check("19 have none, and it is said", not os.path.exists(f"{d}/fewer/validation") and "validation got no row" in r.stderr,
          r.stderr)
    must(save_rows(f"{d}/l.jsonl", [{"input_ids": [i + 1] * 200} for i in range(100)]), *common[1:], "--long", "split",
         "--val-fraction", 0.3, "--out", f"{d}/l")
    sides = [{x[0][0] for r in rows_of(f"{d}/l", s) for x in r} for s in ("train", "validation")]
    check("the pieces of a row lie on one side", sides[1] and not sides[0] & sides[1])


def test_jobs_and_shards(d):
    rng = random.Random(1)
    rows = [{"messages": m} for m in chats(3000, 2)] + [{"messages": 1}] * 3
    rng.shuffle(rows)
    path = save_rows(f"{d}/in.jsonl", rows)
    for name, more in (("1", ["--jobs", 1]), ("3", ["--jobs", 3])):
        must(path, "--stage", "sft", "--tokenizer", "bytes", "--template", "zephyr", "--seq-len", 500, "--shard-tokens",
             100000, "--out", f"{d}/{name}/o", *more)
    one, three = everything(f"{d}/1/o"), everything(f"{d}/3/o")
    times = [json.loads(x.pop("/chat.json")) for x in (one, three)]
    for t in times:
        t.pop("time")
    check("the same bytes for any --jobs", one == three and times[0] == times[1] and len(one) > 10, one.keys() ^ three.keys())
    check("several shards", "/train/train_003.ds" in one)
    rows_of(f"{d}/1/o")
    check("no spool is left", not any("spool" in n for n in one))


def test_other_options_and_kill(d):
    path = save_rows(f"{d}/in.jsonl", [{"messages": m} for m in chats(4000, 2)])
    args = (path, "--stage", "sft", "--tokenizer", "bytes", "--template", "chatml", "--seq-len", 300, "--shard-tokens", 50000)
    must(*args, "--out", f"{d}/whole")
    want, times = everything(f"{d}/whole"), 0
    want.pop("/chat.json")
    for k in range(4):        # at ever later moments: during both passes
        out = f"{d}/killed{k}/whole"
        p = subprocess.Popen([sys.executable, base.SCRIPT, *map(str, args), "--out", out, "--jobs", "2"],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if k < 3:
            time.sleep(0.5 + k)
        else:
            while p.poll() is None and not os.path.exists(f"{out}/train/train_000.ds"):
                time.sleep(0.001)
        p.send_signal(signal.SIGKILL)
        p.wait()
        if os.path.exists(f"{out}/chat.json"):
            with open(f"{out}/chat.json") as f:
                state = json.load(f)
            times += not state["complete"]
        must(*args, "--out", out, "--jobs", "2")
        got = everything(out)
        check("complete after the same command", json.loads(got.pop("/chat.json"))["complete"] is True)
        check("the same bytes", got == want, got.keys() ^ want.keys())
    check("kills hit a run at work", times >= 1, times)
    refused("other options", ["seq_len", "other options"], *args[:-4], "--seq-len", 200, "--shard-tokens", 50000, "--out",
            f"{d}/whole")
    refused("a folder in use", ["not empty"], *args, "--out", d)
    template = save(f"{d}/t.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}")
    small = save_rows(f"{d}/small.jsonl", [{"messages": m} for m in chats(30)])
    again = (small, "--stage", "sft", "--tokenizer", "bytes", "--template", template, "--mask", "all", "--seq-len", 300,
             "--out", f"{d}/t")
    must(*again)
    save(template, "{% for m in messages %}{{ m.content }}!{% endfor %}")
    refused("another template under the same name", ["template_sha256"], *again)


def test_stories_tokenizer(d):
    """The tokenizer.bin of the default data: the longest piece at each place."""
    if not base.shutil.which("cc"):
        raise Skip("no C compiler")
    subprocess.run(["cc", "-O1", "-w", "-o", f"{d}/stories", os.path.join(HERE, "stories.c"), "-lm"], check=True)
    subprocess.run([f"{d}/stories", "--out", f"{d}/set", "--train-tokens", "40000", "--val-rows", "8"], check=True,
                   stdout=subprocess.DEVNULL)
    encode = base.trainer_encoder(d, f"{d}/set/tokenizer.bin")
    rows = [{"prompt": "Once there was a cat named Lily. What is it? ", "completion": "A cat, 東京."}, {"prompt": "x",
        "completion": " dog"}]
    docs = prepared(d, "o", rows, tokenizer=f"{d}/set/tokenizer.bin")
    for row, doc in zip(rows, docs):
        want = encode(row["prompt"] + row["completion"])
        check("ids of the trainer", ids_of(doc)[1:-1] == want and doc[0][0] == doc[-1][0] == 256 and doc[-1][1], (ids_of(doc),
            want))
    check("its tokenizer.bin is passed on", open(f"{d}/o/train/tokenizer.bin", "rb").read() == open(f"{d}/set/tokenizer.bin",
        "rb").read())
    doc, = prepared(d, "c", [{"messages": chats(1)[0]}], "--template", "alpaca", tokenizer=f"{d}/set")
    check("a folder with a tokenizer.bin, and a template", doc[0][0] == 256 and any(t for _, t in doc))
    for name, model in (("mistral", sentencepiece_model(d)),):      # kind 0: what tokens.py made from a SentencePiece model
        must(model_rows := save_rows(f"{d}/m.jsonl", rows), "--stage", "sft", "--tokenizer", model, "--seq-len", 99,
             "--val-fraction", 0, "--out", f"{d}/m1")
        must(model_rows, "--stage", "sft", "--tokenizer", f"{d}/m1/train/tokenizer.bin", "--seq-len", 99, "--val-fraction", 0,
             "--out", f"{d}/m2")
        check(f"{name}: from its tokenizer.bin", open(f"{d}/m1/train/train_000.ds", "rb").read() ==
              open(f"{d}/m2/train/train_000.ds", "rb").read())


def test_real_data(d):
    files = {"sft": [shared("text/v1_sft_demo.jsonl"), shared("text/identity.json")],
             "dpo": [shared("text/v1_dpo_demo.jsonl")]}
    found = [("mistral", shared("tokenizers/mistral_tokenizer.model.v1")), ("gpt2", shared("tokenizers/r50k_base.tiktoken"))]
    with contextlib.suppress(Skip):
        found.append(("tokenizer.json", next(chat_tokenizers(d))[1]))
    for name, path in found:
        for stage, inputs in files.items():
            out = f"{d}/{name}_{stage}"
            must(*inputs, "--stage", stage, "--tokenizer", path, "--template", "zephyr", "--seq-len", 8192 if name ==
                 "tokenizer.json" else
                 2048, "--out", out, "--strict")
            n = len(docs_of(out))
            check(f"{name}, {stage}: every row", n == (591 if stage == "sft" else 20), n)
            check(f"{name}, {stage}: nothing is dropped", not any(k.startswith("dropped") for k in counts(out)))
            text = must("--inspect", f"{out}/train/train_000.ds", "--rows", 1)
            check(f"{name}, {stage}: inspect", "all rows keep the format" in text and "\u27e6" in text
                  and ("rejected 0" in text) == (stage == "dpo"), text[:300])
            with open(f"{out}/train/metadata.json") as f:
                meta = json.load(f)
            check(f"{name}, {stage}: at least 97% filled", stage == "dpo" or name == "tokenizer.json"
                  or meta["document_tokens"] >= 0.97 * meta["total_tokens"], (
                meta["document_tokens"], meta["total_tokens"]))
            check(f"{name}, {stage}: the template lies beside", os.path.exists(f"{out}/train/chat_template.jinja"))


def test_inspect(d):
    prepared(d, "o", [{"prompt": "ask", "completion": "tell"}] * 3, seq=19, pack="on")
    path = f"{d}/o/train/train_000.ds"
    text = must("--inspect", path)
    check("inspect", "ask\u27e6tell<|endoftext|>\u27e7" in text and "2 rows of 19 + 1" in text and "3 documents" in text,
          text)
    data = memoryview(open(path, "rb").read()).cast("I").tolist()
    for name, at, word, why in (("start", 0, 97, "no document begins"), ("first", 0, S | T | 97, "first token"),
                                ("bits", 3, 1 << 25, "bits 24-29"),
                                ("vocabulary", 2, 300, "vocabulary"), ("padding", 7, S, "padding before"), ("target", 16,
                                    S | 5, "without a target")):
        words = data[:at] + [word] + data[at + 1:]
        refused(f"inspect: {name}", ["row 0", why], "--inspect", save(f"{d}/o/train/x.ds", b"".join(w.to_bytes(4, "little")
            for w in words)))
    refused("inspect: cut", ["whole rows"], "--inspect", save(f"{d}/o/train/x.ds", open(path, "rb").read()[:-4]))
    refused("inspect: no metadata", ["metadata.json"], "--inspect", save(f"{d}/x/y/z.ds", b"x" * 80))
    base.SCRIPT = os.path.join(HERE, "tokens.py")
    refused("tokens.py --inspect", ["flagged rows", "chat.py"], "--inspect", path)
    base.SCRIPT = os.path.join(HERE, "chat.py")


def test_bad_options(d):
    path, chat = save_rows(f"{d}/a.jsonl", [{"prompt": "a", "completion": "b"}] * 3), save_rows(f"{d}/c.jsonl",
        [{"messages": chats(1)[0]}])
    good = ["--stage", "sft", "--tokenizer", "bytes", "--seq-len", "9", "--out", f"{d}/o"]
    for words, args in ((["--stage"], [path, *good[2:]]), (["--tokenizer"], [path, *good[:2], *good[4:]]), (["--seq-len"],
        [path, *good[:4], *good[6:]]),
                        (["--out"], [path, *good[:-2]]), (["FILES"], good), (["--max-length"], [path, *good, "--max-length",
                            11]),
                        (["--long split"], [path, "--stage", "dpo", *good[2:], "--long", "split"]), (["--mask"],
                            [path, "--stage", "dpo", *good[2:], "--mask", "all"]),
                        (["chatml", "nope"], [path, *good, "--template", "nope"]), (["template", "line 1"], [path, *good,
                            "--template", save(f"{d}/t.jinja", "{% if %}")]),
                        (["c.jsonl:1", "--template", "chatml"], [chat, *good]), (["no such file"], [f"{d}/none.jsonl",
                            *good]),
                        (["out of range"], [path, *good, "--val-fraction", 1]), (["no tokenizer.json"], [path, *good[:3], d,
                            *good[4:]]),
                        (["damaged tokenizer.bin"], [path, *good[:3], save(f"{d}/b.bin", (20251002).to_bytes(4, "little") +
                                                                           bytes(9)), *good[4:]])):
        refused(f"options {words}", words, *args)
    # templates that are none
    refused("a template of bytes", ["t.jinja", "template", "utf-8"], path, *good, "--template", save(f"{d}/t.jinja", b"\xff"))
    os.makedirs(f"{d}/tk")
    with contextlib.suppress(Skip):
        tk = library("tokenizers")
        tk.Tokenizer(tk.models.BPE({"a": 0, "b": 1}, [])).save(f"{d}/tk/tokenizer.json")
        for text in ('{"chat_template": 5}', '{"chat_template": [5]}', '{"chat_template": [{"name": "default"}]}'):
            save(f"{d}/tk/tokenizer_config.json", text)
            refused(f"template {text}", ["tokenizer_config.json", "chat template"], path, *good[:3], f"{d}/tk", *good[4:])


if __name__ == "__main__":
    lacks = [n for n in ("numpy", "jinja2", "tokenizers") if not importlib.util.find_spec(n)]
    if lacks:
        print(f"skipped: test_chat: pip install {' '.join(lacks)}")
    sys.exit(0 if lacks else base.main(globals()))
