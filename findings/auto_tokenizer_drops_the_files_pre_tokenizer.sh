#!/usr/bin/env bash
# transformers 5.24.0 with tokenizers 0.23.3: AutoTokenizer reads one folder as two tokenizers.
# A folder holds a tokenizer.json and a tokenizer_config.json that says "tokenizer_class": "PreTrainedTokenizerFast", which is
# how one asks for tokenizer.json just as it stands. If a config.json with "model_type": "qwen2" stands beside them, as in
# every checkpoint folder, AutoTokenizer goes by the model's family instead: the class is Qwen2Tokenizer, whose own
# pre-tokenizer and normalizer take the place of the file's. With "model_type": "llama" the file is obeyed. The same text then
# becomes other tokens than those the model was trained on, without a word.
# Seen: a file whose words are GPT-2's (a run of digits is one word) and that joins 1 2 3 4 to one token: "1234" is the token
# 1234 with "model_type": "llama", as by the tokenizers library alone, and the tokens 1 2 3 4 with "qwen2".
# Exit status 0: the behaviour is as stated; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder" <<'PY'
import json, os, sys
from transformers import AutoTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, decoders
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
vocab = {c: i for i, c in enumerate(letters)}
merges = [("1", "2"), ("12", "3"), ("123", "4")]
for a, b in merges:
    vocab[a + b] = len(vocab)
t = Tokenizer(models.BPE(vocab=vocab, merges=merges))
t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)     # GPT-2's words: a run of digits is one
t.decoder = decoders.ByteLevel()
seen = {}
for family in "llama", "qwen2":
    out = os.path.join(sys.argv[1], family)
    os.makedirs(out)
    t.save(os.path.join(out, "tokenizer.json"))
    json.dump({"tokenizer_class": "PreTrainedTokenizerFast"}, open(os.path.join(out, "tokenizer_config.json"), "w"))
    json.dump({"model_type": family}, open(os.path.join(out, "config.json"), "w"))
    loaded = AutoTokenizer.from_pretrained(out)
    seen[family] = type(loaded).__name__, loaded.tokenize("1234")
    print(family, *seen[family])
print("tokenizers alone", t.encode("1234").tokens)
expected = (t.encode("1234").tokens == ["1234"] and seen["llama"] == ("TokenizersBackend", ["1234"]) and
            seen["qwen2"] == ("Qwen2Tokenizer", ["1", "2", "3", "4"]))
print("as stated" if expected else "changed")
sys.exit(not expected)
PY
