#!/usr/bin/env bash
# PyTorch 2.15.0, CPU: SGD, AdamW and Adagrad with fused=True pair a weight and its gradient by their place in memory, not by
# their index. A gradient that lies transposed moves the wrong weights, without a word.
# backward() lays .grad out as the weight. torch.autograd.grad and torch.func.grad do not: through einsum, or a weight that is
# transposed and copied, the gradient of a row-major weight is column-major. A loop that sets .grad from them (to clip, mix or
# accumulate by itself) trains as it should with foreach or plain optimizers and diverges with fused=True. On CUDA such a
# gradient was refused, in 2.0 and 2.1 at least (pytorch/pytorch issues 106951 and 110758).
# Seen: 200 updates of least squares from a loss of 2.68, by backward() and by autograd.grad; SGD 1.0e-05 and 1.0e-05, fused
# 1.0e-05 and 4.1e+10; AdamW 2.1e-09 and 2.1e-09, fused 2.1e-09 and 2.5e+02; Adagrad fused 4.0e-09 and 1.3e+02.
# Exit status 0: the behaviour is as stated; 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import sys
import torch

def last_loss(optimizer, options, fused, by_backward):
    torch.manual_seed(0)
    x, right = torch.randn(16, 4), torch.randn(3, 4)
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    update = optimizer([weight], fused=fused, **options)
    for _ in range(200):
        loss = ((torch.einsum("bi,oi->bo", x, weight) - x @ right.T) ** 2).mean()
        if by_backward:
            update.zero_grad()
            loss.backward()
        else:
            weight.grad, = torch.autograd.grad(loss, [weight])
        update.step()
    return loss.item(), weight.grad.stride()

expected = True
for optimizer, options in ((torch.optim.SGD, {"lr": 0.1}), (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0}),
                           (torch.optim.Adagrad, {"lr": 0.3})):
    for fused in False, True:
        (backward, rows), (grad, columns) = (last_loss(optimizer, options, fused, by) for by in (True, False))
        print(f"{optimizer.__name__:7s} fused={fused!s:5s} | loss by backward() {backward:.1e}, gradient's strides {rows} | "
              f"by autograd.grad {grad:.1e}, {columns}")
        expected = expected and rows == (4, 1) and columns == (1, 3) and backward < 1e-4
        expected = expected and (grad > 10 if fused else grad < 1e-4)
print("as stated" if expected else "changed")
sys.exit(not expected)
PY
