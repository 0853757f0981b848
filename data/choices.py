#!/usr/bin/env python3
"""Multiple choice tasks -> rows that litespark solves with --eval-tasks.

    python3 data/choices.py hellaswag_val_full.txt.bz2 --tokenizer tokenizer.model --seq-len 1024 --out data/hellaswag
    python3 data/choices.py hellaswag_val.jsonl --tokenizer r50k_base.tiktoken --seq-len 1024 --out data/hellaswag
    python3 data/choices.py piqa.jsonl --tokenizer tokenizer.json --seq-len 512 --limit 200 --out data/piqa
    ./train_litespark --init-from DIR --eval-only --eval-tasks 'data/hellaswag/validation/*.ds'

Inputs, told apart by content; each also with .gz, .zst, .xz or .bz2:
    - HellaSwag as text: six lines per task (context, number of the right ending, four endings);
    - HellaSwag as published (JSON lines with ctx_a, ctx_b, activity_label, endings, label);
    - any task as JSON lines: "query" (or "context", "question"), "choices" (texts), "gold" (or "label", "answer": the number
      of the right one, from 0). The model reads query, delimiter and choice.

The scores are those of EleutherAI's lm-evaluation-harness (lm_eval 0.4.13): the tokens of a choice are those of query +
delimiter + choice beyond as many as the query has by itself; an empty query is BOS (or else EOS); what is longer than
--seq-len + 1 tokens loses tokens at its left, and is counted; acc_norm divides by the characters of the choice without the
delimiter. --hellaswag lm_eval (default) has the context as lm_eval's task has it: the second part (ctx_b) begins with a
capital and goes on in small letters. The text file does not tell the parts: there, ctx_b is what follows the last end of a
sentence in a context that ends without one (3,243 of the 10,042 tasks). --hellaswag plain leaves the context as it is.

Output (byte tables in data/README.md): OUT/validation/val_NAME_000.ds, val_NAME_000.choices, metadata.json, tokenizer.bin
and the files for AutoTokenizer. The same inputs and options give the same bytes.
"""
import argparse, hashlib, itertools, json, os, re, sys

import tokens
from chat import pack
from tokens import UserError

TARGET, START = 1 << 31, 1 << 30            # beside the token's id
PADDING = START                             # a document of its own, id 0
QUERY, GOLD = ("query", "context", "question"), ("gold", "label", "answer")
SENTENCE_END = re.compile(r"[.!?][\"')]*\s+")


# ---- Tasks: (where it stands, query, [choices], number of the right one) -------------------------------------
def tidy(text):
    """As lm_eval's HellaSwag does: [marks] of WikiHow and double spaces go."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def with_capital(context):
    """The second part of a context of the text file as lm_eval has it; see the file's top."""
    if re.search(r"[.!?][\"')]*$", context):
        return context                      # of WikiHow: there is no second part
    ends = [m.end() for m in SENTENCE_END.finditer(context)]
    at = ends[-1] if ends else context.find(": ") + 2 if ": " in context else 0
    return context[:at] + context[at:].capitalize()


def hellaswag_text(path, lines, how):
    for first in itertools.count(0, 6):
        block = [line.rstrip("\r\n") for line in itertools.islice(lines, 6)]
        if not any(line.strip() for line in block):
            return
        if len(block) < 6 or block[1].strip() not in ("0", "1", "2", "3"):
            raise UserError(f"{path}:{first + 1}: not the six lines of a task (context, 0 to 3, four endings); get the file "
                            "again")
        yield f"{path}:{first + 1}", with_capital(block[0]) if how == "lm_eval" else block[0], block[2:], int(block[1])


def one_of(row, names, where):
    name = next((n for n in names if n in row), None)
    if name is None:
        raise UserError(f"{where}: no key \"{names[0]}\" (or {', '.join(names[1:])}); rename yours (jq)")
    return row[name]


def number(value, where):
    if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{where}: the right choice is {value!r}, not its number from 0")
    return value


def json_tasks(path, lines, how):
    for n, line in enumerate(lines, 1):
        where = f"{path}:{n}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where}: bad JSON ({e}); mend or remove the line")
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object; see --help")
        if "ctx_a" in row and "endings" in row:
            second = row.get("ctx_b", "")
            texts = [row.get("activity_label", ""), row["ctx_a"], second]
            if not all(isinstance(t, str) for t in texts) or not isinstance(row["endings"], list):
                raise UserError(f"{where}: not a task of HellaSwag (ctx_a, ctx_b, activity_label, endings, label); get the "
                                "file again")
            query = tidy(f"{texts[0]}: {texts[1]} {second.capitalize() if how == 'lm_eval' else second}")
            choices, gold = [tidy(c) if isinstance(c, str) else c for c in row["endings"]], row.get("label")
        else:
            query, choices, gold = (one_of(row, names, where) for names in (QUERY, ("choices",), GOLD))
        yield where, query, choices, number(gold, where)


def decoded(line, path, n):
    try:
        return line.decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{path}:{n}: byte {e.start} of the line (0x{line[e.start]:02x}) is not UTF-8; convert the file (iconv "
                        "-f latin1 -t utf-8)")


def read_tasks(paths, how):
    for path in paths:
        with open(path, "rb") as raw:
            try:
                stream = tokens.open_input(path.lower(), raw)
                tokens.refuse_wide(path, stream.peek(1024)[:1024])
                is_json = stream.peek(1)[:1] == b"{"
                lines = (decoded(line, path, n) for n, line in enumerate(iter(stream.readline, b""), 1))
                yield from (json_tasks if is_json else hellaswag_text)(path, lines, how)
            except UserError:
                raise
            except Exception as e:          # each library has errors of its own; one with an errno is the disk's
                if isinstance(e, OSError) and e.errno is not None or not isinstance(e, (EOFError, OSError)) \
                        and not re.match("Zstd|LZMA|error", type(e).__name__):
                    raise
                raise UserError(f"{path}: damaged file ({e}); get it again")


def checked(tasks):
    for where, query, choices, gold in tasks:
        if not isinstance(query, str):
            raise UserError(f"{where}: the query is not a text")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
            raise UserError(f"{where}: \"choices\" must be a list of at least two texts")
        if "" in choices:
            raise UserError(f"{where}: choice {choices.index('')} is empty; there is nothing to score")
        if not 0 <= gold < len(choices):
            raise UserError(f"{where}: the right choice is {gold}, but there are {len(choices)} (numbers from 0)")
        try:
            (query + "".join(choices)).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: a lone surrogate is not text; mend the line")
        yield where, query, choices, gold


# ---- Documents: a query and one of its choices ------------------------------------------------------------------
def encode_pair(encode, bos, prefix, query, rest):
    """-> ids of the query, ids of what follows it, as lm_eval's HFLM splits them. bos: ids before a text, [] or one."""
    if not query:
        ids = list(encode(rest, False))
        return ([prefix], ids) if ids[:1] != [prefix] else (ids[:1], ids[1:])
    spaces = len(query) - len(query.rstrip())
    if spaces:
        query, rest = query[:-spaces], query[-spaces:] + rest
    first = bos + list(encode(query, False))
    return first, (bos + list(encode(query + rest, False)))[len(first):]


def make_documents(args, tokenizer, tasks):
    """-> ([ids], [(first target)], [(task, choice, gold, length)], documents that lost tokens at their left)"""
    encode, bos = tokenizer.encoder(), [args.bos_id] if args.bos_id >= 0 else []
    prefix = tokenizer.bos if tokenizer.bos >= 0 else tokenizer.eos
    documents, firsts, rows, cut = [], [], [], 0
    for task, (where, query, choices, gold) in enumerate(tasks):
        if not query and prefix < 0:
            raise UserError(f"{where}: the query is empty, and {tokenizer.name} names neither BOS nor EOS to begin with")
        for k, choice in enumerate(choices):
            before, after = encode_pair(encode, bos, prefix, query, args.delimiter + choice)
            if not after or not before:
                raise UserError(f"{where}: choice {k} has no token of its own after the query; there is nothing to score")
            if len(after) > args.seq_len:
                raise UserError(f"{where}: choice {k} has {len(after)} tokens, more than --seq-len {args.seq_len}")
            ids = (before + after)[-(args.seq_len + 1):]
            cut += len(ids) < len(before) + len(after)
            documents.append(ids)
            firsts.append(len(ids) - len(after))
            rows.append((task, k, gold, len(choice)))
    return documents, firsts, rows, cut


def best_fit(lengths, room):
    """Rows of at most `room`, as lists of numbers of `lengths`, by chat.py's packing; a row lists its items in their order, and
    rows go by their first item."""
    rows = {}
    for i, row in enumerate(pack(lengths, room)[0].tolist()):
        rows.setdefault(row, []).append(i)
    return sorted(rows.values())


# ---- The output -------------------------------------------------------------------------------------------------
def prepare(args):
    np = tokens.need("numpy")
    tokenizer = tokens.load_tokenizer(args.tokenizer, args.tiktoken_pattern)
    args.bos_id = tokens.boundary(args.bos, tokenizer, tokenizer.bos, tokenizer.add_bos, "--bos")
    folder = os.path.join(args.out, "validation")
    there = [f for f in (args.out, folder) if os.path.isdir(f)]
    if any(n for f in there for n in os.listdir(f) if n != "validation"):
        raise UserError(f"{args.out} is not empty; choose another --out or remove the folder")
    tasks = checked(read_tasks(args.inputs, args.hellaswag))
    documents, firsts, rows, cut = make_documents(args, tokenizer, itertools.islice(tasks, args.limit or None))
    if not documents:
        raise UserError(f"no task in {', '.join(args.inputs[:3])}")
    packed = best_fit([len(d) for d in documents], args.seq_len + 1)
    words = np.full((len(packed), args.seq_len + 1), PADDING, np.uint32)
    order, targets = [], 0
    for row, items in zip(words, packed):
        at = 0
        for i in items:
            ids, first = np.array(documents[i], np.uint32), firsts[i]
            ids[0] |= START
            ids[first:] |= TARGET
            row[at:at + len(ids)] = ids
            at, targets = at + len(ids), targets + len(ids) - first
        order += items
    os.makedirs(folder, exist_ok=True)
    stem = os.path.join(folder, f"val_{args.name}_000")
    export, _ = tokens.tokenizer_bin(tokenizer)
    for name, data in {"tokenizer.bin": export, **tokenizer.side_files()}.items():
        tokens.write_whole(os.path.join(folder, name), data)
    used, n_tasks = sum(map(len, documents)), rows[-1][0] + 1
    meta = {"dataset": args.name, "split": "validation", "tokenizer": tokenizer.name, "vocab_size": len(tokenizer.pieces),
            "sequence_length": args.seq_len, "token_size_bytes": 4, "eos_token_id": tokenizer.eos, "stage": "choice",
            "documents_per_row": max(map(len, packed)), "total_sequences": len(packed),
            "total_tokens": len(packed) * (args.seq_len + 1), "documents": len(documents), "tasks": n_tasks,
            "targets": targets, "mask": "choice", "hellaswag": args.hellaswag, "delimiter": args.delimiter,
            "tokenizer_sha256": hashlib.sha256(export).hexdigest(), "max_length": args.seq_len + 1,
            "counts": {"tasks": n_tasks, "left truncated": cut}}
    tokens.write_whole(os.path.join(folder, "metadata.json"), json.dumps(meta, indent=1).encode())
    tokens.write_whole(stem + ".choices", np.array([rows[i] for i in order], "<i4").tobytes())
    tokens.write_whole(stem + ".ds", words.astype("<u4").tobytes())
    print(f"{args.name} | {n_tasks:,} tasks | {len(documents):,} choices | {used:,} tokens, {targets:,} of them scored | "
          f"{len(packed):,} rows of {args.seq_len} + 1, {100 * used / words.size:.2f}% full | {cut:,} too long, cut at their "
          f"left -> {stem}.ds")


def parse(argv):
    p = tokens.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("inputs", nargs="+", metavar="INPUT")
    p.add_argument("--out", required=True, metavar="DIR", help="new or empty folder")
    p.add_argument("--tokenizer", required=True, metavar="bytes|FILE", help="the model's: SentencePiece model, tiktoken "
                   "ranks or tokenizer.json")
    p.add_argument("--tiktoken-pattern", choices=list(tokens.RANKS), help="how tiktoken ranks split words (default: that of "
                   "the published file)")
    p.add_argument("--seq-len", type=int, required=True, metavar="S", help="row length; the trainer's --seq-len must be that")
    p.add_argument("--limit", type=int, default=0, metavar="N", help="only the first N tasks")
    p.add_argument("--hellaswag", choices=["lm_eval", "plain"], default="lm_eval", help="how a context of HellaSwag begins "
                   "its second part (above)")
    p.add_argument("--delimiter", default=" ", metavar="TEXT", help="between query and choice (default: a space)")
    p.add_argument("--bos", default="auto", metavar="on|off|PIECE", help="before each query (default: as the tokenizer "
                   "itself does)")
    p.add_argument("--name", metavar="NAME", help="of the tasks, in file names and log (default: the first INPUT's)")
    args = p.parse_args(argv)
    stem = re.sub(r"(?i)(\.(txt|json|jsonl|ndjson))?(\.gz|\.zst|\.xz|\.bz2)?$", "", os.path.basename(args.inputs[0]))
    args.name = args.name or ("hellaswag" if stem.startswith("hellaswag") else stem)
    if not re.fullmatch(r"[A-Za-z0-9.+-]+(_[A-Za-z0-9.+-]+)*", args.name) or re.search(r"_\d+$", args.name):
        raise UserError(f"--name {args.name}: letters, digits, - and _ please, and no _NUMBER at its end, which numbers "
                        "shards")
    if not 1 <= args.seq_len < 1 << 24 or args.limit < 0:
        raise UserError("out of range: --seq-len 1 to 2^24, --limit at least 0")
    return args


def main(argv):
    try:
        prepare(parse(argv))
        return 0
    except UserError as e:
        message = e
    except OSError as e:
        message = f"{e.filename}: {e.strerror}"
    except KeyboardInterrupt:
        message = "interrupted; the same command starts again"
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
