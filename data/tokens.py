#!/usr/bin/env python3
"""Any text -> token shards for litespark.

    python3 data/tokens.py stories.txt --split-on '<|endoftext|>' --out data/tiny          # bytes
    python3 data/tokens.py dump/ --tokenizer tokenizer.model --out data/slim --jobs 8      # SentencePiece
    python3 data/tokens.py a.jsonl.gz --tokenizer r50k_base.tiktoken --out data/web        # GPT-2
    python3 data/tokens.py a.jsonl.zst --tokenizer tokenizer.json --format ds --seq-len 2048 --out data/rows
    python3 data/tokens.py SlimPajama-627B/train --mix 'RedPajamaC4=0.3,RedPajamaCommonCrawl=0.5,RedPajamaBook=0.2' \\
        --val-from SlimPajama-627B/validation --tokenizer tokenizer.model --out data/mix   # sources by weight
    python3 data/tokens.py --mix 'web:fineweb/=0.8,code:code.jsonl.zst=0.2' --out data/two
    python3 data/tokens.py --inspect data/tiny/train_000.bin
    python3 data/tokens.py --export-tokenizer tokenizer.model --out tokenizer.bin
    python3 data/test_tokens.py

Inputs are .txt, .jsonl, .ndjson or .json (one JSON object per line), plain, .gz, .zst, .xz or .bz2, .parquet, and
.arrow as Hugging Face's `datasets` saves it; folders are searched, and what they hold besides is named.
Outputs (byte tables in data/README.md):
    bin   OUT/train_000.bin ..., OUT/val_000.bin ..., OUT/tokenizer.bin, OUT/tokens.json
    ds    the same as OUT/train/train_000.ds and OUT/validation/val_000.ds, each folder with metadata.json
    With --mix the validation shards are val_SOURCE_000, ...; OUT/manifest.json tells inputs, sources and shards.

What holds, whatever the input:
    - Memory is bounded: text flows through in pieces of at most 256 KiB (one JSON line or parquet row is read
      whole; a .zst file may ask for its window, up to 2 GiB).
    - The same inputs and options give the same bytes, for any --jobs: batches are cut by the reader and
      written in the reader's order.
    - A document goes to validation if hash(seed, its index) says so; without --mix, document 0 always trains, and
      where that leaves validation empty (one book, a few files), the end of the text is validation instead.
    - A document longer than a piece is cut where a line begins with a letter or digit. No GPT-2 or
      Llama token crosses such a place, so the tokens are those of the whole document.
    - A shard is written under a temporary name, fsynced, then renamed. A kill leaves whole shards only,
      and tokens.json with "complete": false. Every --save-every seconds .state.json tells how far input and shards
      are; the same command goes on from there, and its bytes are those of a run that was never killed.
    - A shard ends with the document that fills it, so no document is cut unless it is longer than a shard.
"""
import argparse, base64, collections, concurrent.futures, concurrent.futures.process, contextlib, gzip
import functools, hashlib, importlib, io, json, os, re, struct, sys, threading, time, unicodedata, zlib

PIECE = 1 << 18          # bytes of text that are encoded at once
BATCH = 1 << 20          # bytes of text handed to a worker at once
LINE_MAX = 1 << 28       # the longest JSON line
NEVER = -1e30            # score of a piece that no merge may produce (below any reader's "no merge yet")
INPUT = re.compile(r"(?i)\.(txt|json|jsonl|ndjson)(\.gz|\.zst|\.xz|\.bz2)?$|\.(?:parquet|arrow)$")
NOT_IN_FOLDER = re.compile(r"(?i)^\.|\.json$")         # hidden, or a stray info.json
WIDE = [("utf-32", b"\xff\xfe\0\0"), ("utf-32", b"\0\0\xfe\xff"), ("utf-16", b"\xff\xfe"), ("utf-16", b"\xfe\xff")]
LINE_CUT = re.compile(rb"(?s).*\S\n(?=[0-9A-Za-z])")    # greedy: the last such place


class UserError(Exception):
    """Something the user can mend: printed as one line, exit 1."""


def need(module, package=None):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"the Python library {module} is missing; run: pip install {package or module}")


# ---- Tokenizers: each loader returns a Tokenizer; its encoder needs the library, its pieces do not ------
class Tokenizer(argparse.Namespace):
    """name; kind, pieces, scores, bos, eos, prefix_space, words, whole_words: what tokenizer.bin holds; unlike: what
    happens to a prompt that tokenizer.bin does not know of; encoder() -> f(text, continued) gives ids; add_bos: put BOS
    before documents by default; side_files() -> {name: bytes} to lie beside the shards, for checkpoints to copy.
    `continued` says that the text goes on where the last piece ended (no space is to be put in front)."""
    prefix_space, words, whole_words, unlike = 0, "", False, None


# Byte-level tokenizers cut the text into words first, by one of these patterns; its place in the table is the word rule
# of tokenizer.bin. cl100k is llama3's but for white space at the end of the text, which stays whole there.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
          r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
WORDS = {
    "": None,       # no words: SentencePiece
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": LLAMA3.replace(r"|\s*[", r"|\s++\z|\s*["),
    "llama3": LLAMA3,
    "qwen2": LLAMA3.replace("{1,3}", ""),
    "o200k": TEKKEN.replace(f"{LOWER}+|", f"{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|").replace(
        rf"{LOWER}*|\p{{N}}", rf"{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{{N}}{{1,3}}"),
    "tekken": TEKKEN,
    "gpt2-digits": None,        # each digit by itself, then gpt2 on what lies between (StarCoder, SmolLM)
    "whole": None,              # byte-level without words
}


def bytes_tokenizer():
    def encoder():
        np = need("numpy")
        return lambda text, continued: np.frombuffer(text.encode(), np.uint8)
    pieces, end = [b"<0x%02X>" % i for i in range(256)] + [b"<|endoftext|>"], {"<|endoftext|>": 256}
    model = lambda: byte_level({bytes([i]): i for i in range(256)}, end, "")
    return Tokenizer(name="bytes", kind=1, pieces=pieces, scores=[0.0] * 257, bos=256, eos=256, encoder=encoder,
                     add_bos=False, side_files=lambda: hugging_face(model(), end, None, "<|endoftext|>"))


# ---- The same tokenizer in Hugging Face's form, so that AutoTokenizer reads a checkpoint --------------------------
def hugging_face(parts, special, bos, eos):
    """{name: bytes} of tokenizer.json and tokenizer_config.json. PreTrainedTokenizerFast takes tokenizer.json as it is;
    the class of the model (LlamaTokenizer, ...) would put its own rules in the place of these. split_special_tokens:
    "</s>" inside a text is text, as it was when the model was trained."""
    front = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos else []
    template = {"type": "TemplateProcessing", "single": front + [{"Sequence": {"id": "A", "type_id": 0}}],
                "pair": front + [{"Sequence": {"id": i, "type_id": 0}} for i in "AB"], "special_tokens":
                {bos: {"id": bos, "ids": [special[bos]], "tokens": [bos]}} if bos else {}}
    spec = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [
        {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for t, i in sorted(special.items(), key=lambda x: x[1])], **parts, "post_processor": template}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(bos), "add_eos_token": False,
              "bos_token": bos, "eos_token": eos, "clean_up_tokenization_spaces": False, "split_special_tokens": True}
    return {"tokenizer.json": json.dumps(spec, ensure_ascii=False).encode(), "tokenizer_config.json":
            json.dumps({k: v for k, v in config.items() if v is not None}, indent=1, ensure_ascii=False).encode()}


def bpe(vocab, rank, **more):
    """A BPE model where any two neighbours join whose union is a piece with a rank, the lowest rank first. Of equals
    (SentencePiece has them for runs of spaces) the leftmost is first, so a run grows from its left: long + short."""
    merges = sorted((r, -k, p) for p, r in rank.items() for k in range(1, len(p)) if p[:k] in rank and p[k:] in rank)
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **more,
            "vocab": vocab, "merges": [f"{p[:-k]} {p[-k:]}" for _, k, p in merges]}


def byte_level(ranks, special, words):
    char = {b: c for c, b in gpt2_bytes().items()}
    rank = {"".join(char[b] for b in text): i for text, i in ranks.items()}
    split = [{"type": "Split", "pattern": {"Regex": WORDS[words]}, "behavior": "Isolated", "invert": False}]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": split * bool(words) + [level]},
            "decoder": level, "model": bpe({**rank, **special}, rank, ignore_merges=True)}


def sentencepiece_parts(text, rank, prefix, unknown, byte_fallback):
    """The parts of a tokenizer.json with SentencePiece's rules for BPE. prefix: a space goes before the text."""
    replace = lambda a, b: {"type": "Replace", "pattern": {"String": a}, "content": b}
    front = [{"type": "Prepend", "prepend": "\u2581"}] * bool(prefix)
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * bool(prefix)
    return {"normalizer": {"type": "Sequence", "normalizers": front + [replace(" ", "\u2581")]},
            "pre_tokenizer": None, "decoder": {"type": "Sequence", "decoders": [
                replace("\u2581", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
            "model": bpe({t: i for i, t in enumerate(text)}, rank, unk_token=unknown, byte_fallback=byte_fallback, fuse_unk=True)}


def protobuf_fields(data):
    """(field number, value) pairs of one protobuf message: int, or bytes for what has a length."""
    def varint(i):
        value = shift = 0
        while True:
            value |= (data[i] & 127) << shift
            i, shift = i + 1, shift + 7
            if data[i - 1] < 128:
                return value, i
    i = 0
    while i < len(data):
        key, i = varint(i)
        if key & 7 == 0:
            value, i = varint(i)
        else:
            size, i = {1: (8, i), 5: (4, i)}.get(key & 7) or varint(i)
            if key & 7 not in (1, 2, 5) or i + size > len(data):
                raise ValueError("not a protobuf message")
            value, i = data[i:i + size], i + size
        yield key >> 3, value


def sentencepiece_tokenizer(path, data):
    """ModelProto: 1 = piece {1 text, 2 score, 3 type}, 2 = trainer {3 model type, 41 bos, 42 eos},
    3 = normalizer {2 character map, 3 add_dummy_prefix, 4 remove_extra_whitespaces}."""
    pieces, scores, types = [], [], []
    trainer, normalizer = {3: 1, 41: 1, 42: 2}, {2: b"", 3: 1, 4: 1}
    for field, value in protobuf_fields(data):
        if field == 1:
            piece = dict(protobuf_fields(value))
            types.append(piece.get(3, 1))
            normal = types[-1] in (1, 4)      # the others (unknown, control, unused, byte) never merge
            pieces.append(piece[1].replace("\u2581".encode(), b" "))
            scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0] if normal else NEVER)
        elif field in (2, 3):
            (trainer if field == 2 else normalizer).update(protobuf_fields(value))
    bos, eos = (i if i < len(pieces) else -1 for i in (trainer[41], trainer[42]))    # -1 is 2^64 - 1 here

    def encoder():
        sp = need("sentencepiece")
        first = sp.SentencePieceProcessor(model_proto=data)
        # Later fields win in protobuf, so two appended bytes switch add_dummy_prefix off. Models that squeeze
        # white space drop the newline at the end of a piece, and need the prefix in its place.
        rest = first if normalizer[4] else sp.SentencePieceProcessor(model_proto=data + b"\x1a\x02\x18\x00")
        return lambda text, continued: (rest if continued else first).encode(text)

    def side_files():
        files = {"tokenizer.model": data}
        if trainer[3] != 2 or normalizer[2] or normalizer[4]:
            return files            # what it does to the text has no exact counterpart there
        text = [p.decode().replace(" ", "\u2581") for p in pieces]
        special = {t: i for i, t in enumerate(text) if types[i] in (2, 3)}
        rank = {t: -scores[i] for i, t in enumerate(text) if types[i] in (1, 4)}
        parts = sentencepiece_parts(text, rank, normalizer[3], next((t for i, t in enumerate(text) if types[i] == 2), None),
                                    6 in types)
        name = lambda i: text[i] if i >= 0 else None
        return {**files, **hugging_face(parts, special, name(bos), name(eos))}
    unlike = ("is not a BPE model" if trainer[3] != 2 else "normalizes its text" if normalizer[2] else
              "squeezes white space" if normalizer[4] else None)
    return Tokenizer(name=path, kind=0, pieces=pieces, scores=scores, bos=bos, eos=eos, encoder=encoder, add_bos=True,
                     unlike=unlike, prefix_space=int(normalizer[3]), side_files=side_files)


# Known by the SHA-256 of the file: two sets may have as many ranks and other words.
RANKS = {  # name: words, ranks, SHA-256, special tokens
    "r50k": ("gpt2", 50256, "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930", {
        "<|endoftext|>": 50256}),
    "p50k": ("gpt2", 50281, "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069", {
        "<|endoftext|>": 50256}),
    "cl100k": ("cl100k", 100256, "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7", {
        "<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
        "<|endofprompt|>": 100276}),
    "o200k": ("o200k", 199998, "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d", {
        "<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
    "llama3": ("llama3", 128000, "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55", {
        "<|begin_of_text|>": 128000, "<|end_of_text|>": 128001,
        **{f"<|reserved_{i}|>": i for i in range(128002, 128256)}}),
    "qwen2": ("qwen2", 151643, "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186", {
        "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}),
    "tekken": ("tekken", None, None, {}),
}


def tiktoken_tokenizer(path, data, pattern):
    ranks = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            if line.strip():
                text, rank = line.split()
                ranks[base64.b64decode(text, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"{path}:{number}: not a tiktoken line (base64, rank); get the file again")
    size, digest = max(ranks.values()) + 1, hashlib.sha256(data.replace(b"\r\n", b"\n")).hexdigest()
    pattern = pattern or next((name for name, row in RANKS.items() if row[2] == digest), None)
    if not pattern:
        raise UserError(f"{path}: {size:,} ranks, none of the known sets; tell how it splits words: --tiktoken-pattern "
                        + "|".join(RANKS))
    words, known, _, special = RANKS[pattern]
    if size != known:    # some other rank set: the first free id ends a document
        special = {"<|endoftext|>": min(set(range(size + 1)) - set(ranks.values()))}

    def encoder():
        encoding = need("tiktoken").Encoding(os.path.basename(path), pat_str=WORDS[words], mergeable_ranks=ranks,
                                             special_tokens=special)
        return lambda text, continued: encoding.encode_ordinary(text)
    vocab = {i: (t, -float(i)) for t, i in ranks.items()}
    vocab.update((i, (t.encode(), NEVER)) for t, i in special.items())
    pieces, scores = fill_gaps(vocab)
    end = "<|endoftext|>" if "<|endoftext|>" in special else "<|end_of_text|>"
    begin = "<|begin_of_text|>" if "<|begin_of_text|>" in special else None
    return Tokenizer(name=path, kind=0, pieces=pieces, scores=scores, bos=special[begin or end], eos=special[end],
                     encoder=encoder, add_bos=begin is not None, words=words, whole_words=True,
                     side_files=lambda: hugging_face(byte_level(ranks, special, words), special, begin, end))


def fill_gaps(vocab):
    """{id: (bytes, score)} -> two lists without holes."""
    rows = [vocab.get(i, (b"<|unused_%d|>" % i, NEVER)) for i in range(max(vocab) + 1)]
    return [r[0] for r in rows], [r[1] for r in rows]


def gpt2_bytes():
    """The printable character that byte-level BPE files write for each byte -> that byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    odd = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(odd)}}


def parts(node):
    """Every dict in a JSON tree."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from parts(child)


def puts_space_first(part):
    """0 no, 1 always, 2 unless the text begins with one."""
    if part.get("type") == "Prepend":
        return 1
    return 2 * (part.get("prepend_scheme", "never") != "never" or bool(part.get("add_prefix_space")))


def byte_level_words(pre):
    """The name in WORDS of what a pre_tokenizer with ByteLevel does, or None for something else."""
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    level = [p for p in steps if p.get("type") == "ByteLevel"]
    if len(level) != 1 or steps[-1] is not level[0] or level[0].get("add_prefix_space") and len(steps) > 1:
        return None
    own, first = level[0].get("use_regex", True), steps[0]
    if len(steps) == 1:
        return "gpt2" if own else "whole"
    if len(steps) == 2 and first.get("type") == "Digits" and first.get("individual_digits") and own:
        return "gpt2-digits"
    how = first.get("behavior"), bool(first.get("invert"))
    if len(steps) > 2 or first.get("type") != "Split" or own or how not in (("Isolated", False), ("Removed", True)):
        return None
    regex = first.get("pattern", {}).get("Regex")
    also = {"'s|'t|'re|'ve|'m|'ll|'d" + WORDS["gpt2"][len("'(?:[sdmt]|ll|ve|re)"):]: "gpt2"}
    return {**{r: name for name, r in WORDS.items() if r}, **also}.get(regex)


def without_prefix(spec):
    """tokenizer.json text that does not put a space in front of the text."""
    spec = json.loads(json.dumps(spec))
    for part in list(parts([spec.get("normalizer"), spec.get("pre_tokenizer")])):
        if part.get("type") == "Prepend":
            part.clear()
            part.update(type="Sequence", normalizers=[])
        part.update({k: v for k, v in (("prepend_scheme", "never"), ("add_prefix_space", False)) if k in part})
    return json.dumps(spec)


def hf_tokenizer(path, data):
    spec, folder = json.loads(data), os.path.dirname(path)
    model = spec.get("model") or {}
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind != "BPE":
        raise UserError(f"{path}: tokenizer model {kind} is not supported, BPE is; use another tokenizer")
    if model.get("dropout"):        # the library obeys it wherever it encodes (findings/tokenizers_keep_dropout_on.sh)
        print(f"note: {path}: its dropout of {model['dropout']:g}, by which a text has other tokens each time, is left out here and "
              "in the tokenizer.json of --out", file=sys.stderr)
        model["dropout"] = None
        data = json.dumps(spec, ensure_ascii=False).encode()
    byte_of = gpt2_bytes()
    byte_level = any(p.get("type") == "ByteLevel" for p in parts([spec.get("pre_tokenizer"), spec.get("decoder")]))

    def raw(piece):
        if byte_level and all(c in byte_of for c in piece):
            return bytes(byte_of[c] for c in piece)
        return piece.replace("\u2581", " ").encode()
    score = {}
    if not byte_level:       # a character is text though no merge makes it; bytes stand for the others
        score = {p: -float(len(model["merges"])) for p in model["vocab"] if len(p) == 1}
    for rank, pair in reversed(list(enumerate(model["merges"]))):
        score["".join(pair.split(" ") if isinstance(pair, str) else pair)] = -float(rank)
    vocab = {i: (raw(p), score.get(p, NEVER)) for p, i in model["vocab"].items()}
    added = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
    vocab.update((i, (text.encode(), NEVER)) for text, i in added.items())
    pieces, scores = fill_gaps(vocab)
    config = {}
    if os.path.exists(os.path.join(folder, "tokenizer_config.json")):
        with open(os.path.join(folder, "tokenizer_config.json"), encoding="utf-8") as f:
            config = json.load(f)

    def special(key, usual):
        named = config.get(key)
        named = named.get("content") if isinstance(named, dict) else named
        return next((t for t in [named, *usual] if t in added), None)
    eos = special("eos_token", ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"])
    bos = special("bos_token", ["<|begin_of_text|>", "<s>", "<bos>"]) or eos
    # The file itself says whether a text starts with BOS: its post-processor names the piece then.
    add_bos = bos != eos and json.dumps(bos) in json.dumps(spec.get("post_processor"))

    def encoder():
        library = need("tokenizers")
        both = []
        for text in (data.decode(), without_prefix(spec)):
            try:
                both.append(library.Tokenizer.from_str(text))
            except Exception as e:       # the library raises bare Exceptions
                raise UserError(f"{path}: tokenizers {library.__version__} cannot read it ({e}); "
                                "run: pip install -U tokenizers")
            both[-1].no_padding()
            both[-1].no_truncation()
            both[-1].encode_special_tokens = True      # "<|endoftext|>" inside a text is text
        return lambda text, continued: both[continued].encode(text, add_special_tokens=False).ids

    def side_files():
        files = {"tokenizer.json": data}
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if os.path.exists(os.path.join(folder, name)):
                with open(os.path.join(folder, name), "rb") as f:
                    files[name] = f.read()
        # without a config, AutoTokenizer would take the class of the model, which has rules of its own
        return {"tokenizer_config.json": json.dumps({k: v for k, v in {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos if add_bos else None, "eos_token": eos,
            "split_special_tokens": True}.items() if v}, indent=1, ensure_ascii=False).encode(), **files}
    normalizers = [p["type"] for p in parts(spec.get("normalizer")) if "type" in p and p["type"] not in (
        "Sequence", "Prepend") and not (p["type"] == "Replace" and p.get("content") == "\u2581")]
    words = byte_level_words(spec.get("pre_tokenizer") or {}) if byte_level else ""
    if not byte_level and spec.get("pre_tokenizer") and not (
            spec["pre_tokenizer"].get("type") == "Metaspace" and spec["pre_tokenizer"].get("split") is False):
        words = None
    return Tokenizer(name=path, kind=0, pieces=pieces, scores=scores, bos=added.get(bos, -1), eos=added.get(eos, -1),
                     encoder=encoder, add_bos=add_bos, words=words or "", whole_words=bool(model.get("ignore_merges")),
                     unlike=f"normalizes its text ({normalizers[0]})" if normalizers else
                     "splits words in a way unknown here" if words is None else None,
                     prefix_space=max(map(puts_space_first, parts([spec.get("normalizer"), spec.get("pre_tokenizer")])),
                                      default=0), side_files=side_files)


def load_tokenizer(path, pattern=None):
    """The kind is told by the content, since suffixes vary (.model, .model.v3, tokenizer.model with ranks)."""
    if path == "bytes":
        return bytes_tokenizer()
    with open(path, "rb") as f:
        data = f.read()
    try:
        if data.lstrip()[:1] == b"{":
            return hf_tokenizer(path, data)
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
            return tiktoken_tokenizer(path, data, pattern)
        if data[:1] == b"\n":        # field 1 with a length, where a ModelProto begins
            return sentencepiece_tokenizer(path, data)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: damaged tokenizer file ({type(e).__name__}: {e}); get it again")
    raise UserError(f"{path}: neither a SentencePiece model, nor tiktoken ranks, nor a tokenizer.json; "
                    "name one of these, or use --tokenizer bytes")


def character_class(c):
    """0 other, 1 upper and title case, 2 lower case, 3 other letters, 4 marks, 5 numbers, 6 white space."""
    if 9 <= c <= 13 or 0x2000 <= c <= 0x200A or c in (32, 0x85, 0xA0, 0x1680, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000):
        return 6            # \s of these patterns; str.isspace() has four more
    category = unicodedata.category(chr(c))
    return {"Lu": 1, "Lt": 1, "Ll": 2}.get(category) or {"L": 3, "M": 4, "N": 5}.get(category[0], 0)


@functools.lru_cache(None)
def character_classes():
    """Where the class of a character changes: words of class << 24 | first code point. 1.1 million of them: 0.3 s."""
    classes = [character_class(c) for c in range(0x110000)]
    rows = [k << 24 | c for c, k in enumerate(classes) if c == 0 or k != classes[c - 1]]
    return struct.pack(f"<i{len(rows)}I", len(rows), *rows)


def tokenizer_bin(t):
    """-> the file, and a checksum of all but the character classes, which depend on Python's Unicode version."""
    if t.unlike:
        print(f"note: {t.name} {t.unlike}: tokenizer.bin decodes exactly, but encodes prompts differently",
              file=sys.stderr)
    new = t.words or t.prefix_space == 2         # else the bytes that older readers know
    head = struct.pack("<8i", 20251002, 2 if new else 1, t.kind, len(t.pieces), t.bos, t.eos, t.prefix_space,
                       list(WORDS).index(t.words) + 256 * bool(t.words and t.whole_words))
    records = b"".join(struct.pack("<fi", s, len(p)) + p for p, s in zip(t.pieces, t.scores))
    classes = character_classes() if t.words else struct.pack("<i", 0) if new else b""
    return head + classes + records, zlib.crc32(head + records)


def write_whole(path, data):
    """All or nothing, also when the machine stops."""
    try:
        with open(path + ".tmp", "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except OSError as e:         # of a full disk names no file
        if os.path.exists(path + ".tmp"):
            os.unlink(path + ".tmp")
        raise OSError(e.errno, e.strerror, e.filename or path)


# ---- Reading: files -> (document index, first, last, path, line, row or byte offset, kind, source, bytes) -----
def saved_by_datasets(folder):
    """The files of a folder that Dataset.save_to_disk wrote (others may be left there by its cache), or None."""
    with open(os.path.join(folder, "state.json"), encoding="utf-8") as f:
        try:
            state = json.load(f)
            names = [row["filename"] for row in state["_data_files"]]
        except (ValueError, KeyError, TypeError):
            return None
    if state.get("_indices_data_files"):
        raise UserError(f"{folder}: this dataset keeps a choice of rows beside its files; save it again after "
                        "flatten_indices()")
    for n in names:
        if not os.path.exists(os.path.join(folder, n)):
            raise UserError(f"{folder}: {n} is missing, which its state.json names; save the dataset again")
    return names


def files_of_folder(path):
    """(files to read, what else lies there): text by its names, datasets saved on disk by their lists."""
    found, rest = [], []
    for folder, folders, names in os.walk(path):
        join = functools.partial(os.path.join, folder)
        saved = saved_by_datasets(folder) if "state.json" in names else None
        if "dataset_dict.json" in names:        # one folder for each split: the others are there to test with
            if "train" not in folders:
                raise UserError(f"{folder}: no split train (it has {', '.join(sorted(folders))}); name one of its folders")
            rest += [join(n, "") for n in folders if n != "train"]
            folders[:] = ["train"]
        elif saved is not None:
            found += map(join, saved)
            rest += [join(n) for n in names if n not in saved + ["state.json", "dataset_info.json"]]
        else:
            for n in names:
                (found if INPUT.search(n) and not NOT_IN_FOLDER.search(n) else rest).append(join(n))
        rest += [join(n, "") for n in folders if os.path.islink(join(n))]
        if "train" in folders and {"validation", "test"} & set(folders) and folder == path:
            print(f"note: {path}: train is read together with {', '.join(sorted({'validation', 'test'} & set(folders)))}; "
                  f"name {join('train')} to read only that", file=sys.stderr)
    return sorted(found), sorted(rest)


def find_inputs(paths):
    files = []
    for path in paths:
        if os.path.isdir(path):
            found, rest = files_of_folder(path)
            some = ", ".join(n[len(os.path.join(path, "")):] for n in rest[:5]) + ", ..." * (len(rest) > 5)
            if not found:
                raise UserError(f"{path}: no .txt, .jsonl, .parquet or .arrow file in this folder "
                                f"({some or 'it is empty'}); name the files")
            if rest:
                print(f"note: {path}: {len(rest)} not read ({some}); name a file or folder to read it", file=sys.stderr)
            files += found
        elif not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder")
        elif not INPUT.search(path):
            raise UserError(f"{path}: unknown kind of input; name it .txt or .jsonl (also with .gz, .zst, .xz, .bz2), "
                            ".parquet or .arrow")
        else:
            files.append(path)
    return files


def cut_point(buf, at=0):
    """Where to end a piece of at most PIECE bytes that begins at `at` in a longer UTF-8 text; see the file's top."""
    m = LINE_CUT.match(buf, at, at + PIECE)
    i = m.end() if m else buf.rfind(b"\n", at, at + PIECE) + 1
    if i <= at:
        i = buf.rfind(b" ", at + 1, at + PIECE)      # a word carries the space before it
    if i <= at:
        i = at + PIECE
        while i > at + PIECE - 4 and buf[i] & 0xC0 == 0x80:      # not inside a character
            i -= 1
    return i


def split_pieces(data):
    at = 0
    while len(data) - at >= 2 * PIECE:
        cut = cut_point(data, at)
        yield data[at:cut]
        at = cut
    if at < len(data):
        yield data[at:]


def text_pieces(stream, separator):
    """Yield (offset, first, last, bytes); separator(line) is None where the whole stream is one document.
    Empty lines around a separator belong to no document."""
    buf, offset, first, line_start = bytearray(), 0, True, True
    while True:
        chunk = stream.readline(PIECE) if separator else stream.read(PIECE)
        if offset == 0 and not buf and chunk.startswith(b"\xef\xbb\xbf"):        # byte order mark
            chunk, offset = chunk[3:], 3
            if not chunk:
                continue
        if not chunk or (separator and line_start and separator(chunk)):
            text = bytes(buf.rstrip(b"\r\n") if separator else buf)
            if not first or text.strip():
                yield offset, first, True, text
            offset, first = offset + len(buf) + len(chunk), True
            buf.clear()
            if not chunk:
                return
        elif separator and first and not buf and not chunk.strip(b"\r\n"):
            offset += len(chunk)
        else:
            buf += chunk
            while len(buf) >= 2 * PIECE:
                cut = cut_point(buf)
                yield offset, first, False, bytes(buf[:cut])
                del buf[:cut]
                offset, first = offset + cut, False
        line_start = chunk.endswith(b"\n")


def json_lines(path, stream):
    for number, line in enumerate(iter(lambda: stream.readline(LINE_MAX), b""), 1):
        if len(line) == LINE_MAX:
            raise UserError(f"{path}:{number}: the line is longer than {LINE_MAX >> 20} MiB; "
                            "write one document per line")
        if line.strip():
            yield number, True, True, line


def make_separator(how):
    if how == "whole-file":
        return None
    if how == "blank-lines":
        return lambda line: not line.strip()
    try:
        regex = re.compile(how.encode())
    except re.error as e:
        raise UserError(f"--split-on {how}: bad regular expression ({e})")
    return lambda line: line.strip() == how.encode() or regex.fullmatch(line.strip()) is not None


def tables(path, columns=None):
    """Yield (record batch of few rows, bytes of the file behind it); columns(names) says which are wanted."""
    size, wanted = os.path.getsize(path), columns or (lambda names: names)
    if not size:
        raise EOFError("it is empty")
    if path.lower().endswith(".parquet"):
        file, rows = need("pyarrow.parquet", "pyarrow").ParquetFile(path), 0
        for batch in file.iter_batches(256, columns=list(wanted(file.schema_arrow.names))):
            rows += batch.num_rows
            yield batch, size * rows // file.metadata.num_rows
        return
    arrow, ipc = need("pyarrow"), need("pyarrow.ipc", "pyarrow")
    with arrow.OSFile(path) as f:       # not a memory map, whose pages would count as this process's memory
        if f.read(6) == b"ARROW1":
            file = ipc.open_file(f)
            parts = (file.get_batch(i) for i in range(file.num_record_batches))
        else:       # the stream form, as `datasets` writes it; without its last word it would end early in silence
            f.seek(max(0, size - 4))
            if f.read(4) != bytes(4):
                raise EOFError("it ends before its end mark")
            f.seek(0)
            file = parts = ipc.open_stream(f)
        names = list(wanted(file.schema.names))
        for part in parts:
            for at in range(0, part.num_rows, 64):
                yield part.select(names).slice(at, 64), f.tell()


def table_rows(path, key, mix_key=None):
    """Yield (row, True, True, text as bytes, source, bytes of the file behind it) of a .parquet or .arrow file."""
    number, root = 0, None

    def columns(names):
        nonlocal root
        root = mix_key and (mix_key if mix_key in names else mix_key.split(".")[0])
        for name, option in ((key, "--text-key"), (root, "--mix-key")):
            if name and name not in names:
                raise UserError(f"{path}: no column \"{name}\" (it has {', '.join(names)}); pass {option} NAME")
        return dict.fromkeys(n for n in (key, root) if n)
    for batch, at in tables(path, columns):
        column = batch.column(key)
        if re.fullmatch("(large_)?string(_view)?", str(column.type)):   # as bytes: encode_batch tells what is not UTF-8
            column = column.cast(str(column.type).replace("string", "binary"))
        sources = batch.column(root).to_pylist() if root else [None] * len(column)
        for value, source in zip(column.to_pylist(), sources):
            number += 1
            if not isinstance(value, bytes):
                raise UserError(f"{path}: row {number}: \"{key}\" is not a string; pass --text-key NAME")
            if root:
                source = find_source({root: source}, mix_key, f"{path}: row {number}")
            yield number, True, True, value, source, at


def parquet_rows(path, key, progress):
    before = progress.done
    for *row, _, at in table_rows(path, key):
        progress.done = before + at
        yield tuple(row)


def find_source(row, key, where):
    """The value of a key such as meta.redpajama_set_name: a name in an object in a row."""
    value = row
    try:
        for part in [key] if key in row else key.split("."):
            if isinstance(value, str) and value.lstrip()[:1] == "{":        # an object that a table keeps as text
                value = json.loads(value)
            value = value[part]
    except (KeyError, TypeError, IndexError, ValueError):
        raise UserError(f"{where}: no key \"{key}\", which tells the source; pass --mix-key NAME")
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: \"{key}\" is {json.dumps(value, default=str)[:40]}, not the name of a source; "
                        "pass --mix-key NAME")
    return value


class Frames(io.RawIOBase):
    """The text of a file of zstd frames, or of xz or bzip2 streams, one after the other; frame() begins to decode one.
    The libraries' own readers lose text in silence: zstandard's takes a file that ends inside a frame for a whole one;
    those of lzma and bz2 (Python 3.11.7, 3.13.0) end at what is no stream, be it damage or the zeros that the .xz format
    allows between two streams (findings/python_ends_an_xz_file_at_its_padding.sh)."""
    def __init__(self, raw, frame, padding):
        self.raw, self.begin, self.padding = raw, frame, padding
        self.frame, self.rest, self.text, self.zeros = None, b"", memoryview(b""), None     # zeros: since the last frame

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.text:
            data, self.rest = self.rest or self.raw.read(1 << 12), b""      # little: it may be 30,000 times more text
            if not data:
                if self.frame:
                    raise EOFError("it ends inside a frame")
                self.check_padding()
                return 0
            if self.zeros is not None:
                self.zeros, data = self.zeros + len(data), data.lstrip(b"\0")
                self.zeros -= len(data)
                if not data:
                    continue
                self.check_padding()
            self.frame, self.zeros = self.frame or self.begin(), None
            self.text = memoryview(self.frame.decompress(data))
            if self.frame.eof:
                self.frame, self.rest, self.zeros = None, self.frame.unused_data, 0 if self.padding else None
        n = min(len(buffer), len(self.text))
        buffer[:n], self.text = self.text[:n], self.text[n:]
        return n

    def check_padding(self):
        if (self.zeros or 0) % 4:
            raise EOFError(f"{self.zeros} zeros between its streams, which is no multiple of 4")


class Hashed(io.RawIOBase):
    """A file that counts, and hashes if asked, what is read from it."""
    def __init__(self, raw, digest):
        self.raw, self.digest, self.count = raw, digest, 0

    def readable(self):
        return True

    def readinto(self, buffer):
        n = self.raw.readinto(buffer)
        self.count += n
        if self.digest:
            self.digest.update(memoryview(buffer)[:n])
        return n


def file_hash(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while data := f.read(BATCH):
            digest.update(data)
    return digest.hexdigest()


def open_input(path, raw):
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    ending = os.path.splitext(path)[1]
    if ending == ".zst":        # a frame of `zstd --long=31` needs 2 GiB, which is refused by default
        frame = need("zstandard").ZstdDecompressor(max_window_size=1 << 31).decompressobj
    elif ending in (".xz", ".bz2"):
        frame = need("lzma").LZMADecompressor if ending == ".xz" else need("bz2").BZ2Decompressor
    else:
        return raw
    return io.BufferedReader(Frames(raw, frame, padding=ending == ".xz"), BATCH)


def refuse_wide(path, head):
    """UTF-16 is told by its first two bytes, or by a zero in every second one: those would pass as UTF-8."""
    kind = next((name for name, mark in WIDE if head.startswith(mark)), None)
    if not kind and head.count(0) > len(head) // 4:
        kind = "utf-16le" if head[1::2].count(0) > head[::2].count(0) else "utf-16be"
    if kind:
        raise UserError(f"{path}: this is {kind.upper()} text, not UTF-8; convert it (iconv -f {kind} -t utf-8)")


class Place(argparse.Namespace):
    """How far a list of files is read: `documents` of file number `file`, before which lie `before`. check: CRC of the
    end of the last document's bytes; open: its end is still to come."""
    def __init__(self, file=0, before=0, documents=0, check=0, open=False):
        super().__init__(file=file, before=before, documents=documents, check=check, open=open)


def read_documents(files, separator, text_key, progress, mix_key=None, place=None, finished=None, lines=json_lines,
                   rows=table_rows):
    """Goes on from `place`, and keeps it up to date. finished(path, bytes, SHA-256, documents) is told of each file."""
    place = place or Place()
    progress.done += sum(map(os.path.getsize, files[:place.file]))
    for path in files[place.file:]:
        ending = os.path.splitext(path)[1].lower()[1:]
        kind = {"": "row", "txt": "text"}.get((INPUT.search(path)[1] or "").lower(), "line")
        skip, check, documents, shown = place.documents, place.check, 0, 0
        digest = hashlib.sha256() if finished and kind != "row" else None
        with open(path, "rb", 0) as file:
            size, counter = os.path.getsize(path), Hashed(file, digest)
            try:
                if kind == "row":
                    items = rows(path, text_key, mix_key)
                else:
                    if not size and ending in ("gz", "zst", "xz", "bz2"):
                        raise EOFError("it is empty")
                    if mix_key and kind == "text":
                        raise UserError(f"{path}: plain text has no key \"{mix_key}\"; give its source a name with "
                                        "--mix 'NAME:PATH=WEIGHT,...'")
                    stream = open_input(path.lower(), io.BufferedReader(counter, 1 << 16))
                    refuse_wide(path, stream.peek(1024)[:1024])
                    items = lines(path, stream) if kind == "line" else text_pieces(stream, separator)
                for where, first, last, data, *more in items:
                    documents += first
                    at = more[1] if more else counter.count
                    progress.done, shown = progress.done + at - shown, at
                    if documents <= skip:
                        if last and documents == skip and zlib.crc32(data[-4096:]) != check:
                            raise UserError(f"{path}: document {skip} is not what was read before; it has changed since: "
                                            "remove the --out folder to start anew")
                        continue
                    place.open = not last
                    if last:
                        place.documents, place.check = documents, zlib.crc32(data[-4096:])
                    yield place.before + documents - 1, first, last, path, where, kind, more[0] if more else None, data
            except UserError:
                raise
            except Exception as e:      # each library has errors of its own; one with an errno is the disk's
                known = isinstance(e, (EOFError, zlib.error)) or re.match("Zstd|LZMA|Arrow", type(e).__name__)
                if not known and not (isinstance(e, OSError) and e.errno is None):
                    raise
                raise UserError(f"{path}: damaged {ending} file ({e}); get it again")
        if documents < skip:
            raise UserError(f"{path}: {documents} documents, but {skip} were read before; it has changed since: remove the "
                            "--out folder to start anew")
        progress.done += size - shown
        if finished:
            finished(path, size, digest.hexdigest() if digest else file_hash(path), documents)
        place.file, place.before, place.documents, place.check = place.file + 1, place.before + documents, 0, 0


def batches(items):
    batch, size = [], 0
    for item in items:
        batch.append(item)
        size += len(item[-1]) + 64
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- Encoding, in this process or in --jobs workers ----------------------------------------------------
worker = argparse.Namespace()


def start_worker(args, parent):
    """Fills `worker`."""
    tokenizer = load_tokenizer(args.tokenizer, args.tiktoken_pattern)
    worker.encode, worker.args = tokenizer.encoder(), args
    leave_with(parent)


def leave_with(parent):
    """A child leaves when its parent is gone, since a killed parent cannot tell it to."""
    if parent != os.getpid():
        def watch():
            while os.getppid() == parent:
                time.sleep(0.5)
            os._exit(1)
        threading.Thread(target=watch, daemon=True).start()


def decode_text(data, errors, path, where, kind):
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as e:
        place = {"text": f"{path}: byte {where + e.start}", "row": f"{path}: row {where}: a byte",
                 "line": f"{path}:{where}: byte {e.start} of the line"}[kind]
        raise UserError(f"{place} (0x{data[e.start]:02x}) is not UTF-8; convert the file "
                        "(iconv -f latin1 -t utf-8) or pass --errors replace")


def json_fields(line, path, number):
    """(text as bytes, source or None) of one line."""
    args = worker.args
    try:
        row = json.loads(decode_text(line, args.errors, path, number, "line").lstrip("\ufeff"))
        text = row[args.text_key]
        if not isinstance(text, str):
            raise UserError(f"{path}:{number}: \"{args.text_key}\" is not a string; pass --text-key NAME")
        source = find_source(row, args.mix_key, f"{path}:{number}") if getattr(args, "mix_key", None) else None
        return text.encode("utf-8", args.errors), source        # half a surrogate pair is legal JSON, but no text
    except UnicodeEncodeError:
        raise UserError(f"{path}:{number}: a lone surrogate is not text; mend the line or pass --errors replace")
    except (KeyError, TypeError, IndexError):
        raise UserError(f"{path}:{number}: no key \"{args.text_key}\" in this line; pass --text-key NAME")
    except (ValueError, RecursionError) as e:
        hint = "; a JSON array must become one object per line (jq -c '.[]')" if line[:1] == b"[" else ""
        raise UserError(f"{path}:{number}: bad JSON ({e}){hint or '; mend or remove the line'}")


def json_text(line, path, number):
    return json_fields(line, path, number)[0]


def encode_batch(batch):
    """-> (uint16 or uint32 ids of all pieces, [(document, ids in this piece, first, last, text bytes, part)]).
    part: None, or what the mix does with it: (source, "train" or "val"); document is then (u, source, pass), see choose."""
    np, args, out, spans = need("numpy"), worker.args, [], []
    rules = getattr(args, "rules", None)
    for document, first, last, path, where, kind, source, data in batch:
        part = None
        if kind == "line":
            data, source = json_fields(data, path, where)
        if rules is not None:
            u, name, number = document
            part = choose(args, name or source, u, number)
            if not part:
                continue
        if first and last and not data.strip():
            continue
        start = len(out)
        for piece in split_pieces(data):
            text = decode_text(piece, args.errors, path, where, kind)
            out.append(np.asarray(worker.encode(text, not first or len(out) > start)))
        if first and args.bos_id >= 0:
            out.insert(start, np.array([args.bos_id]))
        if last and args.eos_id >= 0:
            out.append(np.array([args.eos_id]))
        for ids in out[start:]:
            if len(ids) and int(ids.max()) >= 1 << 8 * args.token_bytes:
                raise UserError(f"{path}: {f'document {document}' if part is None else f'{kind} {where}'} has token id "
                                f"{int(ids.max())}, which does not fit {args.token_bytes} bytes; leave --token-bytes out")
        spans.append((document, sum(map(len, out[start:])), first, last, len(data), part))
    dtype = f"<u{args.token_bytes}"
    return (np.concatenate([a.astype(dtype) for a in out]) if out else np.zeros(0, dtype)), spans


def in_order(function, work, args, start=start_worker):
    """(function(x), tag) for each (x, tag) of work, in that order; at most 2 x jobs of them wait in memory."""
    if args.jobs == 1:
        start(args, os.getpid())
        yield from ((function(x), tag) for x, tag in work)
        return
    pool = concurrent.futures.ProcessPoolExecutor(args.jobs, initializer=start, initargs=(args, os.getpid()))
    try:
        waiting = collections.deque()
        for x, tag in work:
            waiting.append((pool.submit(function, x), tag))
            if len(waiting) > 2 * args.jobs:
                future, tag = waiting.popleft()
                yield future.result(), tag
        for future, tag in waiting:
            yield future.result(), tag
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError("a worker process died (out of memory?); use a smaller --jobs")
    finally:
        pool.shutdown(cancel_futures=True)


def encoded(work, args):
    """encode_batch over all batches, in order."""
    return (result for result, _ in in_order(encode_batch, ((batch, None) for batch in work), args))


# ---- Mixing: which documents of which source --------------------------------------------------------------------
# A first pass counts the text of each source, by the hash u of each document, and encodes a sample of it. From that
# follow, for each source, thresholds of u: below the first a document validates; above, it trains floor(copies) times,
# and once more below the second. So what happens to a document depends on u and its source alone, in any order.
BINS = 4096              # of u, in the count
SAMPLE = 64 << 20        # bytes of input of which the documents are encoded to learn the tokens per byte of each source
SAMPLE_TEXT = 1 << 16    # bytes of a document that are encoded for it
MAX_SOURCES = 256


def parse_mix(args):
    """--mix -> (weights {source: weight} or None, [(source or None, [path])] to read)."""
    if args.mix == "natural":
        return None, [(None, args.inputs)]
    weights, streams = {}, []
    for row in args.mix.split(","):
        name, equals, weight = row.strip().rpartition("=")
        name, colon, path = name.partition(":") if not args.inputs else (name, "", "")
        try:
            weight = float(weight) if equals else 0.0
        except ValueError:
            weight = -1.0
        if not name or not 1e-30 < weight < 1e30:        # beyond these sums and quotients leave a double's range
            raise UserError(f"--mix: '{row.strip()}' is not {'NAME' if args.inputs else 'NAME:PATH'}=WEIGHT with a weight "
                            "above 0; leave a source out to use nothing of it")
        if name in weights:
            raise UserError(f"--mix names {name} twice")
        if not args.inputs and not path:
            raise UserError(f"--mix: '{row.strip()}' has no path; write NAME:PATH=WEIGHT, or name INPUT files whose "
                            "documents tell their source (--mix-key)")
        weights[name] = weight
        streams.append((name, [path]))
    total = sum(weights.values())
    return {n: w / total for n, w in weights.items()}, [(None, args.inputs)] if args.inputs else streams


def parse_val_from(args, streams):
    """--val-from -> [(source or None, [path])]: with NAME:PATH sources each path has its source's name before it."""
    if not args.mix or streams[0][0] is None:
        return [(None, args.val_from)] if args.val_from else []
    rows = [row.partition(":") for row in args.val_from]
    for name, _, path in rows:
        if not path or name not in dict(streams):
            raise UserError(f"--val-from {name}: write NAME:PATH with a NAME of --mix ({', '.join(dict(streams))})")
    return [(name, [path]) for name, _, path in rows]


def hash_of(args, stream, file, document):
    """u, 64 bits: its upper ones choose documents, its lower ones the passes and the sample."""
    data = f"{args.seed}:{stream}:{file}:{document}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def choose(args, source, u, number):
    """What pass number `number` does with a document: "train", "val" or None. Its copies lie in different passes."""
    rule = args.rules.get(source)
    if rule is None or number == args.passes:       # after the passes come the files of --val-from
        return rule and (source, "val")
    validates, more, copies = rule
    if u < validates:
        return (source, "val") if number == 0 else None
    return (source, "train") if (number - u) % args.passes < copies + (u < more) else None


def count_file(task):
    """-> ({source: its counts}, documents, SHA-256) of one file; sources are sparse: {bin of u: bytes}."""
    stream, number, path, name = task
    args, sources, told, index = worker.args, {}, [], -1
    for _, first, last, path, where, kind, source, data in read_documents(
            [path], make_separator(args.split_on), args.text_key, Progress(1), args.mix_key, None, lambda *x: told.append(x)):
        if kind == "line":
            data, source = json_fields(data, path, where)
        if first:
            index += 1
            u = hash_of(args, stream, number, index)
        if first and last and not data.strip():
            continue
        new = (name or source) not in sources
        if new and len(sources) == MAX_SOURCES:
            raise UserError(f"{path}: \"{args.mix_key}\" has more than {MAX_SOURCES} values ({', '.join(list(sources)[:3])}, "
                            "...), too many for sources; pass another --mix-key")
        s = sources.setdefault(name or source, {"documents": 0, "bytes": 0, "text": 0, "tokens": 0, "low": u, "bins": {}})
        s["documents"] += first
        s["bytes"] += len(data)
        s["low"] = min(s["low"], u)
        s["bins"][u * BINS >> 64] = s["bins"].get(u * BINS >> 64, 0) + len(data)
        if first and (new or u & 0xFFFFFFFF < args.sample * 2.0 ** 32):
            text = data[:SAMPLE_TEXT].decode("utf-8", "ignore")
            s["tokens"] += len(worker.encode(text, False))
            s["text"] += len(text.encode())
    return sources, index + 1, told[0][2]


def count_inputs(args, streams, progress, begun):
    """-> {"inputs": [[path, bytes, SHA-256, documents]], "sources": {source: counts}}; goes on where a kill stopped it.
    begun: shards exist that follow from the count, so it must not change."""
    path, files = os.path.join(args.out, ".counts.json"), [f for _, files in streams for f in files]
    sizes = [[f, os.path.getsize(f)] for f in files]
    total = {"version": 1, "streams": [[name, len(files)] for name, files in streams], "sizes": sizes, "inputs": [],
             "sources": {}}
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            before = json.load(f)
        if begun:
            refuse_changed(args, before["sizes"], sizes)
        if all(before[k] == total[k] for k in ("version", "streams", "sizes")):
            total = before
    done, saved = len(total["inputs"]), time.time()
    progress.done = sum(size for _, size in sizes[:done])
    args.sample, args.rules = min(1.0, SAMPLE / max(sum(size for _, size in sizes), 1)), None
    tasks = [(i, j, f, name) for i, (name, files) in enumerate(streams) for j, f in enumerate(files)]
    for sources, documents, digest in (r for r, _ in in_order(count_file, ((t, None) for t in tasks[done:]), args)):
        for name, new in sources.items():
            old = total["sources"].setdefault(name, {**dict.fromkeys(new, 0), "low": new["low"], "bins": [0] * BINS})
            for key in ("documents", "bytes", "text", "tokens"):
                old[key] += new[key]
            old["low"] = min(old["low"], new["low"])
            for b, n in new["bins"].items():
                old["bins"][b] += n
        if len(total["sources"]) > MAX_SOURCES:
            raise UserError(f"\"{args.mix_key}\" has more than {MAX_SOURCES} values, too many for sources; pass another "
                            "--mix-key")
        progress.done += sizes[done][1]
        total["inputs"].append([*sizes[done], digest, documents])
        done += 1
        progress.show(0)
        if time.time() - saved >= args.save_every or done == len(sizes):
            write_whole(path, json.dumps(total).encode())
            saved = time.time()
    progress.clear()
    return total


def plan_mix(args, weights, counts):
    """Fills args.rules and args.passes; -> {source: what is told of it}. Tokens are those estimated from the sample."""
    seen, edges = counts["sources"], (args.bos_id >= 0) + (args.eos_id >= 0)
    unknown = [n for n in weights or () if n not in seen]
    if unknown:
        some = ", ".join(f"{n} ({s['documents']:,} documents)" for n, s in sorted(seen.items())) or "none"
        raise UserError(f"--mix: no document of {', '.join(unknown)}; the sources seen are {some}")
    names = sorted(seen) if weights is None else list(weights)
    tokens = {n: s["bytes"] * s["tokens"] / max(s["text"], 1) + s["documents"] * edges for n, s in seen.items()}
    if not names or not all(tokens[n] for n in names):
        raise UserError("--mix: no text in the input; nothing to tokenize")

    def below(n, u):        # tokens of the documents with a smaller hash
        bins, at = seen[n]["bins"], u * BINS
        part = sum(bins[:at >> 64]) + (bins[at >> 64] * (at % (1 << 64)) / 2.0 ** 64 if at >> 64 < BINS else 0)
        return part / seen[n]["bytes"] * tokens[n]

    def threshold(n, wanted):       # the hash with so many tokens below it
        left, few = wanted / tokens[n] * seen[n]["bytes"], seen[n]["documents"] < 4 * BINS
        for b, size in enumerate(seen[n]["bins"]):
            if size and left < size:    # a bin with one document or so is taken or not; of many, a part is
                part = max(left, 0) / size
                return (b << 64) // BINS + int((part >= 0.5 if few else part) * 2.0 ** 64) // BINS
            left -= size
        return 1 << 64
    wanted, share, natural = args.val_tokens or args.val_fraction, args.val_fraction, weights is None
    spare = {n: tokens[n] - (min(args.val_tokens, tokens[n] / 10) if args.val_tokens else tokens[n] * share) for n in names}
    weights = weights or {n: tokens[n] / sum(tokens[m] for m in names) for n in names}
    most = lambda have: min(args.repeat * have[n] / weights[n] for n in names)
    total, validates, left = most(spare), {}, {}
    total = min(total, args.train_tokens or total)
    for n in names:         # validation is a share of what the mix takes, whatever the source holds
        distinct = min(weights[n] * total, spare[n])
        part = min(args.val_tokens, distinct / 9) if args.val_tokens else distinct * share / (1 - share)
        validates[n] = threshold(n, part) if wanted else 0
        if wanted and seen[n]["documents"] > 1:         # one at least
            validates[n] = max(validates[n], (seen[n]["low"] * BINS >> 64) + 1 << 64 >> BINS.bit_length() - 1)
        left[n] = max(tokens[n] - below(n, validates[n]), 1e-9)
    if natural:
        weights = {n: left[n] / sum(left.values()) for n in names}
    total, scarce = most(left), min(names, key=lambda n: left[n] / weights[n])
    if args.train_tokens > total:
        raise UserError(f"--train-tokens {args.train_tokens}: {scarce} has about {left[scarce]:,.0f} tokens to train, which "
                        f"at its weight and --repeat {args.repeat:g} is enough for {total:,.0f}; ask for fewer, or pass "
                        f"--repeat {args.train_tokens * weights[scarce] / left[scarce] * 1.01:.3g}")
    total, args.rules, plan = args.train_tokens or total, {}, {}
    for n in names:
        copies = weights[n] * total / left[n]
        whole = int(copies + 1e-9)
        more = threshold(n, below(n, validates[n]) + (copies - whole) * left[n]) if copies - whole > 1e-9 else 0
        args.rules[n] = (validates[n], more, whole)
        plan[n] = {"weight": weights[n], "copies": copies, "documents": seen[n]["documents"], "bytes": seen[n]["bytes"],
                   "tokens_estimated": round(tokens[n])}
    args.passes = max(whole + (more > 0) for _, more, whole in args.rules.values())
    held, wide = sum(tokens.values()), max(map(len, [*seen, "source"]))
    print(f"{'source':{wide}s} {'documents':>12s} {'tokens, about':>16s} {'held':>7s} {'weight':>7s} {'copies':>7s}")
    for n in sorted(seen):
        row = f"{100 * weights[n]:6.2f}% {plan[n]['copies']:7.3f}" if n in plan else "      -  left out"
        print(f"{n:{wide}s} {seen[n]['documents']:12,d} {tokens[n]:16,.0f} {100 * tokens[n] / held:6.2f}% {row}")
    print(f"about {total:,.0f} tokens to train" + ("" if natural or args.train_tokens else
          f": {scarce} is the scarcest for its weight, and is used {plan[scarce]['copies']:.4g} times (--repeat)"),
          flush=True)
    return plan


def file_name(source):
    """The source in the name of a shard, without what a file system or a pattern of the shell may not like."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", source)


class Reader:
    """All documents in the order in which they are written, pass after pass, then those of --val-from. Several streams
    (NAME:PATH sources) are read side by side, each at the same share of its documents."""
    def __init__(self, args, streams, val_streams, progress, totals=None):
        self.args, self.streams, self.val_streams, self.progress, self.totals = args, streams, val_streams, progress, totals
        self.number, self.places, self.inputs = 0, [], []       # pass; Place in each stream; files that were read whole

    def documents(self):
        args, separator = self.args, make_separator(self.args.split_on)
        told = lambda *x: self.inputs.append(list(x))
        once = sum(os.path.getsize(f) for _, files in self.streams for f in files)
        self.progress.done = min(self.number, args.passes) * once
        while self.number <= args.passes:
            streams = self.streams if self.number < args.passes else self.val_streams
            self.places = self.places or [Place() for _ in streams]
            readers = [read_documents(files, separator, args.text_key, self.progress, args.mix_key, place,
                                      told if not self.totals or self.number == args.passes else None)
                       for (_, files), place in zip(streams, self.places)]
            live = list(range(len(streams)))
            behind = lambda i: (self.places[i].before + self.places[i].documents + 0.5) / self.totals[i]
            while live:
                i = min(live, key=behind) if self.totals and len(live) > 1 and self.number < args.passes else live[0]
                for item in readers[i]:
                    chosen = self.choose(i, streams[i][0], item)
                    if chosen:
                        yield chosen
                    if item[2]:
                        break
                else:
                    live.remove(i)
            self.number, self.places = self.number + 1, []

    def choose(self, i, name, item):
        """The item as encode_batch wants it, or None where no source takes it."""
        args, place = self.args, self.places[i]
        if args.rules is None:
            return (-1 if self.number == args.passes else item[0], *item[1:])       # -1: from --val-from
        done = place.documents - (not place.open)       # documents of this file before this one
        u = hash_of(args, i, place.file, done)
        name = name or item[6]
        if any(choose(args, n, u, self.number) for n in ([name] if name else args.rules)):
            return ((u, name, self.number), *item[1:])

    def batches(self):
        """(batch, state): the state after it, or None inside a document."""
        for batch in batches(self.documents()):
            yield batch, None if any(p.open for p in self.places) else {
                "pass": self.number, "places": [vars(p).copy() for p in self.places], "inputs": len(self.inputs)}

    def restore(self, state, inputs):
        self.number, self.places = state["pass"], [Place(**p) for p in state["places"]]
        self.inputs = inputs[:state["inputs"]]
        files = [f for _, files in ([] if self.totals else self.streams) + self.val_streams for f in files]
        now = [[f, os.path.getsize(f)] for f in files[:len(self.inputs)]]
        refuse_changed(self.args, [row[:2] for row in self.inputs], now)


def refuse_changed(args, before, now):
    for old, new in zip(before, now):
        if old != new:
            what = f"had {old[1]:,} bytes, now {new[1]:,}" if old[0] == new[0] else f"was read, now {new[0]}"
            raise UserError(f"the input has changed since this preparation began ({old[0]} {what}); remove {args.out} to "
                            "start anew")
    if len(before) > len(now):
        raise UserError(f"the input has changed since this preparation began ({before[len(now)][0]} is gone); remove "
                        f"{args.out} to start anew")


# ---- Writing -------------------------------------------------------------------------------------------
class Shards:
    """Writes the tokens of one split; .count, .documents, .files, .rows tell what was written."""
    def __init__(self, folder, prefix, args, header):
        self.folder, self.prefix, self.args, self.header = folder, prefix, args, header
        self.file, self.files, self.count, self.documents, self.rows, self.pending = None, [], 0, 0, 0, None
        self.about = []         # of each file: name, bytes, tokens, CRC-32

    def add(self, ids, first, last):
        self.count += len(ids)
        self.documents += first
        if self.args.format == "ds":
            return self.add_rows(ids)
        while len(ids):
            room = 2 * self.args.shard_tokens - (self.in_shard if self.file else 0)
            self.write(ids[:room])
            ids = ids[room:]
            if self.in_shard >= 2 * self.args.shard_tokens:
                self.close()
        if last and self.file and self.in_shard >= self.args.shard_tokens:
            self.close()

    def add_rows(self, ids):
        """Row i holds tokens iT .. iT+T of the stream, the same windows that a .bin gives."""
        np, T = need("numpy"), self.args.seq_len
        self.pending = ids if self.pending is None else np.concatenate([self.pending, ids])
        rows = (len(self.pending) - 1) // T
        if rows > 0:
            windows = np.lib.stride_tricks.sliding_window_view(self.pending, T + 1)[::T]
            step = max(1, self.args.shard_tokens // T)
            while rows > 0:
                take = min(rows, step - (self.in_shard // T if self.file else 0))
                self.write(np.ascontiguousarray(windows[:take]).reshape(-1), take * T)
                windows, rows, self.rows = windows[take:], rows - take, self.rows + take
                if self.in_shard >= step * T:
                    self.close()
            self.pending = self.pending[(len(self.pending) - 1) // T * T:].copy()

    def name_file(self):
        name = f"{self.prefix}_{len(self.files):03d}.{self.args.format}"
        self.final, self.temporary = (os.path.join(self.folder, n) for n in (name, f".{name}.tmp"))

    def write(self, ids, tokens=None):
        if not self.file:
            os.makedirs(self.folder, exist_ok=True)
            self.name_file()
            self.file, self.in_shard, self.crc = open(self.temporary, "wb", BATCH), 0, 0
            if self.args.format == "bin":
                self.file.write(bytes(1024))
        data = memoryview(ids).cast("B") if len(ids) else b""
        self.file.write(data)
        self.crc = zlib.crc32(data, self.crc)
        self.in_shard += len(ids) if tokens is None else tokens

    def close(self):
        if not self.file:
            return
        if self.args.format == "bin":
            self.file.seek(0)
            self.file.write(self.header(self.in_shard, self.crc))
        size = self.sync()
        self.file.close()
        os.replace(self.temporary, self.final)
        self.file = None
        self.files.append(self.final)
        self.about.append([os.path.relpath(self.final, self.args.out), size, self.in_shard, self.crc])

    def sync(self):
        """All that was written is on the disk; -> bytes of the open file."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def state(self):
        """What restore() needs to go on from here, also after the machine stopped."""
        size = self.sync() if self.file else 0
        return {"size": size, "in_shard": self.in_shard if self.file else 0, "crc": self.crc if self.file else 0,
                "about": self.about, "count": self.count, "documents": self.documents, "rows": self.rows,
                "pending": None if self.pending is None else [int(i) for i in self.pending]}

    def restore(self, state):
        """Takes away what was written after state(): the end of the open file, and files that came later."""
        np = need("numpy")
        self.about, self.count, self.documents, self.rows = (state[k] for k in ("about", "count", "documents", "rows"))
        self.files = [os.path.join(self.args.out, row[0]) for row in self.about]
        if state["pending"] is not None:
            self.pending = np.array(state["pending"], f"<u{self.args.token_bytes}")
        self.name_file()
        if state["size"] and not os.path.exists(self.temporary) and os.path.exists(self.final):
            os.replace(self.final, self.temporary)          # it was finished after state()
        ours = re.compile(rf"\.?{re.escape(self.prefix)}_(\d{{3,}})\.{self.args.format}(\.tmp)?")
        for name in os.listdir(self.folder) if os.path.isdir(self.folder) else ():
            m = ours.fullmatch(name)
            if m and int(m[1]) >= len(self.files) and not (state["size"] and name == os.path.basename(self.temporary)):
                os.unlink(os.path.join(self.folder, name))
        for path, size in [(f, row[1]) for f, row in zip(self.files, self.about)] + [(self.temporary, state["size"])]:
            if size and not (os.path.exists(path) and os.path.getsize(path) >= size):
                raise UserError(f"{path} is missing or too short, so this preparation cannot go on; remove {self.args.out} "
                                "to start anew")
        if state["size"]:
            self.file, self.in_shard, self.crc = open(self.temporary, "r+b", BATCH), state["in_shard"], state["crc"]
            self.file.truncate(state["size"])
            if self.args.format == "bin":
                self.file.write(bytes(1024))            # no magic before it is whole
            self.file.seek(state["size"])

    def abandon(self, keep=False):
        """keep: a saved state counts on the file."""
        with contextlib.suppress(OSError):
            if self.file:
                if not keep:
                    os.unlink(self.temporary)
                self.file.close()


class Progress:
    """One line on stderr, redrawn: share, bytes read of total, rates, time left. Quiet in a log file."""
    def __init__(self, total):
        self.total, self.done, self.start, self.shown = total, 0, time.time(), time.time()
        self.tty = sys.stderr.isatty()

    def show(self, tokens, force=False):
        now = time.time()
        if not force and now - self.shown < (0.2 if self.tty else 30):
            return
        self.shown, spent = now, max(now - self.start, 1e-6)
        share = self.done / max(self.total, 1)
        left = int(spent / share - spent) if share > 0 else 0
        line = (f"[{'#' * int(20 * share):20s}] {100 * share:3.0f}%  {self.done / 1e6:.1f}/{self.total / 1e6:.1f} MB"
                f"  {self.done / spent / 1e6:.1f} MB/s  {tokens / spent / 1e6:.2f} Mtok/s"
                f"  ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}")
        print("\r\033[K" + line if self.tty else line, end="" if self.tty else "\n", file=sys.stderr, flush=True)

    def clear(self):
        if self.tty:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def split_folders(args):
    """Where the training and the validation shards lie."""
    return [os.path.join(args.out, n) for n in ("train", "validation")] if args.format == "ds" else [args.out] * 2


# Where nothing is written yet these may change, and the count of a mix still serves.
COUNT_SERVES = ("mix", "repeat", "train_tokens", "val_fraction", "val_tokens", "val_from", "shard_tokens")


def lock_folder(folder):
    """Makes the folder, and keeps a second run out of it until this process ends: both would write the same files."""
    os.makedirs(folder, exist_ok=True)
    try:
        import fcntl
    except ImportError:         # not on this system
        return
    lock = os.open(folder, os.O_RDONLY)         # stays open
    for attempt in range(30):
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)     # the workers of a killed run need a moment to leave
        except OSError:         # not on this file system
            return
    raise UserError(f"{folder} is in use by another run; wait for its end, or choose another --out")


def claim_folder(args, options, resume=False, name="tokens.json", files=()):
    """An empty folder, or one that the same command filled before: its shards are then written anew. resume: -> the
    state that a killed run saved, whose shards are kept, or None; or "complete", where there is nothing to do.
    files: the input, as it is now."""
    out, state, saved = args.out, os.path.join(args.out, name), None
    lock_folder(out)
    if set(os.listdir(out)) - {name + ".tmp"}:       # which a kill at the start leaves
        if not os.path.exists(state):
            raise UserError(f"{out} is not empty and holds no {name}; choose another --out")
        with open(state, encoding="utf-8") as f:
            before = json.load(f)
        begun = not resume or before.get("complete") or os.path.exists(os.path.join(out, ".state.json"))
        for key in options:
            if before["options"].get(key) != options[key] and (begun or key not in COUNT_SERVES):
                raise UserError(f"{out} was made with other options ({key} = {before['options'].get(key)}, now "
                                f"{options[key]}); choose another --out or remove the folder")
        for folder in split_folders(args):
            if folder != out and os.path.exists(os.path.join(folder, "tokens.json")):
                raise UserError(f"{folder} holds another preparation (tokens.json); choose another --out")
        if resume and before.get("complete"):
            if is_whole(args, files):
                return "complete"
            print(f"note: {out} was complete, but its input or shards are no longer those of its manifest.json: it is made "
                  "anew", file=sys.stderr)
        elif resume and os.path.exists(os.path.join(out, ".state.json")):
            with open(os.path.join(out, ".state.json"), encoding="utf-8") as f:
                saved = json.load(f)
            if saved["version"] != 1:
                raise UserError(f"{out} was begun by another version of tokens.py; remove it to start anew")
        if not saved:
            remove_shards(args)
            if begun:
                remove_files(out, ".counts.json")
    if not saved:
        write_whole(state, json.dumps({"options": options, "complete": False}, indent=1).encode())
    return saved


def is_whole(args, files):
    """The input is that of manifest.json (by the bytes, where a file is newer), and every shard is there with its size."""
    try:
        with open(os.path.join(args.out, "manifest.json"), encoding="utf-8") as f:
            manifest = json.load(f)
        made = os.path.getmtime(os.path.join(args.out, "tokens.json"))
        return (sorted(files) == sorted(row["path"] for row in manifest["inputs"])
                and all(os.path.getsize(os.path.join(folder, row["path"])) == row["bytes"]
                        for folder, key in (("", "inputs"), (args.out, "shards")) for row in manifest[key])
                and all(os.path.getmtime(row["path"]) <= made or file_hash(row["path"]) == row["sha256"]
                        for row in manifest["inputs"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def remove_files(folder, *names):
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, name))


def remove_shards(args):
    """Of this preparation only: what lies in other folders below --out is not ours."""
    remove_files(args.out, ".state.json")           # first: it counts on the shards
    sources = "(_[A-Za-z0-9._-]+)?" if getattr(args, "mix", None) else ""
    for folder, prefix in zip(split_folders(args), ("train", "val" + sources)):
        ours = re.compile(rf"\.?{prefix}_\d{{3,}}\.{args.format}(\.tmp)?")
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            if ours.fullmatch(name) or name == "metadata.json" and args.format == "ds":
                os.unlink(os.path.join(folder, name))


def in_validation(document, args):
    if document == 0:
        return False
    share = 0.1 if args.val_tokens else args.val_fraction
    digest = hashlib.blake2b(f"{args.seed}:{document}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2.0 ** 64


def write_shards(args, reader, vocab, progress, plan=None, saved=None, train_tokens=None):
    """-> (train, {source: val}, bytes of text, {source: [documents, tokens] of train}). Goes on from the state `saved`.
    train_tokens: so many, then validation; None: each document as in_validation or the mix says."""
    def header(count, crc):
        magic = (20240520, 1) if args.token_bytes == 2 else (20240801, 7)
        return struct.pack("<4iIi", *magic, count, vocab, crc, args.eos_id + 1) + bytes(1000)
    folders = split_folders(args)
    train = Shards(folders[0], "train", args, header)
    vals = {n: Shards(folders[1], f"val_{file_name(n)}" if plan else "val", args, header) for n in plan or [None]}
    everything = {s.prefix: s for s in [train, *vals.values()]}
    if len(everything) <= len(vals):
        raise UserError("two sources have the same name in that of a file: " + ", ".join(map(str, vals)))
    val, split, text_bytes, trained, stamp = vals.get(None), train, 0, {n: [0, 0] for n in plan or ()}, time.monotonic()
    kept = saved is not None
    if saved:
        for prefix, state in saved["splits"].items():
            everything[prefix].restore(state)
        reader.restore(saved["reader"], saved["inputs"])
        text_bytes, trained = saved["text_bytes"], saved["trained"]
        count = sum(s.documents for s in everything.values())
        tokens = sum(s.count for s in everything.values())
        print(f"goes on after {count:,} documents, {tokens:,} tokens", flush=True)
    try:
        for (ids, spans), state in in_order(encode_batch, reader.batches(), args):
            at = 0
            for document, count, first, last, size, part in spans:
                if part:
                    split = train if part[1] == "train" else vals[part[0]]
                    split.add(ids[at:at + count], first, last)
                    if split is train:
                        trained[part[0]][0] += first
                        trained[part[0]][1] += count
                elif train_tokens is not None:
                    here = min(count, train_tokens - train.count)
                    train.add(ids[at:at + here], first, last and here == count)
                    if here < count:
                        val.add(ids[at + here:at + count], first or here > 0, last)
                else:
                    if first:
                        split = val if document < 0 or in_validation(document, args) and not (
                            args.val_tokens and val.count >= args.val_tokens) else train
                    split.add(ids[at:at + count], first, last)
                at, text_bytes = at + count, text_bytes + size
            progress.show(sum(s.count for s in everything.values()))
            if state and time.monotonic() - stamp >= args.save_every:
                write_whole(os.path.join(args.out, ".state.json"), json.dumps(
                    {"version": 1, "train_tokens": train_tokens, "reader": state, "text_bytes": text_bytes,
                     "trained": trained, "inputs": reader.inputs[:state["inputs"]],
                     "splits": {p: s.state() for p, s in everything.items()}}).encode())
                for folder in set(folders):
                    sync_folder(folder)
                kept, stamp = True, time.monotonic()
        if not train.count:
            raise UserError(f"no text in {', '.join(args.inputs[:3]) or args.mix}: nothing to tokenize")
        if args.format == "ds" and not train.rows:
            raise UserError(f"{train.count} training tokens fill no row of {args.seq_len} + 1; use a smaller --seq-len")
        for s in everything.values():
            s.close()
    except OSError as e:
        raise UserError(f"{e.filename}: {e.strerror}" if e.filename else
                        f"{args.out}: {e.strerror}; free space or choose another --out")
    finally:
        for s in everything.values():
            s.abandon(kept)
        progress.clear()
    return train, vals, text_bytes, trained


def last_share(args, tokens):
    """How much of so many tokens the end of the text gives to validation: the share asked for, but enough to measure
    with (a tenth, up to 4,096 tokens, and a row), and never more than half."""
    share = min(args.val_tokens, tokens // 10) if args.val_tokens else round(args.val_fraction * tokens)
    return min(max(share, min(tokens // 10, 4096), args.seq_len + 1), tokens // 2)


def prepare(args):
    need("numpy")
    tokenizer = load_tokenizer(args.tokenizer, args.tiktoken_pattern)
    tokenizer.encoder()              # a missing library is told before any work
    make_separator(args.split_on)
    weights, streams = parse_mix(args) if args.mix else (None, [(None, args.inputs)])
    val_streams = [(n, find_inputs(paths)) for n, paths in parse_val_from(args, streams)]
    streams = [(n, find_inputs(paths)) for n, paths in streams]
    total, val_total = (sum(os.path.getsize(f) for _, files in some for f in files) for some in (streams, val_streams))
    args.jobs = max(1, min(args.jobs, total // (4 * BATCH)))
    args.bos_id = boundary(args.bos, tokenizer, tokenizer.bos, tokenizer.add_bos, "--bos")
    args.eos_id = boundary(args.eos, tokenizer, tokenizer.eos, True, "--eos")
    vocab, (export, crc) = len(tokenizer.pieces), tokenizer_bin(tokenizer)
    args.token_bytes = args.token_bytes or (2 if vocab <= 65536 else 4)
    options = {k: v for k, v in vars(args).items() if k not in ("jobs", "out", "inspect", "export_tokenizer", "save_every")}
    options["tokenizer_crc"] = crc
    for key, unused in (("val_from", []), ("train_tokens", 0)):     # as in folders that were made before these came
        options[key] = options[key] if options[key] != unused else None
    files = [f for _, some in streams + val_streams for f in some]
    saved = claim_folder(args, options, resume=True, files=files)
    if saved == "complete":
        print(f"{args.out} is complete already; remove it to make it anew")
        return
    counts, plan, args.rules, args.passes = None, None, None, 1
    if args.mix:
        counts = count_inputs(args, streams, Progress(total), begun=saved is not None)
        plan = plan_mix(args, weights, counts)
    progress, wanted = Progress(total * args.passes + val_total), args.val_tokens or args.val_fraction
    totals, done = [], 0
    for _, files in streams if counts else ():      # documents of each stream
        totals.append(sum(row[3] for row in counts["inputs"][done:done + len(files)]))
        done += len(files)
    reader = Reader(args, streams, val_streams, progress, totals)
    written = not (saved and saved["train_tokens"]) and write_shards(args, reader, vocab, progress, plan, saved)
    count = written[0].count if written else 0
    if not written or not plan and wanted and not written[1][None].count and count >= 2 * (args.seq_len + 2):
        if written:
            remove_shards(args)
            saved = None
        progress.done, reader = 0, Reader(args, streams, val_streams, progress)
        written = write_shards(args, reader, vocab, progress, None, saved,
                               saved["train_tokens"] if saved else count - last_share(args, count))
        last = written[1][None].count
        print(f"note: no document fell to validation, so the last {last:,} of {written[0].count + last:,} tokens did",
              file=sys.stderr)
    finish(args, options, tokenizer, export, reader, counts, plan, *written)
    val = written[1].get(None)
    if val and wanted and (val.rows * args.seq_len if args.format == "ds" else val.count) < (args.val_tokens or 1):
        print(f"note: validation got {val.count} tokens of {written[0].documents + val.documents} documents; for more use a "
              "larger --val-fraction, or more documents (--split-on)", file=sys.stderr)
    none = [n for n, v in written[1].items() if plan and (wanted or val_streams) and not v.files]
    if none:
        print(f"note: no validation shard for {', '.join(none)}: " + ("--val-from holds nothing of it" if val_streams else
              "too few documents or tokens; use a larger --val-fraction"), file=sys.stderr)


def finish(args, options, tokenizer, export, reader, counts, plan, train, vals, text_bytes, trained):
    """Side files, manifest.json, at last tokens.json; and what is told of them."""
    val = argparse.Namespace(folder=split_folders(args)[1], **{k: sum(getattr(v, k) for v in vals.values()) for k in (
        "count", "documents", "rows")}, files=[f for v in vals.values() for f in v.files])
    side_files = tokenizer.side_files()
    for split, name in ((train, "train"), (val, "validation")):
        if split.files:
            finish_folder(split, name, args, tokenizer, {"tokenizer.bin": export, **side_files})
    about = lambda s: {"documents": s.documents, "tokens": s.count, "rows": s.rows, "shards": len(s.files)}
    done = {"train": about(train), "val": about(val)}
    inputs = (counts["inputs"] if counts else []) + reader.inputs
    manifest = {"tokenizer": {"name": tokenizer.name, "sha256": None if args.tokenizer == "bytes" else
                              file_hash(args.tokenizer), "pieces": len(tokenizer.pieces),
                              "tokenizer_bin_crc32": options["tokenizer_crc"]},
                "documents_read": sum(row[3] for row in inputs), "text_bytes_written": text_bytes, **done}
    if plan:
        for n, row in plan.items():
            row.update(achieved=trained[n][1] / train.count, train={"documents": trained[n][0], "tokens": trained[n][1]},
                       validation=about(vals[n]))
        manifest["sources"] = plan
        manifest["left_out"] = {n: s["documents"] for n, s in sorted(counts["sources"].items()) if n not in plan}
    else:
        manifest["documents_without_text"] = manifest["documents_read"] - train.documents - val.documents
    shards = [row for s in [train, *vals.values()] for row in s.about]
    manifest["shards"] = [dict(zip(("path", "bytes", "tokens", "crc32"), row)) for row in shards]
    manifest["inputs"] = [dict(zip(("path", "bytes", "sha256", "documents"), row)) for row in inputs]
    write_whole(os.path.join(args.out, "manifest.json"), json.dumps(manifest, indent=1).encode())
    write_whole(os.path.join(args.out, "tokens.json"), json.dumps(
        {"options": options, "complete": True, **done, **({"sources": plan} if plan else {})}, indent=1).encode())
    remove_files(args.out, ".state.json", ".counts.json")
    if plan:
        wide = max(map(len, [*plan, "source"]))
        print(f"{'source':{wide}s} {'asked':>7s} {'is':>7s} {'train documents':>16s} {'tokens':>16s} {'val documents':>14s} "
              f"{'tokens':>14s}")
        for n, row in plan.items():
            print(f"{n:{wide}s} {100 * row['weight']:6.2f}% {100 * row['achieved']:6.2f}% {trained[n][0]:16,d} "
                  f"{trained[n][1]:16,d} {vals[n].documents:14,d} {vals[n].count:14,d}")
    for name, s in (("train", train), ("val", val)):
        tail = f", {s.rows:,} rows, last {s.count - s.rows * args.seq_len:,} tokens in no row" * (args.format == "ds")
        print(f"{name:5s} | {s.documents:,} documents | {s.count:,} tokens{tail} | {len(s.files)} shards")
    print(f"vocabulary {len(tokenizer.pieces)}, uint{8 * args.token_bytes}, "
          f"{text_bytes / (train.count + val.count):.2f} bytes per token, {time.time() - reader.progress.start:.1f} s "
          f"-> {args.out}")


def boundary(choice, tokenizer, usual, wanted, option):
    """The token id that --bos/--eos auto|on|off|PIECE means, or -1."""
    if choice == "off" or choice == "auto" and not (wanted and usual >= 0):
        return -1
    if choice in ("on", "auto"):
        if usual < 0:
            raise UserError(f"{option} on: {tokenizer.name} names no such token; pass {option} off or {option} PIECE")
        return usual
    if choice.encode() not in tokenizer.pieces:
        raise UserError(f"{option} {choice}: no such piece in {tokenizer.name}")
    return tokenizer.pieces.index(choice.encode())


def finish_folder(split, name, args, tokenizer, files):
    for target, data in files.items():
        write_whole(os.path.join(split.folder, target), data)
    if args.format == "ds":
        meta = {"dataset": os.path.basename(os.path.abspath(args.out)), "split": name, "tokenizer": tokenizer.name,
                "vocab_size": len(tokenizer.pieces), "sequence_length": args.seq_len,
                "token_size_bytes": args.token_bytes, "total_sequences": split.rows,
                "total_tokens": split.rows * (args.seq_len + 1), "eos_token_id": args.eos_id}
        write_whole(os.path.join(split.folder, "metadata.json"), json.dumps(meta, indent=1).encode())
    sync_folder(split.folder)


def sync_folder(folder):
    """The renames themselves reach the disk."""
    if hasattr(os, "O_DIRECTORY") and os.path.isdir(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(fd)
        os.close(fd)


# ---- Looking -------------------------------------------------------------------------------------------
def read_tokenizer_bin(path):
    with open(path, "rb") as f:
        data = f.read()
    magic, version, kind, size, bos, eos, prefix, _ = struct.unpack_from("<8i", data)
    if magic != 20251002 or version not in (1, 2):
        raise UserError(f"{path}: not a litespark tokenizer.bin")
    at, pieces = 32 + (4 + 4 * struct.unpack_from("<i", data, 32)[0] if version == 2 else 0), []
    for _ in range(size):
        length = struct.unpack_from("<i", data, at + 4)[0]
        pieces.append(data[at + 8:at + 8 + length])
        at += 8 + length
    return pieces, bos, eos, prefix


def decode(ids, pieces, bos, eos):
    out = [b"" if i in (bos, eos) else pieces[i] for i in map(int, ids)]
    return b"".join(bytes([int(p[3:5], 16)]) if re.fullmatch(rb"<0x[0-9A-F]{2}>", p) else p for p in out)


def beside(path, name):
    folder = os.path.dirname(os.path.abspath(path))
    return next((p for p in (os.path.join(folder, name), os.path.join(folder, "..", name)) if os.path.exists(p)), None)


def inspect(path):
    np, size = need("numpy"), os.path.getsize(path)
    meta, word, skip, row, crc = beside(path, "metadata.json"), [0] * 6, 0, 1, 0
    if path.endswith(".ds"):
        if not meta:
            raise UserError(f"{path}: no metadata.json beside it, so its row length is unknown")
        with open(meta, encoding="utf-8") as f:
            meta = json.load(f)
        if "stage" in meta:
            raise UserError(f"{path}: flagged rows of stage {meta['stage']}; use data/chat.py --inspect")
        width, vocab, row = meta["token_size_bytes"], meta["vocab_size"], meta["sequence_length"] + 1
        eod, count = meta.get("eos_token_id", -1), size // width
        print(f"{path}: {count // row:,} rows of {row - 1} + 1 tokens, uint{8 * width}, vocabulary {vocab}")
        if size % (width * row):
            raise UserError(f"{path}: {size} bytes are not whole rows of {row} tokens; write the shard again")
    else:
        with open(path, "rb") as f:
            head = f.read(1024)
        word = struct.unpack("<4iIi", head[:24]) if len(head) == 1024 else word
        width, skip = {(20240520, 1): 2, (20240801, 7): 4}.get(tuple(word[:2]), 0), 1024
        if not width:
            raise UserError(f"{path}: not a token shard (no llm.c or litespark header)")
        count, vocab, eod = word[2], word[3], word[5] - 1
        print(f"{path}: {count:,} tokens, uint{8 * width}, vocabulary {vocab or 'unknown'}, "
              f"end of document {eod if eod >= 0 else 'unknown'}")
        if size != 1024 + count * width:
            raise UserError(f"{path}: {size} bytes, but the header promises {1024 + count * width}; write the shard again")
    ids = np.memmap(path, f"<u{width}", "r", skip, (count,)) if count else np.zeros(0, np.uint16)
    top, documents, step = -1, 0, max(1, (1 << 22) // row) * row
    for at in range(0, count, step):
        block = np.array(ids[at:at + step])
        crc, top = zlib.crc32(block, crc), max(top, int(block.max()))
        # the first token of a row is also the last one of the row before
        documents += int((block.reshape(-1, row)[:, 1 if row > 1 else 0:] == eod).sum())
    print(f"largest id {top}, {documents if eod >= 0 else 'unknown'} documents end here, CRC-32 {crc:08x} "
          + ("(not recorded)" if not word[4] else "= recorded" if word[4] == crc else f"but {word[4]:08x} recorded"))
    if word[4] and word[4] != crc:
        raise UserError(f"{path}: checksum differs, the shard is damaged; write it again")
    if vocab and top >= vocab:
        raise UserError(f"{path}: token id {top} is outside the vocabulary of {vocab}; write the shard again")
    tokenizer = beside(path, "tokenizer.bin")
    if tokenizer:
        pieces, bos, eos, _ = read_tokenizer_bin(tokenizer)
        text = decode([i for i in ids[:1000] if i < len(pieces)], pieces, bos, eos).decode("utf-8", "replace")
        print(f"starts with: {text[:200]!r}")


# ---- Command line --------------------------------------------------------------------------------------
MIX_HELP = """A weight is a share of the tokens to train; weights are divided by their sum. Documents are drawn by a hash of
--seed and their place, none twice before each was taken once. The total is as large as the source that is scarcest
for its weight allows: that one is used whole (R times with --repeat R), of the others as much as fits; with
--train-tokens N it is about N, or an error where a source holds too little for R times. A source that is used 2.3
times has each document 2 or 3 times. Tokens are known beforehand from a first pass over the input, which counts the
text of each source and encodes a sample of it, so shares come out to about one part in a hundred. Sources that
--mix does not name are left out; 'natural' takes every document once. Validation is a share of each source's
chosen documents; they never train, and lie in shards val_SOURCE_000, ... of their own."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def parse(argv):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("inputs", nargs="*", metavar="INPUT")
    p.add_argument("--out", metavar="DIR", help="new or empty folder (a file for --export-tokenizer)")
    p.add_argument("--tokenizer", default="bytes", metavar="bytes|FILE", help="SentencePiece model, tiktoken ranks or "
                   "tokenizer.json, told apart by content (default: bytes)")
    p.add_argument("--tiktoken-pattern", choices=list(RANKS), help="how tiktoken ranks split words "
                   "(default: that of the published file)")
    p.add_argument("--format", choices=["bin", "ds"], default="bin")
    p.add_argument("--seq-len", type=int, default=0, metavar="N", help="row length, ds only")
    p.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="a shard ends with the document "
                   "that reaches N (default 100,000,000), at the latest at 2N")
    p.add_argument("--val-fraction", type=float, metavar="F", help="share of documents (default 0.01)")
    p.add_argument("--val-tokens", type=int, default=0, metavar="N", help="instead: every tenth document until N tokens; "
                   "with --mix about N tokens of each source, at most a tenth of what the mix takes of it")
    p.add_argument("--val-from", action="append", default=[], metavar="PATH", help="instead: all of another file or folder, "
                   "such as SlimPajama-627B/validation; may be repeated (NAME:PATH where --mix has NAME:PATH)")
    p.add_argument("--seed", type=int, default=1, help="of the train/validation split")
    p.add_argument("--text-key", default="text", metavar="KEY", help="of JSON lines, or column of a table")
    mix = p.add_argument_group("mixing sources", MIX_HELP)
    mix.add_argument("--mix", metavar="SPEC", help="NAME=WEIGHT,... for documents that tell their source; or "
                     "NAME:PATH=WEIGHT,... without INPUT, one source a path; or natural")
    mix.add_argument("--mix-key", metavar="KEY", help="where a document tells its source (default meta.redpajama_set_name)")
    mix.add_argument("--train-tokens", type=int, default=0, metavar="N", help="about so many tokens to train")
    mix.add_argument("--repeat", type=float, metavar="R", help="use no source more than R times (default 1)")
    p.add_argument("--split-on", default="whole-file", metavar="REGEX", help="a .txt holds documents between lines that "
                   "equal or match this; or blank-lines; or whole-file (default)")
    p.add_argument("--bos", default="auto", metavar="on|off|PIECE", help="before each document (default: on for "
                   "SentencePiece and for tokenizer.json files that do so themselves)")
    p.add_argument("--eos", default="auto", metavar="on|off|PIECE", help="after each document (default: on)")
    p.add_argument("--token-bytes", type=int, choices=[2, 4], default=0, help="(default: 2 if the vocabulary fits)")
    p.add_argument("--errors", choices=["strict", "replace"], default="strict", help="for text that is not UTF-8")
    p.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="worker processes")
    p.add_argument("--save-every", type=float, default=30, metavar="SECONDS", help="the same command goes on from what was "
                   "saved last (default 30)")
    p.add_argument("--inspect", metavar="FILE", help="print what a .bin or .ds shard holds")
    p.add_argument("--export-tokenizer", metavar="MODEL", help="only write MODEL as tokenizer.bin to --out FILE")
    args = p.parse_args(argv)
    if args.inspect:
        return args
    if not args.out:
        raise UserError("--out is missing; see --help")
    if not args.inputs and not args.export_tokenizer and not (args.mix and args.mix != "natural"):
        raise UserError("no INPUT; name .txt or .jsonl files or folders, or see --help")
    if args.mix == "":
        raise UserError("--mix is empty; name NAME=WEIGHT,... or natural, or leave it out")
    if not args.mix and (args.mix_key or args.train_tokens or args.repeat is not None):
        raise UserError("--mix-key, --train-tokens and --repeat go with --mix ('natural' takes the sources as they are)")
    if args.val_from and (args.val_tokens or args.val_fraction):
        raise UserError("--val-from goes instead of --val-fraction and --val-tokens; pass one of them")
    if args.val_fraction is None:
        args.val_fraction = 0.0 if args.val_from else 0.01
    if args.mix:
        args.repeat = 1.0 if args.repeat is None else args.repeat
        args.mix_key = (args.mix_key or "meta.redpajama_set_name") if args.inputs else None
        if not 1 <= args.repeat <= 1000 or args.train_tokens < 0:
            raise UserError("out of range: --repeat 1..1000, --train-tokens >= 0")
    if (args.format == "ds") != (args.seq_len > 0):
        raise UserError("--seq-len N (at least 1) goes with --format ds, and only with it")
    if not args.save_every >= 0:
        raise UserError("out of range: --save-every >= 0")
    if not 1 <= args.shard_tokens <= 1 << 30 or args.jobs < 1 or args.val_tokens < 0 or not 0 <= args.val_fraction < 1:
        raise UserError("out of range: --shard-tokens 1..2^30, --jobs >= 1, --val-tokens >= 0, --val-fraction 0..1")
    return args


def main(argv):
    try:
        args = parse(argv)
        if args.inspect:
            inspect(args.inspect)
        elif args.export_tokenizer:
            tokenizer = load_tokenizer(args.export_tokenizer, args.tiktoken_pattern)
            if os.path.exists(args.out):
                with open(args.out, "rb") as f:
                    if f.read(4) != struct.pack("<i", 20251002):
                        raise UserError(f"{args.out} is there and is no tokenizer.bin; choose another --out")
            write_whole(args.out, tokenizer_bin(tokenizer)[0])
            print(f"{args.out}: {len(tokenizer.pieces)} pieces, bos {tokenizer.bos}, eos {tokenizer.eos}")
        else:
            prepare(args)
        return 0
    except UserError as e:
        message = e
    except OSError as e:
        message = f"{e.filename}: {e.strerror}"
    except MemoryError:
        message = "out of memory; use a smaller --jobs"
    except KeyboardInterrupt:
        message = "interrupted; the same command goes on"
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
