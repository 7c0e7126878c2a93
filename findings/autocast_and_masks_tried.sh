#!/usr/bin/env bash
# torch 2.13.0: masks that are tried on a network within one `torch.autocast` context all get the first one's loss.
# Expected: the outputs of the weights as they are at each call; the documentation lets a context hold several forward
#   passes and says of `cache_enabled` only that it is about a weight cache.
# Seen: the first call keeps the weights' bfloat16 copies for as long as the context lasts and later calls take those,
#   whatever has been written into the weights since. Five masks, from none to 99 % removed, have one and the same
#   loss, with `no_grad` too; under `inference_mode` each has its own, and so with a context for each of them.
# Hit: scans of sparsities or layers under mixed precision, masks that are compared by their loss, several checkpoints
#   or averages that are evaluated in one network. All looks well, if the first call has the dense weights.
# Output seen:
#   torch 2.13.0; loss with 0, 50, 80, 95, 99 % of the weights removed
#   float32                     0.0000  0.0063  0.0248  0.0405  0.0488
#   autocast                    0.0000  0.0000  0.0000  0.0000  0.0000
#   autocast, no_grad           0.0000  0.0000  0.0000  0.0000  0.0000
#   autocast, inference_mode    0.0000  0.0063  0.0248  0.0405  0.0488
#   autocast, no cache          0.0000  0.0063  0.0248  0.0405  0.0488
#   autocast for each mask      0.0000  0.0063  0.0248  0.0405  0.0488
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5
cd "$work"
venv/bin/python - <<'EOF'
import contextlib

import torch
from torch import nn

removed = (0, 0.5, 0.8, 0.95, 0.99)
torch.manual_seed(0)
inputs = torch.randn(256, 50)
net = nn.Sequential(nn.Linear(50, 200), nn.ReLU(), nn.Linear(200, 50))
targets = net(inputs).detach()
dense = net[0].weight.detach().clone()


def loss_of(net):
    return nn.functional.mse_loss(net(inputs).float(), targets)


def scan(*contexts, each=contextlib.nullcontext):
    losses = []
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        for share in removed:
            threshold = dense.abs().quantile(share)
            net[0].weight.data.copy_(dense * (dense.abs() >= threshold))
            with each():
                losses.append(loss_of(net).item())
        net[0].weight.data.copy_(dense)
    return losses


def half(**options):
    return torch.autocast("cpu", dtype=torch.bfloat16, **options)


cases = {
    "float32": scan(),
    "autocast": scan(half()),
    "autocast, no_grad": scan(half(), torch.no_grad()),
    "autocast, inference_mode": scan(torch.inference_mode(), half()),
    "autocast, no cache": scan(half(cache_enabled=False)),
    "autocast for each mask": scan(each=half),
}
shares = ", ".join(f"{100 * share:.0f}" for share in removed)
print(f"torch {torch.__version__.split('+')[0]}; loss with {shares} % of the weights removed")
for name, losses in cases.items():
    print(f"{name:26}" + "".join(f"{loss:8.4f}" for loss in losses))
    if name in ("autocast", "autocast, no_grad"):
        assert len(set(losses)) == 1, "behaviour has changed"
    else:
        assert sorted(set(losses)) == losses, f"{name} has changed"
EOF
