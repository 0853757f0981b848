#!/usr/bin/env bash
# Python 3.11.7 and 3.13.0, lzma.open, and with it pandas 3.1.1 and datasets 5.2.0: an .xz file ends, for them, at its first
# stream padding. What follows is lost without a word.
# The .xz format lets a file be several streams one after the other, with zeros between them, in fours: files are joined so by
# writers that begin each part at a multiple of some block. lzma.open reads several streams, but takes whatever is no stream,
# these zeros too, for the end of the file; so do all loaders that are built on it. The same holds for a stream whose first
# bytes are damaged, in .bz2, too, where gzip raises an error. Reported as python/cpython issue 88300 (of 3.10), open in
# September 2026. data/tokens.py reads on, and refuses what is neither padding nor a stream.
# Seen: two streams of 3 lines each, 8 zeros between them: lzma, pandas and datasets 3 rows, python-xz 0.6.0 6 lines; without
# the zeros 6 everywhere.
# Exit status 0: the behaviour is as stated; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pandas==3.1.1 python-xz==0.6.0
HF_HUB_OFFLINE=1 HF_HOME=$folder/hf "$folder/venv/bin/python" - "$folder" <<'PY'
import json, lzma, sys
import pandas, xz
from datasets import disable_progress_bars, load_dataset
disable_progress_bars()
lines = [json.dumps({"text": f"document {i}"}) + "\n" for i in range(6)]
parts = [lzma.compress("".join(some).encode()) for some in (lines[:3], lines[3:])]
print("Python", sys.version.split()[0])
seen = {}
for name, between in ("nothing", b""), ("zeros", bytes(8)):
    path = f"{sys.argv[1]}/{name}.jsonl.xz"
    with open(path, "wb") as f:
        f.write(between.join(parts))
    with lzma.open(path) as f, xz.open(path) as g:
        rows = [load_dataset("json", data_files=path, split="train", streaming=s) for s in (False, True)]
        seen[name] = [len(f.read().splitlines()), len(pandas.read_json(path, lines=True)), *(len(list(r)) for r in rows),
                      len(g.read().splitlines())]
    print("between the streams %-7s | lzma %d, pandas %d, datasets %d, streaming %d | python-xz %d" % (name, *seen[name]))
expected = seen == {"nothing": [6] * 5, "zeros": [3, 3, 3, 3, 6]}
print("as stated" if expected else "changed")
sys.exit(not expected)
PY
