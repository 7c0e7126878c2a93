#!/usr/bin/env bash
# timm 1.0.31 (torch 2.7.0): the cautious optimizers (cadamw, clamb, csgdw, clion, ...) take steps that are
# 1 / density times as long in a sparse network.
# Expected: weights whose gradient is always 0 (removed by a mask) have no say in how far the others go, as with
#   adamw, sgdw, lion: Adam's first step is the learning rate long.
# Seen: 10 times as long with 90 % of the weights removed, 100 times with 99 %. The update is divided by the
#   mean over the tensor of "update and gradient agree", and a removed weight counts there as one that disagrees.
# Hit: whoever trains a pruned network, or a layer with many idle rows (embeddings, dead ReLUs), with one of
#   them: at 99 % a learning rate of 0.001 works as 0.1.
# Output seen:
#   timm 1.0.31, torch 2.7.0
#   length of a kept weight's first step, in learning rates, with 0, 90 and 99 % of the weights removed
#   adamw       1.00     1.00     1.00
#   cadamw      1.00    10.00   100.00
#   lion        1.00     1.00     1.00
#   clion       1.00    10.00   100.00
#   sgdw        1.91     1.91     2.14
#   csgdw       1.91    19.14   214.13
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.7.0 torchvision==0.22.0 numpy==2.3.5 timm==1.0.31
cd "$work"
venv/bin/python - <<'EOF'
import timm
import torch
from timm.optim import create_optimizer_v2


def first_step(name, removed):
    torch.manual_seed(0)
    mask = (torch.arange(10_000) >= removed * 10_000).float()
    weight = torch.nn.Parameter(torch.randn(10_000) * mask)
    optimizer = create_optimizer_v2([weight], opt=name, lr=0.001, weight_decay=0.0)
    before = weight.detach().clone()
    weight.grad = torch.randn(10_000) * mask
    optimizer.step()
    return ((weight.detach() - before)[mask > 0].square().mean().sqrt() / 0.001).item()


print(f"timm {timm.__version__}, torch {torch.__version__.split('+')[0]}")
print("length of a kept weight's first step, in learning rates, with 0, 90 and 99 % of the weights removed")
for name in ("adamw", "cadamw", "lion", "clion", "sgdw", "csgdw"):
    steps = [first_step(name, removed) for removed in (0, 0.9, 0.99)]
    print(f"{name:7}" + "".join(f"{step:9.2f}" for step in steps))
    grown = steps[1] / steps[0], steps[2] / steps[0]
    if name.startswith("c"):
        assert 8 < grown[0] < 12 and 80 < grown[1] < 125, "behaviour has changed"
    else:
        assert max(grown) < 1.5, f"{name} has changed"
EOF
