#!/usr/bin/env bash
# transformers 5.24.0: use_cache, a matter of speed, decides whether packed documents see each other.
# A row holds two documents, and position_ids that begin again at 0 in the second one. The models then build a mask that keeps
# them apart, but only without a cache and without an attention_mask. LlamaModel makes a cache wherever use_cache is true, as
# it is in every config by default (Trainer sets it false for its own run), and a mask of ones, which masks nothing, counts as
# a mask, too. So the same row has another loss in a loop of one's own than in Trainer: there its documents are one text. And
# activation checkpointing, which should change no number, turns the cache off (it says so), and the documents part. The
# other way round, position_ids with a gap, by which methods for long contexts train far positions on short rows, are one text
# with a cache and two texts without.
# Seen: the loss of a random model over documents of 5 and 7 tokens is 8.1364 with each alone; packed, 8.1364 with
# use_cache=False, 8.5502 by default, 8.5502 with use_cache=False and a mask of ones, 8.1364 by default with activation
# checkpointing. One text of 12 tokens with positions 0 to 4 and 100 to 106: 8.3942 by default, 8.2318 with use_cache=False. The
# same with sdpa and eager attention. It comes from transformers/masking_utils.py; of the mask of ones tells pull request 46634
# of transformers (June 2026, closed).
# Exit status 0: the behaviour is as stated; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.15.0 transformers==5.24.0
"$folder/venv/bin/python" - <<'PY'
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
tokens = torch.randint(64, (1, 12))
first, second = tokens[:, :5], tokens[:, 5:]
again, gap = torch.tensor([[*range(5), *range(7)]]), torch.tensor([[*range(5), *range(100, 107)]])
labels = tokens.clone()
labels[0, 5] = -100         # no document predicts the first token of the next one
expected = True
for attention in "sdpa", "eager":
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=2, initializer_range=0.5, attn_implementation=attention)).eval()
    def loss(ids, targets, **more):
        return model(ids, labels=targets, **more).loss.item()
    alone = (4 * loss(first, first) + 6 * loss(second, second)) / 10
    off, default = loss(tokens, labels, position_ids=again, use_cache=False), loss(tokens, labels, position_ids=again)
    ones = loss(tokens, labels, position_ids=again, use_cache=False, attention_mask=torch.ones_like(tokens))
    model.train().activation_checkpointing_enable()
    checkpointed = loss(tokens, labels, position_ids=again)
    model.eval().activation_checkpointing_disable()
    print(f"{attention} | each document alone {alone:.4f} | packed: use_cache=False {off:.4f}, by default {default:.4f}, "
          f"use_cache=False and a mask of ones {ones:.4f}, by default with activation checkpointing {checkpointed:.4f}")
    gap_default, gap_off = loss(tokens, tokens, position_ids=gap), loss(tokens, tokens, position_ids=gap, use_cache=False)
    print(f"{attention} | one text, a gap in its positions: by default {gap_default:.4f}, use_cache=False {gap_off:.4f}")
    expected = expected and (abs(off - alone) < 1e-3 and abs(default - ones) < 1e-3 and abs(default - alone) > 0.1 and
                             abs(checkpointed - alone) < 1e-3 and abs(gap_default - gap_off) > 0.1)
print("as stated" if expected else "changed")
sys.exit(not expected)
PY
