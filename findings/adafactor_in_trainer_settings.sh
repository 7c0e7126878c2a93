#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0): Adafactor as Trainer sets it up (optim="adafactor", so scale_parameter and
# relative_step are off) takes longer steps the sparser a weight matrix is.
# Expected: the learning rate says how far a weight moves, as with Adam, whatever part of its matrix is pruned.
# Seen: 3 times as far with 90 % of the weights removed, 10 times with 99 %: like 1 / sqrt(density). The second
#   moments are kept as means of rows and columns, over removed weights too, and the clipping that should catch
#   long updates takes its mean over them as well. torch.optim.Adafactor hides it: it scales by the weights' own
#   root mean square, which falls as much.
# Hit: whoever fine-tunes a pruned transformer with Adafactor and a learning rate from the dense one.
# Output seen:
#   transformers 5.24.0, torch 2.13.0
#   length of a kept weight's first step, in learning rates, with 100, 10 and 1 % of the weights kept
#   AdamW                       1.00    1.00    1.00
#   torch.optim.Adafactor       1.00    1.00    0.99
#   transformers Adafactor      1.00    3.15    9.84
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5 transformers==5.24.0
cd "$work"
venv/bin/python - <<'EOF'
import torch
import transformers
from transformers.optimization import Adafactor


def first_step(make, density):
    torch.manual_seed(0)
    mask = (torch.rand(400, 400) < density).float()
    weight = torch.nn.Parameter(torch.randn(400, 400) * mask)
    optimizer = make([weight])
    before = weight.detach().clone()
    weight.grad = torch.randn(400, 400) * mask
    optimizer.step()
    return ((weight.detach() - before)[mask > 0].square().mean().sqrt() / 0.001).item()


makers = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.001, weight_decay=0),
    "torch.optim.Adafactor": lambda params: torch.optim.Adafactor(params, lr=0.001),
    "transformers Adafactor": lambda params: Adafactor(
        params, lr=0.001, scale_parameter=False, relative_step=False
    ),
}
print(f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}")
print("length of a kept weight's first step, in learning rates, with 100, 10 and 1 % of the weights kept")
for name, make in makers.items():
    steps = [first_step(make, density) for density in (1, 0.1, 0.01)]
    print(f"{name:24}" + "".join(f"{step:8.2f}" for step in steps))
    if name.startswith("transformers"):
        assert 2.7 < steps[1] / steps[0] < 3.6 and 8 < steps[2] / steps[0] < 12, "behaviour has changed"
    else:
        assert max(steps) < 1.3 * min(steps), f"{name} has changed"
EOF
