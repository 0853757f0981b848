#!/bin/sh
# From the project's folder: cmd.sh TEXT TOKENIZER, a text of some 2 MB and a SentencePiece model of 32,000 pieces.
# PYTHON: one with torch, transformers, matplotlib, numpy, sentencepiece (build/venv/bin/python after `make test-hf`)
set -e
here=$(dirname "$0")
PYTHON=${PYTHON:-build/venv/bin/python}
make build/train_litespark
[ -f build/books/train_000.bin ] || $PYTHON data/tokens.py "$1" --tokenizer "$2" --out build/books
$PYTHON "$here/curves.py" build/train_litespark build/books/train_000.bin "${UPDATES:-400}" "$here"
