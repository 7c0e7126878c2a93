#!/usr/bin/env bash
# torchinfo 1.8.0, thop 0.1.1.post2209072238, ptflops 0.7.5 (torch 2.13.0): parameters and multiply-adds of one
# and the same network with 90 % of its weights masked, kept in three ways.
# Expected: a counter counts either all weights or the ones that are left, whichever way the mask is kept.
# Seen: torchinfo leaves masked weights out while torch.nn.utils.prune is on the layers, counts them once it has
#   been made permanent, and finds no multiply-adds at all where the mask is a parametrization; thop then finds no
#   parameters and no multiply-adds either, ptflops none for the masked layers. So "10 times fewer" and
#   "infinitely fewer" are one network. thop also leaves total_ops and total_params in its state_dict.
# Hit: tables of sparse networks made with these counters.
# Output seen:
#   torch 2.13.0; (parameters, multiply-adds); the network has 3096 weights, 310 not 0
#   permanent: torchinfo (3096, 10656), thop (3096, 10656), ptflops (3096, 11232)
#   prune: torchinfo (310, 1080), thop (3096, 10656), ptflops (3096, 11232)
#   parametrized: torchinfo (3096, 0), thop (0, 0), ptflops (3096, 576)
#   left in the state_dict of the last by thop: 18 names, as 0.total_ops
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5 torchinfo==1.8.0 thop==0.1.1.post2209072238 ptflops==0.7.5
cd "$work"
venv/bin/python - <<'EOF'
import ptflops
import thop
import torch
import torchinfo
from torch import nn
from torch.nn.utils import parametrize, prune


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def network(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10, bias=False))
    for layer in (net[0], net[3]):
        prune.l1_unstructured(layer, "weight", amount=0.9)
        mask = layer.weight_mask
        if kind != "prune":
            prune.remove(layer, "weight")
        if kind == "parametrized":
            parametrize.register_parametrization(layer, "weight", Mask(mask))
    return net


def counts(kind):
    x = torch.randn(1, 3, 8, 8)
    info = torchinfo.summary(network(kind), input_data=x, verbose=0)
    net = network(kind)
    macs, params = (int(number) for number in thop.profile(net, (x,), verbose=False))
    left = [name for name in net.state_dict() if "total_" in name]
    flops = ptflops.get_model_complexity_info(network(kind), (3, 8, 8), as_strings=False, print_per_layer_stat=False)
    return {"torchinfo": (info.total_params, info.total_mult_adds), "thop": (params, macs),
            "ptflops": (flops[1], flops[0])}, left


print(f"torch {torch.__version__.split('+')[0]}; (parameters, multiply-adds); the network has 3096 weights, 310 not 0")
seen = {}
for kind in ("permanent", "prune", "parametrized"):
    seen[kind], left = counts(kind)
    print(f"{kind}: " + ", ".join(f"{name} {numbers}" for name, numbers in seen[kind].items()))
print(f"left in the state_dict of the last by thop: {len(left)} names, as {left[0]}")
assert seen["permanent"]["torchinfo"][0] == 3096 and seen["prune"]["torchinfo"][0] == 310, "behaviour has changed"
assert seen["parametrized"]["torchinfo"][1] == 0 and seen["parametrized"]["thop"] == (0, 0), "behaviour has changed"
assert seen["prune"]["thop"] == seen["permanent"]["thop"] and left, "behaviour has changed"
EOF
