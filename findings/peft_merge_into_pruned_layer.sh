#!/usr/bin/env bash
# peft 0.21.2 (torch 2.13.0): merging loses adapters on layers under `torch.nn.utils.prune` or a parametrization.
# Expected: the merged network gives the adapted network's outputs, as on a plain layer, or merging refuses.
# Seen: adapters train on such a layer and count in its outputs. `merge_and_unload()` adds them to `weight`, which is
#   computed there from the stored weight and the mask at each call, and takes the adapters off: what is left is the
#   base network, bit by bit, with `safe_merge=True` as well. With `merge_adapter()` the adapters seem to do nothing
#   for as long as they are merged, and `unmerge_adapter()` brings them back. No error and no warning. A mask that has
#   been made permanent, or that stands in the weights as zeros, is fine.
# Hit: LoRA on a network that is pruned by masks, or has weight or spectral norm, when the adapters are merged for
#   evaluation or to be saved: the fine-tuning is gone.
# Output seen:
#   peft 0.21.2, torch 2.13.0; how far from the base network's outputs:
#                           adapted   merged    unmerged  merged and unloaded (safe_merge)
#   zeros in the weights    0.822     0.822     0.822     0.822 (0.822)
#   prune                   0.822     0.000     0.822     0.000 (0.000)
#   prune, then remove      0.822     0.822     0.822     0.822 (0.822)
#   a parametrization       0.822     0.000     0.822     0.000 (0.000)
#   weight_norm             0.815     0.000     0.815     0.000 (0.000)
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5 transformers==5.24.0 peft==0.21.2
cd "$work"
venv/bin/python - <<'EOF'
import warnings

import peft
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

torch.manual_seed(0)
inputs, targets = torch.randn(64, 32), torch.randn(64, 4)
mask = (torch.rand(32, 32) < 0.2).float()


class Masked(nn.Module):
    def forward(self, weight):
        return weight * mask


def by_zeros(layer):
    layer.weight.data.mul_(mask)


def by_prune(layer):
    prune.custom_from_mask(layer, "weight", mask)


def by_prune_removed(layer):
    by_prune(layer)
    prune.remove(layer, "weight")


def by_parametrization(layer):
    parametrize.register_parametrization(layer, "weight", Masked())


layers = {
    "zeros in the weights": by_zeros,
    "prune": by_prune,
    "prune, then remove": by_prune_removed,
    "a parametrization": by_parametrization,
    "weight_norm": parametrizations.weight_norm,
}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.down(self.up(x).relu())


def gap(a, b):
    return ((a - b).norm() / targets.norm()).item()


def case(change, safe):
    torch.manual_seed(1)
    net = Network()
    change(net.up)
    base = net(inputs).detach()
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["up"], r=4))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    adapted = model(inputs).detach()
    model.merge_adapter()
    while_merged = model(inputs).detach()
    model.unmerge_adapter()
    again = model(inputs).detach()
    merged = model.merge_and_unload(safe_merge=safe)(inputs).detach()
    return [gap(adapted, base), gap(while_merged, base), gap(again, base), gap(merged, base)]


print(f"peft {peft.__version__}, torch {torch.__version__.split('+')[0]}; how far from the base network's outputs:")
print("                        adapted   merged    unmerged  merged and unloaded (safe_merge)")
for name, change in layers.items():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved, merged, unmerged, unloaded = case(change, safe=False)
        safe = case(change, safe=True)[-1]
    print(f"{name:24}{moved:.3f}     {merged:.3f}     {unmerged:.3f}     {unloaded:.3f} ({safe:.3f})")
    assert moved > 0.1 and abs(unmerged - moved) < 1e-4, "training has changed"
    if name in ("zeros in the weights", "prune, then remove"):
        assert all(abs(x - moved) < 1e-4 for x in (merged, unloaded, safe)), f"{name} has changed"
    else:
        assert merged == unloaded == safe == 0, "behaviour has changed"
EOF
