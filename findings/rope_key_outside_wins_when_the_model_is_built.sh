#!/usr/bin/env bash
# transformers 5.24.0: a key beside rope_parameters changes the RoPE frequencies, but not what AutoConfig shows.
# llama3 scaling has its original_max_position_embeddings inside rope_parameters. If config.json has a key of that name at its
# top level too, with another value, AutoConfig.from_pretrained still shows the inner value; building the model writes the
# outer one over it and computes the frequencies from that. So config.rope_parameters, read before the model is built, is not
# what the model uses, and a converter that goes by it makes another model.
# Seen: inside 64, outside 512: AutoConfig shows 64; after from_config the same object shows 512, and frequency 12 of 32 is
# 0.0184967 in place of 0.00395285.
# Exit status 0: the behaviour is as stated; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.15.0 transformers==5.24.0
"$folder/venv/bin/python" - "$folder" <<'PY'
import json, os, sys
from transformers import AutoConfig, AutoModelForCausalLM
seen = {}
for outer in None, 512:
    out = os.path.join(sys.argv[1], "outer_%s" % outer)
    os.makedirs(out, exist_ok=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 32,
        "max_position_embeddings": 4096, "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}
    if outer:
        config["original_max_position_embeddings"] = outer
    json.dump(config, open(os.path.join(out, "config.json"), "w"))
    c = AutoConfig.from_pretrained(out)
    shown = c.rope_parameters["original_max_position_embeddings"]
    m = AutoModelForCausalLM.from_config(c)
    seen[outer] = shown, m.config.rope_parameters["original_max_position_embeddings"], m.model.rotary_emb.inv_freq[12].item()
    print("outside", outer, "| inside by AutoConfig %d, after the model was built %d | frequency 12: %.6g" % seen[outer])
expected = seen[None][:2] == (64, 64) and seen[512][:2] == (64, 512) and seen[512][2] > 4 * seen[None][2]
print("as stated" if expected else "changed")
sys.exit(not expected)
PY
