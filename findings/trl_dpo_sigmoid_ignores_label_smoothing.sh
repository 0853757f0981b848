#!/usr/bin/env bash
# TRL 1.16.0: DPOConfig(label_smoothing=...) changes nothing with loss_type "sigmoid", its default.
# label_smoothing used to make the default loss conservative DPO, -(1-e) log sigmoid(z) - e log sigmoid(-z). Now only some
# loss types ("robust" among them) read it; "sigmoid" takes any value without a word and trains as with 0.
# Seen: of one batch, policy and reference being two random models, "sigmoid" has the same loss with 0, 0.1 and 0.4;
# "robust" has 0.8125, 0.8242 and 0.9994.
# Exit status 0: the behaviour is as stated; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.15.0 transformers==5.24.0 trl==1.16.0 datasets==5.2.0 accelerate==1.15.0 tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys, torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
disable_progress_bars()
words = Tokenizer(models.WordLevel({**{"w%d" % i: i for i in range(3, 40)}, "<p>": 0, "<s>": 1, "</s>": 2}, unk_token="<p>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<p>", eos_token="</s>")
rows = Dataset.from_list([{"prompt": "w3 w4 ", "chosen": "w%d w6" % i, "rejected": "w7 w%d w9" % (i + 9)} for i in range(5, 13)])
def model(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                        num_attention_heads=2, initializer_range=0.5))
losses = {}
for kind in "sigmoid", "robust":
    for smoothing in 0.0, 0.1, 0.4:
        args = DPOConfig(output_dir=sys.argv[1] + "/out", loss_type=[kind], label_smoothing=smoothing, per_device_train_batch_size=8,
                         max_steps=1, logging_steps=1, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no",
                         gradient_checkpointing=False, learning_rate=0.0)
        trainer = DPOTrainer(model(1), ref_model=model(2), args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        losses[kind, smoothing] = next(l["loss"] for l in trainer.state.log_history if "loss" in l)
        print(kind, "| label_smoothing", smoothing, "| loss", losses[kind, smoothing], flush=True)
expected = (losses["sigmoid", 0.0] == losses["sigmoid", 0.1] == losses["sigmoid", 0.4]
            and losses["robust", 0.0] != losses["robust", 0.1] != losses["robust", 0.4])
print("as stated" if expected else "changed")
sys.exit(not expected)
PY
