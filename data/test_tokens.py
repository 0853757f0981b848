#!/usr/bin/env python3
"""Tests of data/tokens.py.

    python3 data/test_tokens.py            # all; the last line is "N passed, N failed"
    python3 data/test_tokens.py split kill # only the tests whose name contains one of these words

The oracles are the input text itself (decoded shards equal it), the tokenizer libraries called on whole documents,
and a plain reimplementation of the tokenizer.bin merge rule. Files of ../shared/data are used where they exist.
"""
import base64, bz2, contextlib, ctypes, gzip, hashlib, importlib, json, lzma, os, random, resource, shutil, signal, struct
import subprocess, sys, tempfile, time, zlib

HERE = os.path.dirname(os.path.abspath(__file__))
SHARED = os.path.join(HERE, "..", "..", "shared", "data")
SCRIPT, TRAINER = os.path.join(HERE, "tokens.py"), os.path.join(HERE, "..", "train_litespark.c")
passed, failed = 0, 0


def check(what, ok, more=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAILED {what} {more}")


class Skip(Exception):
    pass


def library(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Skip(f"{name} is missing (pip install {name})")


def shared(path):
    full = os.path.join(SHARED, path)
    if not os.path.exists(full):
        raise Skip(f"shared/data/{path} is not here")
    return full


# ---- Running the script, reading its output by other code than its own ----------------------------------
def run(*args, **kw):
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, **kw)


def must(*args):
    r = run(*args)
    check(f"exit 0 of {args}", r.returncode == 0, r.stderr)
    return r.stdout


def refused(name, words, *args, **kw):
    """One line "error: ...", exit 1, and the line names what matters."""
    r = run(*args, **kw)
    ok = r.returncode == 1 and r.stderr.count("\n") == 1 and r.stderr.startswith("error: ")
    check(f"{name}: one line", ok, f"exit {r.returncode}: {r.stderr}")
    check(f"{name}: names {words}", all(w in r.stderr for w in words), r.stderr)


def save(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(text if isinstance(text, bytes) else text.encode())
    return path


def read_bin(path):
    with open(path, "rb") as f:
        data = f.read()
    head = struct.unpack("<256i", data[:1024])
    width = {(20240520, 1): "H", (20240801, 7): "I"}[head[:2]]
    ids = struct.unpack(f"<{head[2]}{width}", data[1024:])
    check(f"{path}: CRC", head[4] & 0xFFFFFFFF == zlib.crc32(data[1024:]))
    check(f"{path}: the rest of the header is 0", not any(head[6:]))
    check(f"{path}: ids below the vocabulary", max(ids) < head[3])
    return list(ids), head


def shard_ids(out, prefix):
    return [t for n in sorted(os.listdir(out)) if n.startswith(prefix + "_") for t in read_bin(os.path.join(out, n))[0]]


def read_tokenizer(path):
    with open(path, "rb") as f:
        data = f.read()
    magic, version, kind, size, bos, eos, prefix, words = struct.unpack_from("<8i", data)
    at, pieces, scores = 32, [], []
    check("tokenizer.bin header", magic == 20251002 and version in (1, 2) and (version == 2 or words == 0 and prefix < 2))
    if version == 2:
        rows = struct.unpack_from(f"<{struct.unpack_from('<i', data, 32)[0]}I", data, 36)
        check("classes ascend from 0", not words or rows[0] & 0xFFFFFF == 0 and all(
            a & 0xFFFFFF < b & 0xFFFFFF and a >> 24 != b >> 24 for a, b in zip(rows, rows[1:])))
        at += 4 + 4 * len(rows)
    for _ in range(size):
        score, n = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8:at + 8 + n])
        scores.append(score)
        at += 8 + n
    check("tokenizer.bin ends with its last piece", at == len(data))
    return kind, pieces, scores, bos, eos, prefix


def plain(tok, ids):
    """Tokens -> bytes, as the contract says: BOS and EOS print nothing, "<0xHH>" is that byte."""
    kind, pieces, scores, bos, eos, prefix = tok
    out = b""
    for p in (pieces[i] for i in ids if i not in (bos, eos)):
        out += bytes([int(p[3:5], 16)]) if len(p) == 6 and p.startswith(b"<0x") else p
    return out[1:] if prefix and out[:1] == b" " else out


def documents(ids, tok):
    out, one = [], []
    for i in ids:
        if i == tok[4]:
            out.append(plain(tok, one))
            one = []
        else:
            one.append(i)
    check("the last document is closed", not one)
    return out


def merge_encode(tok, text):
    """The kind 0 rule: code points, bytes where one is no piece; then join the pair whose union scores highest."""
    kind, pieces, scores, bos, eos, prefix = tok
    index = {p: i for i, p in reversed(list(enumerate(pieces)))}
    ids = []
    for c in (" " if prefix else "") + text:
        c = c.encode()
        ids += [index[c]] if c in index else [index.get(b"<0x%02X>" % b, index.get(bytes([b]))) for b in c]
    while True:
        best = (-1e10, None, None)
        for k in range(len(ids) - 1):
            joined = index.get(pieces[ids[k]] + pieces[ids[k + 1]])
            if joined is not None and scores[joined] > best[0]:
                best = (scores[joined], k, joined)
        if best[1] is None:
            return ids
        ids[best[1]:best[1] + 2] = [best[2]]


def sample_texts(n=300, seed=7):
    """Documents with what goes wrong elsewhere: spaces at ends, newlines, other scripts, emoji, marks, specials."""
    rng = random.Random(seed)
    words = ("the cat sat on a mat and then 1234 3.14 don't WE'LL naïve façade Straße 東京 привет 😀 👩‍👩‍👧 e\u0301 "
             "<0x0A> <s> </s> <|endoftext|> \u2581 \t x=1; foo_bar() ... !! \u00a0").split(" ")
    return ["".join(rng.choice(words) + rng.choice([" ", " ", " ", "  ", "\n", "\n\n", ""])
                    for _ in range(rng.randint(1, 60))) or "x" for _ in range(n)]


def save_jsonl(path, texts):
    return save(path, "".join(json.dumps({"text": t}) + "\n" for t in texts))


def long_text(size):
    rng = random.Random(3)
    words = "Once upon a time there was little Lily, who (2 days) loved — naïve — to play! 東京".split(" ")
    lines, n = [], 0
    while n < size:
        lines.append(" ".join(rng.choice(words) for _ in range(rng.randint(0, 30))) + rng.choice(["", " ", "\n", "\n  "]))
        n += len(lines[-1]) + 1
    return "\n".join(lines)


# ---- Tests ---------------------------------------------------------------------------------------------
def test_bytes(d):
    texts = [t for t in sample_texts() if t.strip()]
    must(save_jsonl(f"{d}/in.jsonl", texts), "--out", f"{d}/o", "--val-fraction", 0.2)
    tok = read_tokenizer(f"{d}/o/tokenizer.bin")
    check("bytes: 257 pieces, kind 1", tok[0] == 1 and len(tok[1]) == 257 and tok[3] == tok[4] == 256)
    train, val = (documents(shard_ids(f"{d}/o", p), tok) for p in ("train", "val"))
    check("bytes: every document once", sorted(train + val) == sorted(t.encode() for t in texts))
    rest = iter(train)
    check("bytes: order kept", all(t.encode() in rest for t in texts if t.encode() not in val))
    check("bytes: about a fifth validates", 30 < len(val) < 90, len(val))
    head = read_bin(f"{d}/o/train_000.bin")[1]
    check("bytes: header words", head[0] == 20240520 and head[3] == 257 and head[5] == 257)


def test_txt_splitting(d):
    docs = ["one\ntwo  ", "three\r\nfour", "five 東京"]
    sep = save(f"{d}/sep.txt", "\n<|endoftext|>\n".join(docs) + "\n<|endoftext|>\n\n\n<|endoftext|>\n")
    blank = save(f"{d}/blank.txt", "\n\n" + "\n\n \n".join(docs))
    whole = save(f"{d}/whole.txt", b"\xef\xbb\xbf" + "\n".join(docs).encode() + b"\n")
    for name, path, how, want in (("separator", sep, "<|endoftext|>", docs), ("regex", sep, r"<\|end.*\|>", docs),
                                  ("blank lines", blank, "blank-lines", docs),
                                  ("whole", whole, "whole-file", ["\n".join(docs) + "\n"])):
        must(path, "--split-on", how, "--out", f"{d}/{name}", "--val-fraction", 0)
        got = documents(shard_ids(f"{d}/{name}", "train"), read_tokenizer(f"{d}/{name}/tokenizer.bin"))
        check(f"txt split by {name}", got == [t.encode() for t in want], got)


def test_compressed_and_folder(d):
    texts = ["alpha", "beta", "gamma"]
    save(f"{d}/in/b/2.txt.gz", gzip.compress(b"beta"))
    save(f"{d}/in/a.txt", "alpha")
    save(f"{d}/in/skip.csv", "x")
    save(f"{d}/in/info.json", "{}")
    save(f"{d}/in/z.json.gz", gzip.compress(b'{"text": "gamma"}\n'))
    must(f"{d}/in", "--out", f"{d}/o", "--val-fraction", 0)
    check("folder, gz", documents(shard_ids(f"{d}/o", "train"), read_tokenizer(f"{d}/o/tokenizer.bin"))
          == [t.encode() for t in texts])
    zstd = library("zstandard").ZstdCompressor()
    two_frames = zstd.compress(b'{"text": "al') + zstd.compress(b'pha"}\n{"text": "beta"}')
    must(save(f"{d}/x.jsonl.zst", two_frames), "--out", f"{d}/z", "--val-fraction", 0)
    check("zst", documents(shard_ids(f"{d}/z", "train"), read_tokenizer(f"{d}/z/tokenizer.bin")) == [b"alpha", b"beta"])
    refused("damaged zst", ["y.txt.zst", "damaged"], save(f"{d}/y.txt.zst", b"not zstd at all"), "--out", f"{d}/y")


def texts_of(out):
    return [t.decode() for t in documents(shard_ids(out, "train"), read_tokenizer(f"{out}/tokenizer.bin"))]


def test_every_file_is_read_or_named(d):
    line = lambda t: json.dumps({"text": t}).encode() + b"\n"
    files = {"A.TXT": b"0", "b.NDJSON": line("1"), "c.jsonl.xz": lzma.compress(line("2")), "d.txt.bz2": bz2.compress(b"3"),
             "e/f.Txt.GZ": gzip.compress(b"4"), "g.json": line("no"), "h.csv": b"no", "x.md": b"no", ".i.txt": b"no"}
    for name, data in files.items():
        save(f"{d}/in/{name}", data)
    save(f"{d}/elsewhere/k.txt", "no")
    os.symlink(f"{d}/elsewhere", f"{d}/in/link")
    r = run(f"{d}/in", "--out", f"{d}/o", "--val-fraction", 0)
    check("each kind is read", r.returncode == 0 and texts_of(f"{d}/o") == list("01234"), r.stderr)
    check("what is not read is named and counted", "5 not read (.i.txt, g.json, h.csv, link/, x.md)" in r.stderr, r.stderr)
    must(f"{d}/in/link", f"{d}/in/g.json", "--out", f"{d}/named", "--val-fraction", 0)
    check("what is named is read", texts_of(f"{d}/named") == ["no", "no"])
    text = os.urandom(20000).hex().encode()
    whole = {"gz": gzip.compress(text), "xz": lzma.compress(text), "bz2": bz2.compress(text)}
    with contextlib.suppress(Skip):
        zstd = library("zstandard")
        whole["zst"] = zstd.ZstdCompressor(write_content_size=False).compress(text)
        # as `zstd --long=31` writes it: header without content size, window 2^31, one raw block that is the last
        wide = b"\x28\xb5\x2f\xfd\0" + bytes([31 - 10 << 3]) + (len(text) << 3 | 1).to_bytes(3, "little") + text
        must(save(f"{d}/wide.txt.zst", wide), "--out", f"{d}/wide", "--val-fraction", 0)
        check("a window of 2^31", texts_of(f"{d}/wide") == [text.decode()])
    for kind, data in whole.items():
        for name, some in (("cut", data[:len(data) // 2]), ("end", data[:-3]), ("empty", b"")):
            path = save(f"{d}/{name}.txt.{kind}", some)
            refused(f"{name} {kind}", [path, "damaged"], path, "--out", f"{d}/{name}{kind}")
            with open(f"{d}/{name}{kind}/tokens.json") as f:
                check(f"{name} {kind} is not complete", json.load(f)["complete"] is False)
    # two frames one after the other; a second one of which a byte is wrong, the first (lzma and bz2 take it for the end) or a later
    for kind, data in whole.items():
        must(save(f"{d}/two.txt.{kind}", data + data), "--out", f"{d}/two{kind}", "--val-fraction", 0)
        check(f"two frames of {kind}", texts_of(f"{d}/two{kind}") == [text.decode() * 2])
        for at in (0, 30):
            damaged = save(f"{d}/second{at}.txt.{kind}", data + data[:at] + bytes([data[at] ^ 255]) + data[at + 1:])
            refused(f"second frame of {kind}", [damaged, "damaged"], damaged, "--out", f"{d}/second{at}{kind}")
    # zeros that the .xz format allows between two streams and after them, in fours; not before the first
    xz = whole["xz"]
    must(save(f"{d}/padded.txt.xz", xz + bytes(8) + xz + bytes(6000)), "--out", f"{d}/padded", "--val-fraction", 0)
    check("an .xz file with stream padding", texts_of(f"{d}/padded") == [text.decode() * 2])
    for name, data in ("between", xz + bytes(5) + xz), ("after", xz + bytes(6002)), ("before", bytes(4) + xz):
        refused(f"zeros {name}", ["damaged xz"], save(f"{d}/{name}.txt.xz", data), "--out", f"{d}/o{name}")
    refused("cut.txt.zst", ["damaged", "inside a frame"], shared("faults/cut.txt.zst"), "--out", f"{d}/o1")
    check("a window of 2^28", "200 documents" in must(shared("faults/window_2_28.jsonl.zst"), "--out", f"{d}/o2",
                                                      "--val-fraction", 0))
    refused("utf16.txt", ["UTF-16"], shared("faults/utf16.txt"), "--out", f"{d}/o3")


def test_parquet(d):
    arrow, parquet = library("pyarrow"), library("pyarrow.parquet")
    texts = [t for t in sample_texts(700) if t.strip()]
    table = arrow.table({"id": list(range(len(texts))), "text": texts, "large": arrow.array(texts, arrow.large_string())})
    parquet.write_table(table, f"{d}/s.parquet", row_group_size=300)
    for key in ("text", "large"):
        must(f"{d}/s.parquet", "--out", f"{d}/{key}", "--val-fraction", 0, "--text-key", key)
        check("parquet: every row", texts_of(f"{d}/{key}") == texts)
    refused("no such column", ["id, text, large", "--text-key"], f"{d}/s.parquet", "--out", f"{d}/o1", "--text-key", "body")
    refused("a column of numbers", ["row 1", "not a string"], f"{d}/s.parquet", "--out", f"{d}/o2", "--text-key", "id")
    data = open(f"{d}/s.parquet", "rb").read()
    refused("cut parquet", ["cut.parquet", "damaged"], save(f"{d}/cut.parquet", data[:-9]), "--out", f"{d}/o3")


def test_long_lines_take_linear_time(d):
    tokens = importlib.import_module("tokens")
    def seconds(size):
        data, times = b"word " * (size // 5), []
        for _ in range(3):
            start = time.process_time()
            check("pieces are the whole", sum(map(len, tokens.split_pieces(data))) == len(data))
            times.append(time.process_time() - start)
        return min(times)
    small, large = seconds(8 << 20), seconds(64 << 20)
    check("a line eight times as long takes about eight times as long", large < 24 * small, (small, large))


def test_other_preparations_are_left_alone(d):
    text = save_jsonl(f"{d}/in.jsonl", ["hello there"] * 40)
    outs = {f"{d}/n": [], f"{d}/n/sub": [], f"{d}/n/train": [], f"{d}/m": ["--format", "ds", "--seq-len", 8]}
    everything = lambda: {os.path.join(f, n): open(os.path.join(f, n), "rb").read()
                          for f, _, names in os.walk(d) for n in names}
    for out, more in outs.items():
        must(text, "--out", out, *more)
    before = everything()
    for out, more in outs.items():
        must(text, "--out", out, *more)
        check(f"{out} again: nothing else is gone", everything() == before, before.keys() ^ everything().keys())
    must(text, "--out", f"{d}/k", *outs[f"{d}/m"])
    save(f"{d}/k/train/tokens.json", before[f"{d}/n/tokens.json"])
    refused("another preparation where ours goes", [f"{d}/k/train", "another preparation"], text, "--out", f"{d}/k", *outs[f"{d}/m"])


def test_few_documents_still_validate(d):
    book = long_text(400000)
    path, few = save(f"{d}/book.txt", book), save_jsonl(f"{d}/few.jsonl", ["one " * 300, "two " * 300, "three " * 300])
    must(path, "--out", f"{d}/whole", "--val-fraction", 0)
    whole = shard_ids(f"{d}/whole", "train")
    for name, more, share in (("book", [], len(whole) // 100), ("tenth", ["--val-fraction", 0.1], len(whole) // 10),
                              ("tokens", ["--val-tokens", 5000], 5000), ("shards", ["--shard-tokens", 90000], len(whole) // 100)):
        r = run(path, "--out", f"{d}/{name}", *more)
        train, val = (shard_ids(f"{d}/{name}", p) for p in ("train", "val"))
        check(f"{name}: the end of the text validates", train + val == whole and abs(len(val) - max(share, 4096)) < 2, len(val))
        check(f"{name}: said", "last" in r.stderr and f"{len(val):,}" in r.stderr, r.stderr)
        check(f"{name}: every shard is of this run", sorted(n for n in os.listdir(f"{d}/{name}") if n.endswith(".tmp")) == [])
    must(few, "--out", f"{d}/few")
    check("three documents", len(shard_ids(f"{d}/few", "val")) > 300 and len(shard_ids(f"{d}/few", "train")) > 2500)
    must(path, "--out", f"{d}/ds", "--format", "ds", "--seq-len", 64)
    rows = [os.path.getsize(f"{d}/ds/{n}") // 130 for n in ("train/train_000.ds", "validation/val_000.ds")]
    end = max(round(len(whole) / 100), 4096)
    check("ds rows", rows == [(len(whole) - end - 1) // 64, (end - 1) // 64], rows)


def sentencepiece_model(d):
    try:
        return shared("tokenizers/mistral_tokenizer.model.v1")
    except Skip:
        sp = library("sentencepiece")
        save(f"{d}/corpus.txt", long_text(200000))
        sp.SentencePieceTrainer.train(input=f"{d}/corpus.txt", model_prefix=f"{d}/spm", vocab_size=500, model_type="bpe", hard_vocab_limit=False,
                                      byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
                                      remove_extra_whitespaces=False, character_coverage=0.999)
        return f"{d}/spm.model"


def encoders(d):
    """(name, model file, library encoder of a whole document, bos, eos) for every library that is here."""
    found = []
    with contextlib.suppress(Skip):
        model = sentencepiece_model(d)
        sp = library("sentencepiece").SentencePieceProcessor(model_file=model)
        found.append(("sentencepiece", model, sp.encode, sp.bos_id(), sp.eos_id()))
    with contextlib.suppress(Skip):
        ranks_file, tiktoken = shared("tokenizers/r50k_base.tiktoken"), library("tiktoken")
        with open(ranks_file, "rb") as f:
            ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in f)}
        from tiktoken_ext import openai_public       # the published word pattern
        enc = tiktoken.Encoding("r50k", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks,
                                special_tokens={"<|endoftext|>": 50256})
        found.append(("tiktoken", ranks_file, enc.encode_ordinary, -1, 50256))
    with contextlib.suppress(Skip):
        found += hf_encoders(d)
    return found


def hf_encoders(d):
    tk = library("tokenizers")
    byte_level, sp_like = tk.Tokenizer(tk.models.BPE()), tk.Tokenizer(tk.models.BPE(byte_fallback=True, unk_token="<unk>"))
    byte_level.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = tk.decoders.ByteLevel()
    byte_level.train_from_iterator(sample_texts(200, 1), tk.trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<|endoftext|>"], initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    sp_like.pre_tokenizer = tk.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    sp_like.train_from_iterator(long_text(20000).split("\n"), tk.trainers.BpeTrainer(
        vocab_size=600, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"] + ["<0x%02X>" % i for i in range(256)]))
    sp_like.post_processor = tk.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    out = []
    for name, tok, bos, eos in (("tokenizers byte-level", byte_level, -1, 0), ("tokenizers metaspace", sp_like, 1, 2)):
        folder = f"{d}/{name.replace(' ', '_')}"
        os.makedirs(folder, exist_ok=True)
        tok.save(f"{folder}/tokenizer.json")
        tok.encode_special_tokens = True
        out.append((name, f"{folder}/tokenizer.json",
                    lambda t, tok=tok: tok.encode(t, add_special_tokens=False).ids, bos, eos))
    return out


def test_encoders(d):
    """Per document, and for one document of many pieces, the ids are those of the library on the whole text."""
    texts = [t for t in sample_texts() if t.strip()]
    save_jsonl(f"{d}/in.jsonl", texts)
    whole = long_text(1500000)
    save(f"{d}/long.txt", whole)
    found = encoders(d)
    for name, model, encode, bos, eos in found:
        o = f"{d}/{name.replace(' ', '_')}_out"
        must(f"{d}/in.jsonl", "--tokenizer", model, "--out", o, "--val-fraction", 0)
        frame = lambda t: ([bos] if bos >= 0 else []) + list(encode(t)) + [eos]
        ids, tok = shard_ids(o, "train"), read_tokenizer(f"{o}/tokenizer.bin")
        check(f"{name}: ids equal the library's", ids == [i for t in texts for i in frame(t)])
        check(f"{name}: bos and eos recorded", tok[4] == eos and bos in (-1, tok[3]), (tok[3:5], bos, eos))
        if "metaspace" not in name:       # its normal form cannot hold a literal U+2581 or unknown letters
            # SentencePiece writes U+2581 for a space, so a literal one comes back as a space
            want = [t.replace("\u2581", " ") if name == "sentencepiece" else t for t in texts]
            got = documents(ids, tok)
            bad = [(a, b) for a, b in zip(got, want) if a != b.encode()]
            check(f"{name}: decoded documents equal the text", not bad and len(got) == len(want), bad[:1])
        words = sorted({w for w in long_text(20000).split() if w.isascii() and w.isalpha()})
        check(f"{name}: words by the merge rule", [w for w in words if merge_encode(tok, w) != list(encode(w))] == [])
        must(f"{d}/long.txt", "--tokenizer", model, "--out", o + "_long", "--jobs", 2)
        got, want = shard_ids(o + "_long", "train") + shard_ids(o + "_long", "val"), frame(whole)
        first = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), None)
        check(f"{name}: a long document is encoded as if whole", got == want, (first, len(got), len(want)))
    check("HF files copied", not any("tokenizers" in f[0] for f in found)
          or os.path.exists(f"{d}/tokenizers_byte-level_out/tokenizer.json"))
    for need in {"sentencepiece", "tiktoken", "tokenizers"} - {f[0].split()[0] for f in found}:
        print(f"skipped: {need} as an oracle (pip install {need}; the GPT-2 ranks are in shared/data)")


# ---- The trainer's own encoder, as a library ---------------------------------------------------------------
def trainer_encoder(d, tokenizer):
    """f(text) -> ids by tokenizer_encode of train_litespark.c, with a tokenizer.bin."""
    if not os.path.exists(f"{d}/trainer.so"):
        if not shutil.which("cc"):
            raise Skip("no C compiler")
        subprocess.run(["cc", "-std=gnu11", "-O1", "-w", "-shared", "-fPIC", "-DLITESPARK_NO_MAIN", TRAINER, "-o", f"{d}/trainer.so",
                        "-lm"], check=True)
    c, libc = ctypes.CDLL(f"{d}/trainer.so"), ctypes.CDLL(None)
    c.tokenizer_open.restype = ctypes.c_void_p
    c.tokenizer_encode.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p]
    libc.free.argtypes = [ctypes.c_void_p]
    t = c.tokenizer_open(tokenizer.encode())

    def encode(text):
        ids, data = ctypes.POINTER(ctypes.c_int)(), text.encode()
        n = c.tokenizer_encode(t, data, len(data), ctypes.byref(ids))
        out = ids[:n]
        libc.free(ids)
        return out
    return encode


def odd_texts(n, seed):
    """What word patterns see differently: capitals, marks, numbers, contractions, kinds of white space."""
    rng = random.Random(seed)
    letters = "ABzqsSdDtTmMlLrReEvV''\u2019\u017fK\u00e9\u00c9\u00df\u01c5\u02b0\u00aa\u6771\u3042\u0905\u0301\u0903\u20dd0123\u00b2\u2166\u0663"
    others = "  \t\n\r\u00a0\u3000\u0085\u2028\u001c\u200b.,!?/-_()\U0001f600\u200d\0"
    parts = ["'s", "'LL", "'Re", "'ve", "'D", "'\u017f", " ", "  ", "\n", "\n\n  "]
    return ["".join(rng.choice(parts) if rng.random() < 0.2 else rng.choice(letters + others) * rng.choice([1, 1, 1, 2, 3])
                    for _ in range(rng.randint(1, 40))) for _ in range(n)]


def shared_lines(most):
    """Up to so many lines of each text, spread over it."""
    out = []
    with contextlib.suppress(Skip):
        for name in ("pd_children_books.txt", "tinyshakespeare.txt", "wiki_demo.txt", "c4_demo.jsonl"):
            with open(shared(f"text/{name}"), encoding="utf-8") as f:
                lines = [t for t in (json.loads(t)["text"] if name.endswith("l") else t.rstrip("\n") for t in f) if t.strip()]
            out += [t[:4000] for t in lines[::max(1, len(lines) // most)]]
    return out


def word_tokenizers(d):
    """One small tokenizer.json for each way to cut words, made by the library itself."""
    tk, tokens = library("tokenizers"), importlib.import_module("tokens")
    pre = tk.pre_tokenizers
    bare = lambda: pre.ByteLevel(add_prefix_space=False, use_regex=False)
    cuts = {w: pre.Sequence([pre.Split(tk.Regex(r), "isolated"), bare()]) for w, r in tokens.WORDS.items() if r}
    cuts.update({"own": pre.ByteLevel(add_prefix_space=False), "own, space first": pre.ByteLevel(add_prefix_space=True), "whole": bare(),
                 "digits": pre.Sequence([pre.Digits(True), pre.ByteLevel(add_prefix_space=False)])})
    lines = shared_lines(40)
    for name, cut in cuts.items():
        tok = tk.Tokenizer(tk.models.BPE(ignore_merges=name in ("llama3", "o200k")))
        tok.pre_tokenizer = cut
        tok.train_from_iterator(odd_texts(300, 1) + sample_texts(200, 2) + lines, tk.trainers.BpeTrainer(
            vocab_size=1200, special_tokens=["<|end_of_text|>"], initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False))
        os.makedirs(f"{d}/{name}")
        tok.save(f"{d}/{name}/tokenizer.json")
        tok.encode_special_tokens = True
        yield name, f"{d}/{name}/tokenizer.json", lambda t, tok=tok: tok.encode(t, add_special_tokens=False).ids


def differing(encode, library_encode, texts):
    return [t for t in texts if encode(t) != list(library_encode(t))]


def test_prompts_are_encoded_as_by_the_library(d):
    tokens = importlib.import_module("tokens")
    found = [(name, model, encode) for name, model, encode, _, _ in encoders(d) if "byte-level" not in name]
    with contextlib.suppress(Skip):
        tk = library("tokenizers")
        both = tokens.load_tokenizer(sentencepiece_model(d)).side_files()["tokenizer.json"]      # as its tokenizer.json
        spec = json.loads(both)
        spec.update(normalizer=None, pre_tokenizer={"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first",
                                                    "split": False})
        for name, data in (("byte_fallback", both), ("byte_fallback, Metaspace", json.dumps(spec).encode())):
            tok = tk.Tokenizer.from_str(data.decode())
            tok.encode_special_tokens = True
            found.append((name, save(f"{d}/{name}/tokenizer.json", data),
                          lambda t, tok=tok: tok.encode(t, add_special_tokens=False).ids))
        found += word_tokenizers(d)
    lines, odd = shared_lines(100), odd_texts(200, 3) + sample_texts(60, 4)
    for name, model, library_encode in found:
        save(f"{d}/tokenizer.bin", tokens.tokenizer_bin(tokens.load_tokenizer(model))[0])
        encode = trainer_encoder(d, f"{d}/tokenizer.bin")
        # SentencePiece's own space and unknown characters without bytes are another matter
        texts = [t for t in odd if "\0" not in t and "\u2581" not in t] if "byte_fallback" in name or name == "sentencepiece" else odd
        texts = [] if name == "tokenizers metaspace" else texts + lines
        bad = differing(encode, library_encode, texts)
        check(f"{name}: {len(bad)} of {len(texts)} prompts differ", not bad, repr(bad[:1])[:200])
    scores = [s for p, s in zip(*read_tokenizer(f"{d}/tokenizer.bin")[1:3])]
    check("nothing was skipped", len(scores) > 256)


def test_characters_are_text_below_all_merges(d):
    spec = {"model": {"type": "BPE", "byte_fallback": True, "merges": ["a b", "ab c"], "vocab": {
        "<unk>": 0, "<0x61>": 1, "a": 2, "b": 3, "c": 4, "ab": 5, "abc": 6, "\u00e9": 7, "lone": 8}}}
    must("--export-tokenizer", save(f"{d}/tokenizer.json", json.dumps(spec)), "--out", f"{d}/tokenizer.bin")
    kind, pieces, scores, *_ = read_tokenizer(f"{d}/tokenizer.bin")
    score = dict(zip(pieces, scores))
    check("characters", all(-1e29 < score[c] < score[b"abc"] < score[b"ab"] for c in (b"a", b"b", b"c", "\u00e9".encode())), score)
    check("what no merge makes", all(score[c] < -1e29 for c in (b"<unk>", b"<0x61>", b"lone")), score)
    check("encodes", trainer_encoder(d, f"{d}/tokenizer.bin")("ab\u00e9c") == [5, 7, 4])


def test_dropout_of_a_tokenizer_is_left_out(d):
    """A text has the same tokens each time, those without dropout, by tokens.py and by the tokenizer.json that it leaves."""
    path = next(t[1] for t in hf_encoders(d) if t[0] == "tokenizers byte-level")
    with open(path, encoding="utf-8") as f:
        spec = json.load(f)
    text = save(f"{d}/in.txt", long_text(3000))
    must(text, "--tokenizer", path, "--out", f"{d}/o", "--val-fraction", 0)
    with_dropout = save(f"{d}/dropout/tokenizer.json", json.dumps(dict(spec, model=dict(spec["model"], dropout=0.5))))
    r = run(text, "--tokenizer", with_dropout, "--out", f"{d}/p", "--val-fraction", 0)
    check("dropout is named", r.returncode == 0 and "dropout of 0.5" in r.stderr, r.stderr)
    check("tokens without dropout", shard_ids(f"{d}/p", "train") == shard_ids(f"{d}/o", "train"))
    with open(f"{d}/p/tokenizer.json", encoding="utf-8") as f:
        check("nothing else is changed", json.load(f) == spec)


def test_auto_tokenizer(d):
    """What lies beside the shards goes into checkpoints: there AutoTokenizer gives the ids of the shards, BOS included."""
    tk, tokens = library("tokenizers"), importlib.import_module("tokens")
    os.environ["HF_HUB_OFFLINE"], os.environ["TRANSFORMERS_VERBOSITY"] = "1", "error"
    auto = library("transformers").AutoTokenizer
    models = [("bytes", [])]
    with contextlib.suppress(Skip):
        library("sentencepiece")
        models.append((sentencepiece_model(d), []))
    with contextlib.suppress(Skip):
        library("tiktoken")
        models.append((shared("tokenizers/r50k_base.tiktoken"), []))
        ranks = {bytes([i]): i for i in range(256)}
        ranks.update((t, 256 + i) for i, t in enumerate([b" t", b"he", b" the", b"'s", b"  ", b"\n ", b"12", b"123", b"in", b"xyzzy"]))
        save(f"{d}/toy", "".join(f"{base64.b64encode(k).decode()} {v}\n" for k, v in ranks.items()))
        models += [(f"{d}/toy", ["--tiktoken-pattern", p]) for p in ("cl100k", "llama3", "o200k")]
    texts = [t for t in sample_texts(60, 5) + odd_texts(60, 6) if t.strip()] + ["a" + " " * n + "b" for n in range(1, 80)] + [
        "</s> <s> <unk>", " a", "  a ", "a\n  ", "<0x0A>", "xyzzy"] + shared_lines(20)
    save_jsonl(f"{d}/in.jsonl", texts)
    for i, (model, more) in enumerate(models):
        out = f"{d}/o{i}"
        must(f"{d}/in.jsonl", "--tokenizer", model, *more, "--out", out, "--val-fraction", 0)
        ids, eos = shard_ids(out, "train"), read_tokenizer(f"{out}/tokenizer.bin")[4]
        for family, name in (("llama", "LlamaForCausalLM"), ("mistral", "MistralForCausalLM"), ("qwen3", "Qwen3ForCausalLM"))[:3 if i < 2 else 1]:
            save(f"{out}/config.json", json.dumps({"model_type": family, "architectures": [name], "vocab_size": 32000}))
            loaded = auto.from_pretrained(out)
            got = [loaded(t).input_ids + [eos] for t in texts]
            at, bad = 0, []
            for t, g in zip(texts, got):
                bad += [t] if ids[at:at + len(g)] != g else []
                at = ids.index(eos, at) + 1
            check(f"{os.path.basename(model)} {more[1:]} {family}: AutoTokenizer's ids", sum(got, []) == ids and not bad, repr(bad[:1]))
            check(f"{os.path.basename(model)} {family}: EOS", loaded.eos_token_id == eos)


def test_cl100k_pattern(d):
    tiktoken, ranks_file = library("tiktoken"), shared("tokenizers/r50k_base.tiktoken")
    from tiktoken_ext import openai_public
    with open(ranks_file, "rb") as f:
        ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in f)}
    openai_public.load_tiktoken_bpe = lambda *a, **k: ranks       # instead of a download
    enc = tiktoken.Encoding("x", pat_str=openai_public.cl100k_base()["pat_str"], mergeable_ranks=ranks, special_tokens={})
    texts = [t for t in sample_texts(200, 5) if t.strip()] + [long_text(600000)]
    must(save_jsonl(f"{d}/in.jsonl", texts), "--tokenizer", ranks_file, "--tiktoken-pattern", "cl100k", "--out", f"{d}/o",
         "--val-fraction", 0)
    check("cl100k pattern equals the published one",
          shard_ids(f"{d}/o", "train") == [i for t in texts for i in enc.encode_ordinary(t) + [50256]])
    tokens = importlib.import_module("tokens")
    published = {"gpt2": openai_public.r50k_pat_str, "cl100k": openai_public.cl100k_base()["pat_str"],
                 "o200k": openai_public.o200k_base()["pat_str"]}
    for words, pattern in published.items():
        one, two = (tiktoken.Encoding(words, pat_str=p, mergeable_ranks=ranks, special_tokens={}) for p in (pattern, tokens.WORDS[words]))
        check(f"{words}: as published", differing(one.encode_ordinary, two.encode_ordinary, odd_texts(1000, 8) + ["a\n  "]) == [])


def test_merge_rule(d):
    """tokenizer.bin alone, with the merge rule of the trainers, encodes as SentencePiece does."""
    sp = library("sentencepiece").SentencePieceProcessor(model_file=sentencepiece_model(d))
    with open(sentencepiece_model(d), "rb") as f:
        model = save(f"{d}/my.model", f.read())
    for _ in range(2):
        must("--export-tokenizer", model, "--out", f"{d}/tokenizer.bin")
    refused("a tokenizer over itself", [model, "another --out"], "--export-tokenizer", model, "--out", model)
    tok = read_tokenizer(f"{d}/tokenizer.bin")
    check("kind 0, every piece", tok[0] == 0 and len(tok[1]) == sp.get_piece_size())
    lines = [t.replace("\u2581", "")[:160] for t in sample_texts(200, 9)]
    for name in ("text/tinyshakespeare.txt", "text/wiki_demo.txt"):
        with contextlib.suppress(Skip), open(shared(name), encoding="utf-8") as f:
            lines += [line[:160] for line in f.read().split("\n") if line.strip()][100:300]
    bad = [t for t in lines if t and merge_encode(tok, t) != sp.encode(t)]
    check(f"merge rule on {len(lines)} lines", not bad, repr(bad[:2]))


def test_shards_and_split(d):
    texts = [f"document {i} " + "x" * (i % 50) for i in range(400)]
    save_jsonl(f"{d}/in.jsonl", texts)
    save_jsonl(f"{d}/more.jsonl", texts + ["and one more"])
    must(f"{d}/in.jsonl", "--out", f"{d}/one", "--val-fraction", 0.1)
    must(f"{d}/in.jsonl", "--out", f"{d}/many", "--val-fraction", 0.1, "--shard-tokens", 1000)
    must(f"{d}/more.jsonl", "--out", f"{d}/more", "--val-fraction", 0.1)
    must(f"{d}/in.jsonl", "--out", f"{d}/seed", "--val-fraction", 0.1, "--seed", 2)
    tok = read_tokenizer(f"{d}/one/tokenizer.bin")
    check("many shards hold what one holds", all(shard_ids(f"{d}/one", p) == shard_ids(f"{d}/many", p) for p in ("train", "val")))
    sizes = [len(read_bin(f"{d}/many/{n}")[0]) for n in sorted(os.listdir(f"{d}/many")) if n.startswith("train")]
    check("shards end at documents near N", len(sizes) > 5 and all(1000 <= s < 1100 for s in sizes[:-1]), sizes)
    val = documents(shard_ids(f"{d}/one", "val"), tok)
    check("the split does not move when documents are added",
          set(documents(shard_ids(f"{d}/more", "val"), tok)) - {b"and one more"} == set(val))
    check("another seed, another split", documents(shard_ids(f"{d}/seed", "val"), tok) != val)
    must(f"{d}/in.jsonl", "--out", f"{d}/valtok", "--val-tokens", 500)
    n = len(shard_ids(f"{d}/valtok", "val"))
    check("--val-tokens is reached by the last document", 500 <= n < 570, n)
    must(save(f"{d}/long.txt", "y" * 5000), "--out", f"{d}/cut", "--shard-tokens", 1000, "--val-fraction", 0)
    check("a document longer than two shards is cut", [len(read_bin(f"{d}/cut/train_{i:03d}.bin")[0]) for i in range(3)]
          == [2000, 2000, 1001])


def test_ds(d):
    texts = [f"row document {i} " * 3 for i in range(200)]
    save_jsonl(f"{d}/in.jsonl", texts)
    T = 64
    must(f"{d}/in.jsonl", "--out", f"{d}/bin", "--val-fraction", 0.1)
    for shard in (1 << 20, 1000):
        o = f"{d}/ds{shard}"
        must(f"{d}/in.jsonl", "--out", o, "--val-fraction", 0.1, "--format", "ds", "--seq-len", T, "--shard-tokens", shard)
        for folder, prefix in (("train", "train"), ("validation", "val")):
            with open(f"{o}/{folder}/metadata.json") as f:
                meta = json.load(f)
            data = b"".join(open(f"{o}/{folder}/{n}", "rb").read() for n in sorted(os.listdir(f"{o}/{folder}")) if n.endswith(".ds"))
            rows = len(data) // (2 * (T + 1))
            ids = struct.unpack(f"<{len(data) // 2}H", data)
            stream = shard_ids(f"{d}/bin", prefix)
            check("ds metadata", (meta["vocab_size"], meta["sequence_length"], meta["token_size_bytes"], meta["total_sequences"],
                                  meta["total_tokens"]) == (257, T, 2, rows, rows * (T + 1)), meta)
            check("ds rows are the windows of the bin", rows == (len(stream) - 1) // T and all(
                list(ids[i * (T + 1):(i + 1) * (T + 1)]) == stream[i * T:i * T + T + 1] for i in range(rows)))
            check("tokenizer.bin beside the rows", os.path.exists(f"{o}/{folder}/tokenizer.bin"))
    check("inspect ds", "row document 0" in must("--inspect", f"{d}/ds1000/train/train_000.ds"))
    check("several ds shards", os.path.exists(f"{d}/ds1000/train/train_002.ds"))


def test_same_bytes_for_any_jobs(d):
    words = long_text(300000).split(" ")
    texts = [" ".join(words[i % 40000:i % 40000 + 400]) for i in range(0, 1800000, 250)]
    save_jsonl(f"{d}/in.jsonl", texts)
    for jobs in (1, 2, 3):
        must(f"{d}/in.jsonl", "--out", f"{d}/{jobs}", "--jobs", jobs, "--shard-tokens", 1000000)
    names = sorted(os.listdir(f"{d}/1"))
    same = all(open(f"{d}/1/{n}", "rb").read() == open(f"{d}/{j}/{n}", "rb").read() for j in (2, 3) for n in names)
    check("1, 2 and 3 jobs: same files", same and all(sorted(os.listdir(f"{d}/{j}")) == names for j in (2, 3)), names)
    before = {n: open(f"{d}/1/{n}", "rb").read() for n in names}
    must(f"{d}/in.jsonl", "--out", f"{d}/1", "--jobs", 2, "--shard-tokens", 1000000)
    check("the same command again: same files", before == {n: open(f"{d}/1/{n}", "rb").read() for n in sorted(os.listdir(f"{d}/1"))})
    refused("other options", ["other options", "seed"], f"{d}/in.jsonl", "--out", f"{d}/1", "--shard-tokens", 1000000, "--seed", 5)
    check("a refused run leaves the folder alone", before == {n: open(f"{d}/1/{n}", "rb").read() for n in sorted(os.listdir(f"{d}/1"))})


def peak_mb(*args):
    """(exit status, peak resident MB of the largest process). A fresh process starts the script, because a child's
    peak counts from its parent's size."""
    code = ("import resource, subprocess, sys; r = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL); "
            "print(r, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    out = subprocess.run([sys.executable, "-c", code, sys.executable, SCRIPT, *map(str, args)], stdout=subprocess.PIPE)
    status, peak = map(int, out.stdout.split())
    return status, peak / (1024 if sys.platform != "darwin" else 1 << 20)


def test_memory(d):
    line = (long_text(1 << 20).replace("\n", " ") + "\n").encode()
    with open(f"{d}/big.txt", "wb") as f:
        for _ in range(300):
            f.write(line)
    status, mb = peak_mb(f"{d}/big.txt", "--out", f"{d}/o", "--val-fraction", 0, "--jobs", 2)
    check("300 MB as one document: below 400 MB", status == 0 and mb < 400, f"{status} {mb:.0f} MB")
    print(f"peak {mb:.0f} MB for 300 MB of text")
    row = '{"text": "%s", "meta": {"redpajama_set_name": "%s"}}\n'
    with open(f"{d}/mix.jsonl", "w") as f:
        for i in range(40000):
            f.write(row % ("little Lily " * (50 + i % 100), "ab"[i % 2]))
    status, mb = peak_mb(f"{d}/mix.jsonl", "--mix", "a=3,b=1", "--repeat", 2, "--out", f"{d}/mix", "--jobs", 2)
    check("a mix of 50 MB: below 200 MB", status == 0 and mb < 200, f"{status} {mb:.0f} MB")
    print(f"peak {mb:.0f} MB for a mix of 50 MB")
    os.truncate(f"{d}/big.txt", 4000000)
    for name, model, *_ in encoders(d)[:2]:
        status, mb = peak_mb(f"{d}/big.txt", "--out", f"{d}/{name}", "--tokenizer", model, "--val-fraction", 0, "--jobs", 1)
        check(f"{name}: lines of 1 MB, below 400 MB", status == 0 and mb < 400, f"{status} {mb:.0f} MB")
        print(f"peak {mb:.0f} MB with {name}")


def test_kill(d):
    """kill -9 at any moment: what carries a shard's name is whole, and the same command then finishes the work."""
    line = (long_text(1 << 20) + "\n").encode()
    with open(f"{d}/big.txt", "wb") as f:
        for _ in range(120):
            f.write(line)
    args = [f"{d}/big.txt", "--out", f"{d}/o", "--shard-tokens", 4000000, "--split-on", "blank-lines", "--jobs", 2]
    whole = 0
    for wait in (0.3, 0.7, 1.2):
        p = subprocess.Popen([sys.executable, SCRIPT, *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(wait)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(p.pid)], stdout=subprocess.PIPE).stdout.split() \
            if shutil.which("ps") else []
        killed = p.poll() is None
        p.send_signal(signal.SIGKILL)
        p.wait()
        check(f"killed after {wait} s while it ran", killed)
        for n in (sorted(os.listdir(f"{d}/o")) if os.path.isdir(f"{d}/o") else []):
            if n.endswith(".bin") and not n.startswith("tokenizer"):
                whole += run("--inspect", f"{d}/o/{n}").returncode == 0 or 1 << 20
            if n.endswith(".tmp") and n.startswith(".train"):
                with open(f"{d}/o/{n}", "rb") as f:
                    check("a partial shard has no magic", f.read(4) in (b"", bytes(4)))
        if os.path.exists(f"{d}/o/tokens.json"):
            with open(f"{d}/o/tokens.json") as f:
                check("a killed run is not complete", json.load(f)["complete"] is False)
    check("shards left by a kill are whole", whole < 1 << 20, whole)
    time.sleep(1.2)
    check("workers of a killed run leave", not any(os.path.exists(f"/proc/{int(c)}/cmdline")
          and b"tokens.py" in open(f"/proc/{int(c)}/cmdline", "rb").read() for c in children))
    os.truncate(f"{d}/big.txt", 10 << 20)
    if os.path.exists(f"{d}/o/.state.json"):
        refused("other text than before", ["big.txt"], *args)
        shutil.rmtree(f"{d}/o")
    must(*args)
    check("then the same command finishes", json.load(open(f"{d}/o/tokens.json"))["complete"])
    check("and leaves no temporary file", not [n for n in os.listdir(f"{d}/o") if n.endswith(".tmp")])


# ---- Sources by weight, datasets on disk, going on after a kill ----------------------------------------------------
SLIM = {"CommonCrawl": 52, "C4": 27, "Github": 5, "Book": 4, "ArXiv": 5, "Wikipedia": 4, "StackExchange": 3}


def slim_pajama(folder, per_file=300, files=4, seed=1, ending=".jsonl.zst"):
    """Files in the published layout; -> {source: [texts]}. Each text begins with its source, books are long."""
    rng, texts = random.Random(seed), {f"RedPajama{n}": [] for n in SLIM}
    words = "the of and to in a is that for it 3.14 x=1; foo_bar() naïve 東京 \\n".split(" ")
    compress = (lambda b: b) if ending == ".jsonl" else library("zstandard").ZstdCompressor().compress
    for file in range(files):
        lines = []
        for i in range(per_file):
            name = "RedPajama" + rng.choices(list(SLIM), SLIM.values())[0]
            n = rng.randint(5, 80) * (20 if name.endswith("Book") else 1)
            texts[name].append(f"{name} {file}.{i} " + " ".join(rng.choices(words, k=n)))
            lines.append(json.dumps({"text": texts[name][-1], "meta": {"redpajama_set_name": name}}))
        save(f"{folder}/chunk{1 + file // 2}/example_train_{file}{ending}", compress("\n".join(lines).encode()))
    return texts


def mix_of(out):
    """(train documents, {source: validation documents}) as text."""
    tok = read_tokenizer(f"{out}/tokenizer.bin")
    names = {n[4:-8] for n in os.listdir(out) if n.startswith("val_")}
    read = lambda prefix: [t.decode() for t in documents(shard_ids(out, prefix), tok)]
    return read("train"), {n: read(f"val_{n}") for n in names}


def read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def everything_in(folder):
    return {os.path.relpath(os.path.join(f, n), folder): open(os.path.join(f, n), "rb").read()
            for f, _, names in os.walk(folder) for n in names}


def count_by_source(texts):
    found = {}
    for t in texts:
        found.setdefault(t.split(" ")[0], []).append(t)
    return found


def test_mix_natural(d):
    texts = slim_pajama(f"{d}/in/train")
    told = must(f"{d}/in/train", "--mix", "natural", "--val-fraction", 0.05, "--out", f"{d}/o")
    train, val = mix_of(f"{d}/o")
    check("natural: every document once", sorted(train + sum(val.values(), [])) == sorted(sum(texts.values(), [])))
    check("natural: a validation set for each source", val.keys() == texts.keys(), val.keys())
    check("natural: each holds its source only", all(t in texts[n] for n, some in val.items() for t in some))
    check("natural: about a twentieth each", all(1 <= len(v) <= max(3, 0.12 * len(texts[n])) for n, v in val.items()),
          {n: (len(v), len(texts[n])) for n, v in val.items()})
    order = {t: i for i, t in enumerate(sorted(sum(texts.values(), []), key=lambda t: tuple(map(int, t.split(" ")[1].split(".")))))}
    check("natural: order kept", [order[t] for t in train] == sorted(order[t] for t in train))
    check("the table", all(n in told for n in texts) and "copies" in told, told)
    manifest = read_json(f"{d}/o/manifest.json")
    check("manifest: documents of each source", all(manifest["sources"][n]["documents"] == len(texts[n]) for n in texts))
    check("manifest: what was written", all(
        (row["train"]["documents"], row["validation"]["documents"], row["validation"]["tokens"]) ==
        (len([t for t in train if t in texts[n]]), len(val[n]), sum(len(t.encode()) + 1 for t in val[n]))
        for n, row in manifest["sources"].items()))
    for row in manifest["inputs"]:
        data = open(row["path"], "rb").read()
        check("manifest: inputs", row["bytes"] == len(data) and row["sha256"] == hashlib.sha256(data).hexdigest()
              and row["documents"] == 300, row)
    check("manifest: shards", all(read_bin(f"{d}/o/{row['path']}")[1][4] & 0xFFFFFFFF == row["crc32"]
                                  and read_bin(f"{d}/o/{row['path']}")[1][2] == row["tokens"] for row in manifest["shards"]))
    must(f"{d}/in/train", "--mix", "natural", "--val-fraction", 0.05, "--out", f"{d}/seed", "--seed", 2)
    check("another seed, other validation", mix_of(f"{d}/seed")[1] != val)
    r = run(f"{d}/in/train", "--out", f"{d}/plain")
    check("without --mix: one validation set", r.returncode == 0 and os.path.exists(f"{d}/plain/val_000.bin"), r.stderr)
    manifest = read_json(f"{d}/plain/manifest.json")
    check("without --mix: a manifest as well", manifest["documents_read"] == 1200 and len(manifest["inputs"]) == 4)


def test_mix_weights(d):
    texts = slim_pajama(f"{d}/in", per_file=3000, ending=".jsonl")
    size = {n: sum(len(t.encode()) + 1 for t in some) for n, some in texts.items()}
    ask = {"RedPajamaC4": 2, "RedPajamaCommonCrawl": 5, "RedPajamaBook": 2, "RedPajamaGithub": 1}
    spec = ",".join(f"{n}={w}" for n, w in ask.items())
    mix = (f"{d}/in", "--mix", spec, "--shard-tokens", 500000)
    for name, more in (("whole", []), ("repeat", ["--repeat", 2.5]), ("fixed", ["--train-tokens", 700000]),
                       ("val", ["--val-tokens", 20000]), ("none", ["--val-fraction", 0])):
        must(*mix, *more, "--out", f"{d}/{name}")
        train, val = mix_of(f"{d}/{name}")
        found = count_by_source(train)
        tokens = {n: sum(len(t.encode()) + 1 for t in some) for n, some in found.items()}
        total = sum(tokens.values())
        check(f"{name}: only what was named", found.keys() == ask.keys(), found.keys())
        check(f"{name}: shares within 2%", all(abs(tokens[n] / total / (w / 10) - 1) < 0.02 for n, w in ask.items()),
              {n: tokens[n] / total for n in ask})
        inside = set(sum(texts.values(), []))
        check(f"{name}: each is a document of the input", inside.issuperset(train))
        check(f"{name}: validation never trains", not set(train) & {t for some in val.values() for t in some})
        most = 3 if name == "repeat" else 1
        copies = {n: [some.count(t) for t in set(some)] for n, some in found.items()}
        check(f"{name}: copies", all(max(c) <= most and (max(c) == 1 or max(c) - min(c) <= 1) for c in copies.values()))
        manifest = read_json(f"{d}/{name}/manifest.json")["sources"]
        check(f"{name}: manifest", all(abs(manifest[n]["achieved"] - tokens[n] / total) < 1e-9 and
                                       abs(manifest[n]["weight"] - ask[n] / 10) < 1e-9 for n in ask))
        scarce = min(ask, key=lambda n: size[n] / ask[n])
        want = {"whole": size[scarce] * 0.99 * 10 / ask[scarce], "repeat": 2.5 * size[scarce] * 0.99 * 10 / ask[scarce],
                "fixed": 700000, "none": size[scarce] * 10 / ask[scarce]}.get(name)
        check(f"{name}: total", not want or abs(total / want - 1) < 0.02, (total, want))
        if name in ("whole", "none"):
            check(f"{name}: the scarcest is whole", len(found[scarce]) + len(val.get(scarce, [])) == len(texts[scarce]))
        if name == "repeat":        # copies of one document lie in different passes
            first = {}
            gaps = [i - first[t] for i, t in enumerate(train) if t in first or first.setdefault(t, i) is None]
            check("repeat: copies lie far apart", gaps and min(gaps) > len(train) / 10, min(gaps, default=0))
            part = count_by_source(train[:len(train) // 3])
            share = {n: sum(len(t.encode()) + 1 for t in some) for n, some in part.items()}
            check("repeat: the first third has the mix as well", all(
                abs(share[n] / sum(share.values()) - w / 10) < 0.05 for n, w in ask.items()), share)
        if name == "val":
            check("val: about 20,000 tokens of each", all(
                0.5 < sum(len(t.encode()) + 1 for t in some) / min(20000, tokens[n] / 9) < 1.7 for n, some in val.items()),
                {n: sum(map(len, some)) for n, some in val.items()})
    for jobs in (2, 3):
        must(*mix, "--jobs", jobs, "--out", f"{d}/jobs{jobs}")
        check(f"{jobs} jobs: same bytes", everything_in(f"{d}/jobs{jobs}") == everything_in(f"{d}/whole"))
    r = run(*mix, "--out", f"{d}/whole")
    check("complete: nothing to do", r.returncode == 0 and "complete already" in r.stdout, r.stdout + r.stderr)
    with contextlib.suppress(Skip):      # shares are of tokens, not of bytes: the tokens per byte of sources differ
        save_jsonl(f"{d}/prose.jsonl", ["Once upon a time there was a little girl " * 5] * 900)
        save_jsonl(f"{d}/code.jsonl", ["x1=7;y22=19;%%#@ {{}}~" * 5] * 900)
        must("--mix", f"prose:{d}/prose.jsonl=1,code:{d}/code.jsonl=1", "--out", f"{d}/two", "--tokenizer", sentencepiece_model(d))
        row = read_json(f"{d}/two/manifest.json")["sources"]
        check("two sources of other density: half each", all(abs(r["achieved"] - 0.5) < 0.01 for r in row.values()) and
              row["prose"]["copies"] == 1 or row["code"]["copies"] == 1, row)


def test_mix_of_folders(d):
    arrow, parquet = library("pyarrow"), library("pyarrow.parquet")
    books = [f"books {i} " + "word " * 4000 + "end" for i in range(60)]
    books[3] += "\nThe next line " * 50000         # in pieces
    save(f"{d}/books/a.txt", "\n<|endoftext|>\n".join(books[:40]))
    save(f"{d}/books/b.txt", "\n<|endoftext|>\n".join(books[40:]))
    pages, held = [f"web {i} " + "page " * (i % 50) for i in range(10000)], [f"web held {i}" for i in range(20)]
    os.makedirs(f"{d}/web")
    for k in range(2):
        parquet.write_table(arrow.table({"id": list(range(5000)), "text": pages[k * 5000:k * 5000 + 5000]}), f"{d}/web/{k}.parquet")
    save_jsonl(f"{d}/held.jsonl", held)
    spec = f"books:{d}/books=1,web:{d}/web=3"
    split = ("--split-on", "<|endoftext|>")
    must("--mix", spec, *split, "--out", f"{d}/o")
    train, val = mix_of(f"{d}/o")
    found = count_by_source(train)
    check("folders: each document once", len(set(train)) == len(train) and set(train) <= set(books + pages))
    check("folders: validation", val.keys() == {"books", "web"} and set(val["books"]) <= set(books))
    tokens = {n: sum(len(t.encode()) + 1 for t in some) for n, some in found.items()}
    check("folders: shares", abs(tokens["web"] / sum(tokens.values()) - 0.75) < 0.02, tokens)
    half = count_by_source(train[:len(train) // 2])
    check("folders: the first half has both", abs(sum(map(len, half["books"])) / sum(map(len, found["books"])) - 0.5) < 0.1)
    must("--mix", spec, *split, "--val-from", f"web:{d}/held.jsonl", "--out", f"{d}/from")
    train, val = mix_of(f"{d}/from")
    check("--val-from", val == {"web": held}, val.keys())
    inputs = [os.path.basename(row["path"]) for row in read_json(f"{d}/from/manifest.json")["inputs"]]
    check("--val-from is in the manifest", inputs == ["a.txt", "b.txt", "0.parquet", "1.parquet", "held.jsonl"], inputs)
    must(f"{d}/web", "--val-from", f"{d}/held.jsonl", "--out", f"{d}/plain")
    tok = read_tokenizer(f"{d}/plain/tokenizer.bin")
    read = lambda prefix: [t.decode() for t in documents(shard_ids(f"{d}/plain", prefix), tok)]
    check("--val-from without --mix", read("train") == pages and read("val") == held)
    meta = [{"redpajama_set_name": f"S {i % 3}/x"} for i in range(300)]
    for name, column in (("struct", meta), ("text", [json.dumps(m) for m in meta])):
        parquet.write_table(arrow.table({"text": pages[:300], "meta": column}), f"{d}/{name}.parquet")
        must(f"{d}/{name}.parquet", "--mix", "S 0/x=1,S 2/x=1", "--out", f"{d}/{name}")
        train, val = mix_of(f"{d}/{name}")
        check(f"a table with a {name} column", {int(t.split(" ")[1]) % 3 for t in train} == {0, 2} and val.keys() == {"S-0-x", "S-2-x"})
    rows = {"text": pages[:400], "id": [f"<urn:uuid:{i}>" for i in range(400)], "dump": [f"CC-MAIN-2024-{10 + i % 2 * 8}" for i in range(400)],
            "url": ["http://x"] * 400, "language": ["en"] * 400, "language_score": [0.9] * 400, "token_count": [7] * 400}
    os.makedirs(f"{d}/fineweb/data/CC-MAIN-2024-10")
    parquet.write_table(arrow.table(rows), f"{d}/fineweb/data/CC-MAIN-2024-10/000_00000.parquet")
    must(f"{d}/fineweb", "--mix", "CC-MAIN-2024-10=1,CC-MAIN-2024-18=3", "--mix-key", "dump", "--out", f"{d}/dumps")
    train, val = mix_of(f"{d}/dumps")
    check("FineWeb by dump", val.keys() == {"CC-MAIN-2024-10", "CC-MAIN-2024-18"} and set(train) < set(pages[:400]))
    must(f"{d}/text.parquet", "--mix", "natural", "--out", f"{d}/ds", "--format", "ds", "--seq-len", 32)
    names = sorted(n for n in os.listdir(f"{d}/ds/validation") if n.endswith(".ds"))
    check("ds: validation shards", names == [f"val_S-{i}-x_000.ds" for i in range(3)], names)
    rows = sum(os.path.getsize(f"{d}/ds/validation/{n}") for n in names) // 66
    check("ds: metadata counts them all", read_json(f"{d}/ds/validation/metadata.json")["total_sequences"] == rows)


def test_mix_refused(d):
    slim_pajama(f"{d}/in", per_file=50)
    o = ["--out", f"{d}/o"]
    for name, spec, words in (
            ("unknown", "RedPajamaC4=1,RedPajamaWiki=1", ["RedPajamaWiki", "RedPajamaWikipedia", "RedPajamaC4", "documents"]),
            ("zero", "RedPajamaC4=0,RedPajamaBook=1", ["RedPajamaC4=0", "above 0"]),
            ("sum zero", "RedPajamaC4=0", ["above 0"]), ("negative", "RedPajamaC4=-1,RedPajamaBook=2", ["RedPajamaC4=-1"]),
            ("nan", "RedPajamaC4=nan", ["above 0"]), ("inf", "RedPajamaC4=inf", ["above 0"]), ("no number", "RedPajamaC4=x", ["RedPajamaC4=x"]),
            ("no weight", "RedPajamaC4", ["NAME=WEIGHT"]), ("no name", "=1", ["NAME=WEIGHT"]), ("empty", "RedPajamaC4=1,", ["NAME=WEIGHT"]),
            ("twice", "RedPajamaC4=1,RedPajamaC4=2", ["RedPajamaC4 twice"]), ("nothing", "", ["--mix is empty"]),
            ("beyond a double", "RedPajamaC4=1e308,RedPajamaBook=1e308", ["above 0"])):
        refused(f"mix: {name}", words, f"{d}/in", "--mix", spec, *o)
    must(f"{d}/in", "--mix", "RedPajamaC4=1,RedPajamaWikipedia=1", *o)          # nothing was written, so the folder is free
    refused("mix: other weights", ["other options", "mix ="], f"{d}/in", "--mix", "RedPajamaC4=1,RedPajamaBook=1", *o)
    refused("mix: no path", ["NAME:PATH"], "--mix", "a=1", "--out", f"{d}/1")
    refused("mix: path missing", ["nowhere", "no such"], "--mix", f"a:{d}/nowhere=1", "--out", f"{d}/2")
    refused("mix: natural without input", ["no INPUT"], "--mix", "natural", "--out", f"{d}/3")
    refused("mix: too many tokens", ["--train-tokens", "RedPajamaBook", "--repeat"], f"{d}/in", "--mix",
            "RedPajamaC4=1,RedPajamaBook=50", "--train-tokens", 10**9, "--out", f"{d}/4")
    refused("mix: repeat below 1", ["--repeat"], f"{d}/in", "--mix", "natural", "--repeat", 0.5, "--out", f"{d}/5")
    refused("--repeat alone", ["--mix"], f"{d}/in", "--repeat", 2, "--out", f"{d}/6")
    refused("two ways to validate", ["--val-from"], f"{d}/in", "--val-from", f"{d}/in", "--val-tokens", 9, "--out", f"{d}/7")
    line = {"none": '{"text": "a"}', "number": '{"text": "a", "meta": {"redpajama_set_name": 5}}', "flat": '{"text": "a", "meta": 7}',
            "blank": '{"text": "a", "meta": {"redpajama_set_name": " "}}'}
    for name, text in line.items():
        path = save(f"{d}/{name}.jsonl", '{"text": "a", "meta": {"redpajama_set_name": "x"}}\n' + text + "\n")
        refused(f"mix: {name} key", [f"{name}.jsonl:2", "meta.redpajama_set_name", "--mix-key"], path, "--mix", "natural", "--out", f"{d}/8{name}")
    refused("mix: plain text", ["a.txt", "NAME:PATH"], save(f"{d}/a.txt", "hello"), "--mix", "natural", "--out", f"{d}/9")
    many = save(f"{d}/many.jsonl", "".join(json.dumps({"text": "a", "url": f"u{i}"}) + "\n" for i in range(300)))
    refused("mix: the key is no source", ["url", "256"], many, "--mix", "natural", "--mix-key", "url", "--out", f"{d}/10")
    same = save(f"{d}/same.jsonl", "".join(json.dumps({"text": f"text {i}", "s": "a b" if i % 2 else "a/b"}) + "\n" for i in range(30)))
    refused("mix: same file name", ["a b", "a/b"], same, "--mix", "natural", "--mix-key", "s", "--out", f"{d}/11")


def test_datasets_on_disk(d):
    """Folders that Hugging Face's `datasets` wrote itself."""
    datasets, arrow = library("datasets"), library("pyarrow")
    datasets.disable_progress_bars()
    texts = [t for t in sample_texts(700) if t.strip()]
    meta = [{"redpajama_set_name": f"S{i % 2}"} for i in range(len(texts))]
    whole = datasets.Dataset.from_dict({"text": texts, "meta": meta})
    whole.save_to_disk(f"{d}/one")
    whole.save_to_disk(f"{d}/three", num_shards=3)
    whole.select(range(5, 600, 2)).save_to_disk(f"{d}/chosen")
    datasets.DatasetDict({"train": whole, "test": whole.select(range(3))}).save_to_disk(f"{d}/dict")
    whole.map(lambda row: {"text": row["text"] + "!"}).save_to_disk(f"{d}/mapped")
    shutil.copy(f"{d}/one/data-00000-of-00001.arrow", f"{d}/one/cache-1234.arrow")      # as map() leaves it there
    for name, want in (("one", texts), ("three", texts), ("dict", texts), ("chosen", texts[5:600:2]),
                       ("mapped", [t + "!" for t in texts]), ("dict/test", texts[:3])):
        r = run(f"{d}/{name}", "--out", f"{d}/o_{name}", "--val-fraction", 0)
        check(f"datasets: {name}", r.returncode == 0 and texts_of(f"{d}/o_{name}") == want, r.stderr)
        check(f"datasets: {name}: what is not read is told", ("test/" in r.stderr) == (name == "dict") and
              ("cache-1234.arrow" in r.stderr) == (name == "one"), r.stderr)
    must(f"{d}/three", "--mix", "S0=1,S1=1", "--out", f"{d}/mix")
    check("datasets: a mix", mix_of(f"{d}/mix")[1].keys() == {"S0", "S1"})
    data = open(f"{d}/one/data-00000-of-00001.arrow", "rb").read()
    for name, some in (("cut", data[:len(data) // 2]), ("end", data[:-8]), ("empty", b"")):
        path = save(f"{d}/{name}.arrow", some)
        refused(f"datasets: {name}", [path, "damaged"], path, "--out", f"{d}/p_{name}")
    os.unlink(f"{d}/three/data-00001-of-00003.arrow")
    refused("datasets: a file is gone", ["data-00001-of-00003.arrow", "missing"], f"{d}/three", "--out", f"{d}/q")
    shutil.rmtree(f"{d}/dict/train")
    refused("datasets: no train", ["no split train", "test"], f"{d}/dict", "--out", f"{d}/r")
    state = read_json(f"{d}/chosen/state.json")
    save(f"{d}/chosen/state.json", json.dumps({**state, "_indices_data_files": [{"filename": "indices.arrow"}]}))
    refused("datasets: a choice of rows", ["flatten_indices"], f"{d}/chosen", "--out", f"{d}/s")


def test_arrow_without_datasets(d):
    """The same layout written by hand: stream and file form, strings of all kinds."""
    arrow, ipc = library("pyarrow"), library("pyarrow.ipc")
    texts = [t for t in sample_texts(500) if t.strip()]
    for kind, new in (("stream", ipc.new_stream), ("file", ipc.new_file)):
        for text in (arrow.string(), arrow.large_string()):
            table = arrow.table({"n": list(range(len(texts))), "text": arrow.array(texts, text)})
            with new(f"{d}/a.arrow", table.schema) as out:
                out.write_table(table, max_chunksize=130)
            must(f"{d}/a.arrow", "--out", f"{d}/{kind}{text}", "--val-fraction", 0)
            check(f"arrow {kind} {text}", texts_of(f"{d}/{kind}{text}") == texts)
    refused("arrow: no such column", ["n, text", "--text-key"], f"{d}/a.arrow", "--out", f"{d}/x", "--text-key", "body")


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import tokens
left = int(sys.argv[2])
def deadly(call):
    def wrapped(*args, **more):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **more)
    return wrapped
os.replace, os.fsync, os.unlink = deadly(os.replace), deadly(os.fsync), deadly(os.unlink)
sys.exit(tokens.main(sys.argv[3:]))
"""


def test_kill_and_go_on(d):
    """kill -9 before each step that reaches the disk, and at any time: the same command gives the same bytes."""
    slim_pajama(f"{d}/slim", per_file=900, ending=".jsonl")
    slim_pajama(f"{d}/large", per_file=3000, ending=".jsonl")
    rng = random.Random(2)
    save_jsonl(f"{d}/some/1.jsonl", [" ".join(rng.choices(("one", "two"), k=400)) for _ in range(900)])
    save(f"{d}/some/2.txt.gz", gzip.compress(("\n".join(f"line {i} of a long text" for i in range(90000)) + "\n===\n" + "x y " * 99).encode()))
    with contextlib.suppress(Skip):
        arrow, parquet = library("pyarrow"), library("pyarrow.parquet")
        parquet.write_table(arrow.table({"text": [f"row {i} " * 300 for i in range(900)]}), f"{d}/some/3.parquet")
    common = ("--save-every", 0, "--shard-tokens", 400000, "--jobs", 1)
    for name, args in (("plain", [f"{d}/some", "--split-on", "==="]),
                       ("ds", [f"{d}/some", "--format", "ds", "--seq-len", 100, "--token-bytes", 4]),
                       ("mix", [f"{d}/slim", "--mix", "RedPajamaC4=1,RedPajamaBook=1,RedPajamaWikipedia=1", "--repeat", 2]),
                       ("end", [f"{d}/some/2.txt.gz"])):
        must(*args, *common, "--out", f"{d}/whole/{name}")
        want, told, out = everything_in(f"{d}/whole/{name}"), 0, f"{d}/killed/{name}"
        for k in (1, 2, 3, 5, 7, 10, 14, 19, 25, 33, 43, 55, 70):
            p = subprocess.run([sys.executable, "-c", KILLED, HERE, str(k), *map(str, [*args, *common, "--out", out])],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, universal_newlines=True)
            if p.returncode == 0:
                break
            check(f"{name}: killed at {k}", p.returncode == -signal.SIGKILL, p.stderr)
            r = run(*args, *common, "--out", out)
            told += "goes on after" in r.stdout
            check(f"{name}: killed at {k}, then as if not", r.returncode == 0 and everything_in(out) == want, r.stderr)
            shutil.rmtree(out)
        check(f"{name}: work was kept", told >= 3 or name == "end", told)
    args = [f"{d}/large", "--mix", "natural", "--val-fraction", 0.1, *common[:-1], 2]
    must(*args, "--out", f"{d}/whole/again")
    times, began = 0, time.time()
    while True:         # killed again and again, with workers; it must come to an end
        p = subprocess.Popen([sys.executable, SCRIPT, *map(str, args), "--out", f"{d}/again"], stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE)
        try:
            p.wait(rng.uniform(0.5, 1.5) + times / 20)
            break
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()
            times += 1
    check(f"killed {times} times: the same bytes", p.returncode == 0 and everything_in(f"{d}/again") == everything_in(f"{d}/whole/again"),
          p.stderr.read())


def test_go_on_refuses_other_input(d):
    """What was read must still be so; what comes later may be mended."""
    texts = [f"text {i} " + "word " * 400 for i in range(2000)]
    lines = [json.dumps({"text": t}) + "\n" for t in texts]
    save(f"{d}/in/1.jsonl", "".join(lines[:1000]))
    bad = save(f"{d}/in/2.jsonl", "".join(lines[1000:1900] + ["{bad\n"] + lines[1900:]))
    args = (f"{d}/in", "--out", f"{d}/o", "--save-every", 0, "--val-fraction", 0)
    refused("a bad line", ["2.jsonl:901"], *args)
    check("what was written before it is kept", os.path.exists(f"{d}/o/.state.json"))
    shutil.copytree(f"{d}/o", f"{d}/o_kept")
    save(f"{d}/in/1.jsonl", "".join(lines[1:1000]))
    refused("a file that was read has changed", ["1.jsonl", "changed", f"remove {d}/o"], *args)
    save(f"{d}/in/1.jsonl", "".join(lines[:1000]))
    save(bad, "".join(lines[1001:]))
    refused("the front of the open file has changed", ["2.jsonl", "changed"], *args)
    save(bad, "".join(lines[1000:1010]))
    refused("the open file is too short", ["2.jsonl", "changed"], *args)
    save(bad, "".join(lines[1000:]))
    r = run(*args)
    check("mended: it goes on", r.returncode == 0 and "goes on after" in r.stdout and texts_of(f"{d}/o") == texts, r.stderr)
    shutil.rmtree(f"{d}/o")
    os.rename(f"{d}/o_kept", f"{d}/o")
    for n in os.listdir(f"{d}/o"):
        if n.endswith(".tmp"):
            os.unlink(f"{d}/o/{n}")
    refused("a shard is gone", ["missing", "remove"], *args)
    shutil.rmtree(f"{d}/o")
    must(*args)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2500000, 2500000))        # as a full disk does
    refused("disk full", ["free space"], *args[:1], "--out", f"{d}/full", *args[3:], preexec_fn=limit)
    r = run(*args[:1], "--out", f"{d}/full", *args[3:])
    check("room again: it goes on", "goes on after" in r.stdout and everything_in(f"{d}/full") == everything_in(f"{d}/o"), r.stderr)
    os.unlink(f"{d}/o/train_000.bin")
    r = run(*args)
    check("complete, but a shard is gone: made anew", r.returncode == 0 and "made anew" in r.stderr and texts_of(f"{d}/o") == texts)
    save_jsonl(f"{d}/in/2.jsonl", texts[:10])
    r = run(*args)
    check("complete, but the input has changed: made anew", r.returncode == 0 and len(texts_of(f"{d}/o")) == 1010, r.stderr)
    save_jsonl(f"{d}/in/3.jsonl", texts[:5])
    r = run(*args)
    check("complete, but there is a new file: made anew", r.returncode == 0 and len(texts_of(f"{d}/o")) == 1015, r.stderr)
    save_jsonl(f"{d}/in/3.jsonl", [t.replace("text", "TEXT") for t in texts[:5]])
    later = os.path.getmtime(f"{d}/o/tokens.json") + 2          # a clock of whole seconds is enough
    os.utime(f"{d}/in/3.jsonl", (later, later))
    r = run(*args)
    check("complete, but a file of the same size is another: made anew", r.returncode == 0 and
          texts_of(f"{d}/o")[-1].startswith("TEXT 4"), r.stderr)
    os.utime(f"{d}/in/3.jsonl", (later + 9, later + 9))
    check("complete, a file is newer, but the same", "is complete already" in must(*args))


def test_two_runs_in_one_folder(d):
    path, outs = save_jsonl(f"{d}/in.jsonl", sample_texts(20000)), (f"{d}/o", f"{d}/alone")
    args = (path, "--format", "ds", "--seq-len", 64, "--jobs", 1, "--save-every", 0)
    p = subprocess.Popen([sys.executable, SCRIPT, *map(str, args), "--out", outs[0]], stdout=subprocess.DEVNULL)
    while p.poll() is None and not os.path.exists(f"{outs[0]}/.state.json"):
        time.sleep(0.001)
    p.send_signal(signal.SIGSTOP)
    check("the first is at work", not os.path.exists(f"{outs[0]}/manifest.json"))
    refused("a second run", [outs[0], "in use"], *args, "--out", outs[0])
    p.send_signal(signal.SIGCONT)
    check("the first goes on to its end", p.wait() == 0)
    must(*args, "--out", outs[1])
    shards = [{n: b for n, b in everything_in(o).items() if n.endswith(".ds")} for o in outs]
    check("its shards are as if it had been alone", shards[0] == shards[1] and len(shards[0]) == 2, list(shards[0]))


def test_bad_input(d):
    good = save_jsonl(f"{d}/good.jsonl", ["hello", "world"])
    o = ["--out", f"{d}/o"]
    refused("missing file", ["nowhere.txt", "no such file"], f"{d}/nowhere.txt", *o)
    refused("unknown kind", ["x.csv", ".jsonl"], save(f"{d}/x.csv", "a"), *o)
    refused("empty folder", ["no .txt"], os.path.dirname(save(f"{d}/e/x.csv", "a")), *o)
    latin = save(f"{d}/latin.txt", b"a" * 700001 + b"\xe9t\xe9")
    refused("wrong encoding", ["latin.txt", "byte 700001", "0xe9", "--errors replace"], latin, "--out", f"{d}/o1")
    must(latin, "--out", f"{d}/o2", "--errors", "replace", "--val-fraction", 0)
    text = documents(shard_ids(f"{d}/o2", "train"), read_tokenizer(f"{d}/o2/tokenizer.bin"))[0].decode()
    check("--errors replace", text == "a" * 700001 + "\ufffdt\ufffd")
    for name, line, words in (("bad JSON", b'{"text": ', ["bad JSON"]), ("no key", b'{"x": 1}', ["--text-key"]),
                              ("JSON array", b'[{"text": "a"},', ["jq"]), ("not a string", b'{"text": 5}', ["not a string"]),
                              ("surrogate", b'{"text": "\\ud800"}', ["surrogate"]), ("latin JSON", b'{"text": "\xe9"}', ["UTF-8"])):
        path = save(f"{d}/bad.jsonl", b'{"text": "fine"}\n\n' + line + b"\n")
        shutil.rmtree(f"{d}/o3", ignore_errors=True)
        refused(name, ["bad.jsonl:3"] + words, path, "--out", f"{d}/o3")
    refused("empty input", ["nothing to tokenize"], save(f"{d}/empty.txt", ""), "--out", f"{d}/o4")
    refused("white input", ["nothing to tokenize"], save(f"{d}/white.txt", " \n\n"), "--out", f"{d}/o5")
    refused("damaged gzip", ["cut.txt.gz", "damaged"], save(f"{d}/cut.txt.gz", gzip.compress(os.urandom(9999))[:5000]), "--out", f"{d}/o6")
    refused("unwritable out", ["latin.txt"], good, "--out", f"{latin}/x")
    refused("foreign folder", ["not empty"], good, "--out", d)
    refused("not a tokenizer", ["latin.txt", "neither"], good, *o, "--tokenizer", latin)
    refused("missing tokenizer", ["none.model"], good, *o, "--tokenizer", f"{d}/none.model")
    refused("bad tiktoken line", ["t.tiktoken:2"], good, *o, "--tokenizer", save(f"{d}/t.tiktoken", "YQ== 0\n%% x\n"))
    refused("damaged model", ["m.model", "damaged"], good, *o, "--tokenizer", save(f"{d}/m.model", b"\n\x7fabc"))
    refused("WordPiece", ["WordPiece"], good, *o, "--tokenizer", save(f"{d}/w.json", '{"model": {"type": "WordPiece"}}'))
    refused("unknown option", ["--frobnicate"], good, *o, "--frobnicate")
    refused("seq-len without ds", ["--seq-len"], good, *o, "--seq-len", 8)
    refused("ds rows too long", ["smaller --seq-len"], good, "--out", f"{d}/o7", "--format", "ds", "--seq-len", 512)
    refused("no out", ["--out"], good)
    refused("bad regex", ["regular expression"], good, *o, "--split-on", "(")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))        # as a full disk does
    refused("disk full", [f"{d}/o8", "--out"], save(f"{d}/b.txt", "b" * 3000000), "--out", f"{d}/o8", preexec_fn=limit)
    check("no shard of a failed run", [n for n in os.listdir(f"{d}/o8") if n.endswith((".bin", ".tmp"))] == [])
    block = save(f"{d}/block/sentencepiece.py", "raise ImportError('blocked')")
    for name in ("tiktoken", "tokenizers", "zstandard", "pyarrow", "numpy"):
        shutil.copy(block, f"{d}/block/{name}.py")
    env = {**os.environ, "PYTHONPATH": f"{d}/block"}
    refused("no numpy", ["pip install numpy"], good, *o, env=env)
    os.unlink(f"{d}/block/numpy.py")
    with contextlib.suppress(Skip):
        refused("no sentencepiece", ["pip install sentencepiece"], good, *o, "--tokenizer",
                shared("tokenizers/mistral_tokenizer.model.v1"), env=env)
    refused("no tiktoken", ["pip install tiktoken"], good, *o, "--tokenizer", save(f"{d}/t2", "YQ== 0\nYg== 1\n"),
            "--tiktoken-pattern", "r50k", env=env)
    refused("no tokenizers", ["pip install tokenizers"], good, *o, "--tokenizer",
            save(f"{d}/t3", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'), env=env)
    refused("no zstandard", ["pip install zstandard"], save(f"{d}/q.txt.zst", "x"), "--out", f"{d}/o9", env=env)
    refused("no pyarrow", ["pip install pyarrow"], save(f"{d}/q.parquet", "x"), "--out", f"{d}/o10", env=env)
    for name, text, kind in (("mark", "\ufeffhello", "utf-16"), ("le", "hello", "utf-16le"), ("be", "hello", "utf-16be"),
                             ("wide", "\ufeffhello", "utf-32")):
        code = {"utf-16": "utf-16le", "utf-32": "utf-32le"}.get(kind, kind)
        path = save(f"{d}/{name}.txt", text.encode(code))
        refused(f"UTF-16 {name}", [f"{name}.txt", kind.upper(), f"iconv -f {kind}"], path, "--errors", "replace",
                "--out", f"{d}/o11")
        shutil.rmtree(f"{d}/o11")
    many = save(f"{d}/many", "".join(f"{base64.b64encode(i.to_bytes(3, 'big')).decode()} {i}\n" for i in range(200000)))
    refused("200,000 ranks", ["200,000", "--tiktoken-pattern", "o200k"], good, *o, "--tokenizer", many)
    with contextlib.suppress(Skip):      # as many ranks as GPT-2 has, but others
        with open(shared("tokenizers/r50k_base.tiktoken"), "rb") as f:
            other = save(f"{d}/other", f.read().replace(b"IHQ= 256\nIGE= 257\n", b"IGE= 256\nIHQ= 257\n"))
        refused("50,256 other ranks", ["50,256", "--tiktoken-pattern"], good, *o, "--tokenizer", other)


def test_wide_tokens(d):
    """Ids of 2^16 and more: uint32 by default, refused where uint16 is asked for. Needs tiktoken."""
    library("tiktoken")
    ranks = {bytes([i]): i for i in range(256)}
    ranks[b"ab"] = 70000
    model = save(f"{d}/wide.tiktoken", "".join(f"{base64.b64encode(k).decode()} {v}\n" for k, v in ranks.items()))
    text = save_jsonl(f"{d}/in.jsonl", ["xx", "ab"])
    model = ("--tokenizer", model, "--tiktoken-pattern", "r50k")
    must(text, *model, "--out", f"{d}/o", "--val-fraction", 0)
    ids, head = read_bin(f"{d}/o/train_000.bin")
    check("uint32 shard", head[:2] == (20240801, 7) and 70000 in ids and head[3] == 70001 and head[5] == 257)
    refused("id too large for uint16", ["70000", "document 1"], text, *model, "--out", f"{d}/p", "--token-bytes", 2)


def test_inspect(d):
    must(save_jsonl(f"{d}/in.jsonl", ["Hello there", "Bye"]), "--out", f"{d}/o", "--val-fraction", 0)
    path = f"{d}/o/train_000.bin"
    text = must("--inspect", path)
    check("inspect", all(w in text for w in ("16 tokens", "vocabulary 257", "2 documents", "= recorded", "Hello there")), text)
    data = open(path, "rb").read()
    refused("inspect: a flipped bit", ["checksum"], "--inspect", save(f"{d}/o/flip.bin", data[:1030] + b"\x01" + data[1031:]))
    refused("inspect: truncated", ["header promises"], "--inspect", save(f"{d}/o/cut.bin", data[:-2]))
    refused("inspect: foreign", ["not a token shard"], "--inspect", save(f"{d}/o/no.bin", b"x" * 5000))
    refused("inspect: ds without metadata", ["metadata.json"], "--inspect", save(f"{d}/o/a.ds", b"x" * 50))
    refused("inspect: missing", ["gone.bin"], "--inspect", f"{d}/o/gone.bin")


def test_shared_corpora(d):
    """Tinyshakespeare by speeches and C4 with the Mistral model, document by document."""
    sp = library("sentencepiece").SentencePieceProcessor(model_file=shared("tokenizers/mistral_tokenizer.model.v1"))
    model = shared("tokenizers/mistral_tokenizer.model.v1")
    with open(shared("text/tinyshakespeare.txt"), encoding="utf-8") as f:
        speeches = [t.strip("\n") for t in f.read().split("\n\n") if t.strip()]
    with open(shared("text/c4_demo.jsonl"), encoding="utf-8") as f:
        pages = [json.loads(line)["text"] for line in f]
    for name, path, texts in (("shakespeare", shared("text/tinyshakespeare.txt"), speeches), ("c4", shared("text/c4_demo.jsonl"), pages)):
        must(path, "--split-on", "blank-lines", "--tokenizer", model, "--out", f"{d}/{name}", "--val-fraction", 0)
        ids, tok = shard_ids(f"{d}/{name}", "train"), read_tokenizer(f"{d}/{name}/tokenizer.bin")
        check(f"{name}: decoded = text", documents(ids, tok) == [t.encode() for t in texts])
        check(f"{name}: ids = library", ids == [i for t in texts for i in [1] + sp.encode(t) + [2]])


def main(tests=globals()):
    wanted, start, skipped = sys.argv[1:], time.time(), 0
    for name, test in list(tests.items()):
        if name.startswith("test_") and (not wanted or any(w in name for w in wanted)):
            began, folder = time.time(), tempfile.mkdtemp(prefix="tokens_")
            try:
                library("numpy") if name != "test_bad_input" else None
                test(folder)
            except Skip as e:
                print(f"skipped: {name}: {e}")
                skipped += 1
            except Exception as e:
                check(name, False, f"{type(e).__name__}: {e} (line {e.__traceback__.tb_next and e.__traceback__.tb_next.tb_lineno})")
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            print(f"{name} {time.time() - began:.1f} s", flush=True)
    print(f"{time.time() - start:.0f} s")
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
