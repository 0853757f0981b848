#!/usr/bin/env bash
# tiktoken 0.14.0 and transformers 5.24.0: the words of cl100k_base are not the words that transformers gives a tiktoken file.
# tiktoken splits a text by a pattern before it joins bytes. The pattern that TikTokenConverter of transformers takes by default
# (also Llama 3's, and said in many places to be cl100k_base's) ends in
#     \s*[\r\n]+|\s+(?!\S)|\s+
# and that of cl100k_base in tiktoken itself, since it was tuned, in
#     \s++$|\s*[\r\n]|\s+(?!\S)|\s
# White space at the end of a text that begins with a line break is one word in the second and two in the first; inside a text
# both give the same words. With a vocabulary that joins across the border the tokens of such a text differ.
# Seen: "a\n  ", where the vocabulary has "\n  " and "  ": tokens 97 257 by tiktoken's pattern, 97 10 258 by the converter's.
# Exit status 0: the behaviour is as stated; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 tiktoken==0.14.0
"$folder/venv/bin/python" - <<'PY'
import inspect, sys, tiktoken, tiktoken.load, tiktoken_ext.openai_public as public
from transformers.convert_slow_tokenizer import TikTokenConverter
# the file of ranks is not fetched: only the pattern is wanted
public.load_tiktoken_bpe = lambda *a, **k: {}
own = public.cl100k_base()["pat_str"]
converter = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
print("tiktoken ", own)
print("converter", converter)
ranks = {bytes([i]): i for i in range(256)}
for piece in b"\n ", b"\n  ", b"  ", b"\n\n":
    ranks[piece] = len(ranks)
seen = []
for pattern in own, converter:
    e = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    seen.append([e.encode_ordinary(t) for t in ("a\n  ", "a\n  b", "a \n \n b")])
    print(*seen[-1])
expected = seen[0][0] == [97, 257] and seen[1][0] == [97, 10, 258] and seen[0][1:] == seen[1][1:]
print("as stated" if expected else "changed")
sys.exit(not expected)
PY
