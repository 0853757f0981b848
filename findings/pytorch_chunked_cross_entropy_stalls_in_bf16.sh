#!/usr/bin/env bash
# PyTorch 2.15.0: the loss of linear_cross_entropy on chunks, in bf16, is too small by up to a quarter and more; its gradients
# are right. The function is new; LinearCrossEntropyOptions() makes it take the rows in chunks, to save memory with large
# vocabularies. The losses of the chunks are added up in bf16, with 8 bits, whatever acc_policy and acc_dtype say ("accurate",
# float32; in fp16 they are obeyed: torch/nn/modules/linear_cross_entropy.py, output_dtype). By default there are about as many
# chunks as the classes are more than the features. Where the share of a chunk is below half of the last bit of the sum, the
# sum stands still. So a run trains as it should and logs a loss, and a perplexity, that its model does not have.
# Seen on a CPU, 4096 rows, 32,000 classes. 64 features, right 10.8749: without options 10.9375 (one step of bf16 above), with
# Options() 8.0, with "accurate" and float32 8.0, gradients 9e-3 off; one loss for each row (reduction "none") and their mean in
# fp32 10.8754; fp32 input 10.8749. 512 features, right 10.8659: with Options() 10.6250.
# Exit status 0: the behaviour is as stated; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys
import torch
from torch.nn import LinearCrossEntropyOptions as Options
from torch.nn.functional import cross_entropy, linear_cross_entropy

torch.set_num_threads(2)
loss, errors = {}, {}
for features in 64, 512:
    torch.manual_seed(0)
    x, weight = torch.randn(4096, features).bfloat16(), (torch.randn(32000, features) * features ** -0.5).bfloat16()
    target = torch.randint(32000, (4096,))
    wide = [t.float().requires_grad_() for t in (x, weight)]
    right = cross_entropy(wide[0] @ wide[1].T, target)
    right.backward()
    print(f"{features} features | right {right.item():.4f}")
    cases = {"no options": None, "Options()": Options()}
    if features == 64:
        cases["accurate, float32"] = Options(acc_policy="accurate", acc_dtype=torch.float32)
    for name, options in cases.items():
        narrow = [t.clone().requires_grad_() for t in (x, weight)]
        got = linear_cross_entropy(*narrow, target, options=options)
        got.backward()
        loss[features, name] = got.item() / right.item()
        errors[features, name] = max(((a.grad.float() - b.grad).norm() / b.grad.norm()).item() for a, b in zip(narrow, wide))
        print(f"bf16, {name:17s} | loss {got.item():.4f}, {loss[features, name] - 1:+.1%} | "
              f"gradients {errors[features, name]:.1e} off")
    if features == 64:
        with torch.no_grad():
            each = linear_cross_entropy(x, weight, target, reduction="none", options=Options()).float().mean().item()
            fp32 = linear_cross_entropy(x.float(), weight.float(), target, options=Options()).item()
        print(f"bf16, one loss for each row, their mean in fp32: {each:.4f} | fp32 with Options(): {fp32:.4f}")
expected = (abs(loss[64, "no options"] - 1) < 0.01 and loss[64, "Options()"] < 0.8 and loss[64, "accurate, float32"] < 0.8
            and loss[512, "Options()"] < 0.99 and max(errors.values()) < 0.05 and abs(each / right.item() - 1) < 0.01
            and abs(fp32 / each - 1) < 0.01)
print("as stated" if expected else "changed")
sys.exit(not expected)
PY
