#!/usr/bin/env python3
"""Tests of data/choices.py.

    python3 data/test_choices.py            # all; the last line is "N passed, N failed"
    python3 data/test_choices.py packing    # only the tests whose name contains one of these words

The oracles are the texts themselves (the rows decode to query + delimiter + choice, the targets to what follows the query)
and counts by hand. That the trainer's scores are lm_eval's is in dev/test_hf.py.
"""
import bz2, json, os, random, shutil, struct, subprocess, sys, tempfile, time

HERE = os.path.dirname(os.path.abspath(__file__))
SHARED = os.path.join(HERE, "..", "..", "shared", "data")
SCRIPT = os.path.join(HERE, "choices.py")
passed, failed = 0, 0


class Skip(Exception):
    pass


def check(what, ok, more=""):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print(f"FAILED {what} {more}")


def shared(path):
    full = os.path.join(SHARED, path)
    if not os.path.exists(full):
        raise Skip(f"shared/data/{path} is not here")
    return full


def run(*args):
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True)


def must(*args):
    r = run(*args)
    check(f"exit 0 of {args}", r.returncode == 0, r.stderr)
    return r.stdout


def refused(name, words, *args):
    """One line "error: ...", exit 1, and the line names what matters."""
    r = run(*args)
    ok = r.returncode == 1 and r.stderr.count("\n") == 1 and r.stderr.startswith("error: ")
    check(f"{name}: one line", ok, f"exit {r.returncode}: {r.stderr}")
    check(f"{name}: says {words}", all(w in r.stderr for w in words), r.stderr)


def write(path, text):
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
    return path


def rows_of(folder, name):
    """-> {(task, choice): (ids, number of targets, gold, length)}, rows, metadata; checks what must hold of every row."""
    with open(f"{folder}/validation/metadata.json") as f:
        meta = json.load(f)
    with open(f"{folder}/validation/val_{name}_000.ds", "rb") as f:
        words = f.read()
    with open(f"{folder}/validation/val_{name}_000.choices", "rb") as f:
        lists = list(struct.iter_unpack("<4i", f.read()))
    n, found, at, most = meta["sequence_length"] + 1, {}, 0, 0
    words = struct.unpack(f"<{len(words) // 4}I", words)
    for r in range(0, len(words), n):
        row, documents = words[r:r + n], []
        while row and row[-1] == 1 << 30:
            row = row[:-1]
        for w in row:
            if w & 1 << 30:
                documents.append([])
            documents[-1].append(w)
        most = max(most, len(documents))
        for d in documents:
            flags = [w >> 31 for w in d]
            check("targets are the end of a document", 0 < sum(flags) < len(d) and flags == sorted(flags))
            task, choice, gold, length = lists[at]
            found[task, choice] = [w & 0xFFFFFF for w in d], sum(flags), gold, length
            at += 1
    check("the list has every document once", at == len(lists) == len(found) == meta["documents"])
    check("metadata counts", meta["documents_per_row"] == most and meta["total_sequences"] * n == len(words)
          and meta["targets"] == sum(f[1] for f in found.values()) and meta["tasks"] == len({t for t, _ in found}), meta)
    return found, len(words) // n, meta


def read_back(found, tasks, n=None, delimiter=" "):
    for t, (query, choices, gold) in enumerate(tasks):
        for c, choice in enumerate(choices):
            ids, targets, g, length = found[t, c]
            text = (query + delimiter + choice).encode()
            check(f"task {t}, choice {c}", bytes(ids) == text[-n:] if n else bytes(ids) == text, f"{bytes(ids)} {text}")
            stem = query.rstrip()
            check("targets", targets == len(text) - len(stem.encode()) and g == gold and length == len(choice))


TASKS = [("What is red?", ["an apple", "the sky", "gr\u00e4ss"], 0), ("Two and two are  ", ["four", "five"], 0),
         ("A", ["b", "cc", "ddd", "e"], 2)]


def jsonl(path, tasks, keys=("query", "choices", "gold")):
    return write(path, "".join(json.dumps(dict(zip(keys, t))) + "\n" for t in tasks))


def test_any_task(d):
    for i, keys in enumerate([("query", "choices", "gold"), ("context", "choices", "label"),
                              ("question", "choices", "answer")]):
        path = jsonl(f"{d}/my_{i}.jsonl", [(q, c, str(g) if i else g) for q, c, g in TASKS], keys)
        must(path, "--tokenizer", "bytes", "--seq-len", 63, "--out", f"{d}/{i}", "--name", "mine")
        found, _, meta = rows_of(f"{d}/{i}", "mine")
        read_back(found, TASKS)
        check("stage", meta["stage"] == "choice" and meta["dataset"] == "mine"
              and meta["counts"] == {"tasks": 3, "left truncated": 0}, meta)
    with open(f"{d}/0/validation/val_mine_000.ds", "rb") as a, open(f"{d}/2/validation/val_mine_000.ds", "rb") as b:
        check("the same bytes", a.read() == b.read())
    must(jsonl(f"{d}/colon.jsonl", TASKS), "--tokenizer", "bytes", "--seq-len", 63, "--out", f"{d}/colon", "--delimiter",
         ": ", "--limit", 1)
    read_back(rows_of(f"{d}/colon", "colon")[0], TASKS[:1], delimiter=": ")


def test_left_truncation(d):
    tasks = [("x" * 40 + "end", ["yes", "no, never"], 0), ("short", ["a", "b"], 1)]
    out = must(jsonl(f"{d}/long.jsonl", tasks), "--tokenizer", "bytes", "--seq-len", 15, "--out", f"{d}/out")
    found, _, meta = rows_of(f"{d}/out", "long")
    read_back(found, tasks, n=16)
    check("counted", meta["counts"]["left truncated"] == 2 and "2 too long, cut at their left" in out, out)
    refused("a choice too long", ["long.jsonl:1", "choice 1 has 10 tokens", "--seq-len 9"], f"{d}/long.jsonl", "--tokenizer",
            "bytes", "--seq-len", 9, "--out", f"{d}/no")


def test_empty_query_begins_with_eos(d):
    must(jsonl(f"{d}/e.jsonl", [("", ["one", "two"], 1)]), "--tokenizer", "bytes", "--seq-len", 15, "--out", f"{d}/out")
    found, _, _ = rows_of(f"{d}/out", "e")
    check("EOS, then the choice", found[0, 0][:2] == ([256, *b" one"], 4), found)


def test_packing(d):
    sys.path.insert(0, HERE)
    import choices
    rng = random.Random(3)
    for _ in range(200):
        room = rng.randint(1, 30)
        lengths = [rng.randint(1, room) for _ in range(rng.randint(1, 40))]
        rows, order = choices.best_fit(lengths, room), sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        plain = []                          # the same rule, by looking at every row
        for i in order:
            fits = [r for r in plain if room - sum(lengths[j] for j in r) >= lengths[i]]
            if fits:
                max(fits, key=lambda r: sum(lengths[j] for j in r)).append(i)
            else:
                plain.append([i])
        check("each once, none too long", sorted(sum(rows, [])) == list(range(len(lengths)))
              and all(sum(lengths[i] for i in r) <= room for r in rows))
        check("as many rows as the plain rule", len(rows) == len(plain), f"{len(rows)} {len(plain)} {lengths} {room}")


def test_hellaswag(d):
    path = shared("text/hellaswag_val_full.txt.bz2")
    sys.path.insert(0, HERE)
    import choices
    plain, theirs = (list(choices.read_tasks([path], how)) for how in ("plain", "lm_eval"))
    differ = [(a, b) for a, b in zip(plain, theirs) if not a[1].endswith(".")]
    check("10,042 tasks, 3,243 with two parts", len(plain) == len(theirs) == 10042 and len(differ) == 3243, f"{len(differ)}")
    check("only capitals differ", all(a[1].lower() == b[1].lower() and a[2:] == b[2:] for a, b in zip(plain, theirs)))
    check("a capital begins it", theirs[0][1] == "Roof shingle removal: A man is sitting on a roof. He", theirs[0][1])
    with bz2.open(path, "rt", encoding="utf-8") as f:
        head = "".join(next(f) for _ in range(60))
    # the published form, made from the text, gives the same rows
    rows = []
    for (_, q, endings, gold), (_, changed, _, _) in zip(plain[:10], theirs):
        label, _, context = q.partition(": ")
        at = context.rfind(". ") + 2 if not q.endswith(".") else len(context)
        rows.append({"activity_label": label, "ctx_a": context[:at].strip(), "ctx_b": context[at:], "endings": endings,
                     "label": str(gold)})
    for how in "plain", "lm_eval":
        for name, text in ("hs.txt", head), ("hs.jsonl", "".join(json.dumps(r) + "\n" for r in rows)):
            must(write(f"{d}/{name}", text), "--tokenizer", "bytes", "--seq-len", 1023, "--out", f"{d}/{how}{name}", "--name",
                 "hs", "--hellaswag", how)
        a, b = (rows_of(f"{d}/{how}{name}", "hs")[0] for name in ("hs.txt", "hs.jsonl"))
        check(f"{how}: text and JSON lines", a == b and len(a) == 40)


def test_bad_input(d):
    good = ("q", ["a", "b"], 0)
    cases = [
        ("no key", '{"q": 1}', [":1", '"query"']), ("bad JSON", '{"query": ', [":1", "bad JSON"]),
        ("gold beyond", jl(("q", ["a", "b"], 2)), [":1", "the right choice is 2", "2"]),
        ("gold below", jl(("q", ["a", "b"], -1)), [":1", "-1"]), ("gold a letter", jl(("q", ["a", "b"], "A")), [":1", "'A'"]),
        ("one choice", jl(good) + jl(("q", ["a"], 0)), [":2", "at least two"]),
        ("empty choice", jl(("q", ["a", ""], 0)), [":1", "choice 1 is empty"]),
        ("a number as choice", jl(("q", ["a", 2], 0)), [":1", "texts"]),
        ("a list as query", jl((["q"], ["a", "b"], 0)), [":1", "not a text"]),
        ("a lone surrogate", '{"query": "\\ud800", "choices": ["a", "b"], "gold": 0}\n', [":1", "surrogate"]),
        ("nothing", "\n", ["no task"]), ("text of another kind", "a\nb\nc\nd\ne\nf\n", [":1", "six lines"]),
        ("a list", "[1]\n", [":1"])]
    for name, text, words in cases:
        refused(name, words, write(f"{d}/bad.jsonl", text), "--tokenizer", "bytes", "--seq-len", 63, "--out", f"{d}/out")
    with open(f"{d}/latin.jsonl", "wb") as f:
        f.write(jl(good).replace("q", "\u00e9").encode("latin1"))
    path = jsonl(f"{d}/good.jsonl", [good])
    refused("latin1", [":1", "UTF-8"], f"{d}/latin.jsonl", "--tokenizer", "bytes", "--seq-len", 63, "--out", f"{d}/out")
    said = str(run(f"{d}/latin.jsonl", "--tokenizer", "bytes", "--seq-len", 63, "--out", f"{d}/out"))
    check("latin1: only options that there are are named", "UTF-8" in said and "--errors" not in said, said)
    refused("a row beyond any memory", ["out of range"], path, "--tokenizer", "bytes", "--seq-len", 10**12, "--out", f"{d}/out")
    refused("no such file", ["none.jsonl"], f"{d}/none.jsonl", "--tokenizer", "bytes", "--seq-len", 63, "--out", f"{d}/out")
    refused("no tokenizer", ["--tokenizer"], path, "--seq-len", 63, "--out", f"{d}/out")
    refused("a name that numbers", ["--name x_001"], path, "--tokenizer", "bytes", "--seq-len", 63, "--out", f"{d}/out",
            "--name", "x_001")
    must(path, "--tokenizer", "bytes", "--seq-len", 63, "--out", f"{d}/out")
    refused("a full folder", ["is not empty"], path, "--tokenizer", "bytes", "--seq-len", 63, "--out", f"{d}/out")


def jl(task):
    return json.dumps(dict(zip(("query", "choices", "gold"), task)), ensure_ascii=False) + "\n"


def main():
    wanted, skipped = sys.argv[1:], 0
    for name, test in list(globals().items()):
        if name.startswith("test_") and (not wanted or any(w in name for w in wanted)):
            began, folder = time.time(), tempfile.mkdtemp(prefix="choices_")
            try:
                test(folder)
            except Skip as e:
                print(f"skipped: {name}: {e}")
                skipped += 1
            except Exception as e:
                at = e.__traceback__.tb_next
                check(name, False, f"{type(e).__name__}: {e} (line {at and at.tb_lineno})")
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            print(f"{name} {time.time() - began:.1f} s", flush=True)
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
