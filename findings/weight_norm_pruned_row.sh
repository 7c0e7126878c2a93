#!/usr/bin/env bash
# torch 2.13.0: pruning a whole filter of a layer under torch.nn.utils.parametrizations.weight_norm turns the
# network's outputs into NaN; pruning its weight attribute raises.
# Expected: a filter whose direction is all 0 is a filter of zeros, as it is without weight norm.
# Seen: it is 0 / 0 = NaN, in the forward pass already, at the moment when the last weight of the row goes;
#   spectral_norm does the same for a layer that is all 0. With prune on "weight" itself: TypeError about
#   'weight_orig', since pruning wants a parameter and finds a computed tensor.
# Hit: structured pruning, or unstructured at 98 %, of audio models, GANs and others that use these norms.
# Output seen:
#   torch 2.13.0
#   NaN among 3 outputs, one filter pruned: 0 plain, 1 with weight_norm
#   NaN among 3 outputs, all weights 0: 3 with spectral_norm
#   prune of the attribute: TypeError: cannot assign 'torch.FloatTensor' object to parameter 'weight_orig' (torc ...
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5
cd "$work"
venv/bin/python - <<'EOF'
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


def layer():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def nans(module):
    return int(module(torch.ones(1, 4)).isnan().sum())


plain = layer()
prune.ln_structured(plain, "weight", amount=1, n=2, dim=0)
normed = weight_norm(layer())
prune.ln_structured(normed.parametrizations.weight, "original1", amount=1, n=2, dim=0)
empty = layer()
nn.init.zeros_(empty.weight)
spectral = spectral_norm(empty)
try:
    prune.l1_unstructured(weight_norm(layer()), "weight", amount=0.5)
    said = "works"
except TypeError as error:
    said = f"TypeError: {str(error)[:80]}"
print(f"torch {torch.__version__.split('+')[0]}")
print(f"NaN among 3 outputs, one filter pruned: {nans(plain)} plain, {nans(normed)} with weight_norm")
print(f"NaN among 3 outputs, all weights 0: {nans(spectral)} with spectral_norm")
print(f"prune of the attribute: {said}")
assert (nans(plain), nans(normed), nans(spectral)) == (0, 1, 3), "behaviour has changed"
assert said.startswith("TypeError"), "behaviour has changed"
EOF
