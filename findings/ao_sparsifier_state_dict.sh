#!/usr/bin/env bash
# torch 2.13.0: a model that torch.ao.pruning's WeightNormSparsifier has prepared does not load its own
# state_dict, and convolutions cannot be sparsified at all.
# Expected: model.load_state_dict(model.state_dict()) works; a Conv2d named in the config gets a mask of blocks,
#   or a word that only Linear is meant.
# Seen: RuntimeError, missing key "0.parametrizations.weight.0.mask": the mask's module leaves the mask out when
#   it saves and asks for it when it loads. The masks are in the sparsifier's state_dict, by position. For a
#   Conv2d, prepare() is content and step() raises an error about pooling (blocks of 1 x 4, the default) or
#   about shapes (single weights).
# Hit: whoever resumes a run with this sparsifier from a checkpoint, or uses it on a CNN.
# Output seen:
#   torch 2.13.0
#   Linear: 50% zeros; keys ['0.bias', '0.parametrizations.weight.original']
#   its own state_dict: RuntimeError: Error(s) in loading state_dict for Sequential: Missing key(s) in state_dic ...
#   Conv2d, blocks: RuntimeError: Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input ...
#   Conv2d, single weights: RuntimeError: shape '[1, 1, 2304]' is invalid for input of size 9
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5
cd "$work"
venv/bin/python - <<'EOF'
import torch
from torch import nn
from torch.ao.pruning import WeightNormSparsifier


def outcome(function):
    try:
        function()
        return "works"
    except RuntimeError as error:
        return f"RuntimeError: {' '.join(str(error).split())[:130]}"


def sparsified(layer, **options):
    model = nn.Sequential(layer)
    sparsifier = WeightNormSparsifier(sparsity_level=0.5, **options)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    return model


print(f"torch {torch.__version__.split('+')[0]}")
model = sparsified(nn.Linear(16, 16))
print(f"Linear: {(model[0].weight == 0).float().mean():.0%} zeros; keys {sorted(model.state_dict())}")
loads = outcome(lambda: model.load_state_dict(model.state_dict()))
blocks = outcome(lambda: sparsified(nn.Conv2d(16, 16, 3)))
singles = outcome(lambda: sparsified(nn.Conv2d(16, 16, 3), sparse_block_shape=(1, 1), zeros_per_block=1))
print(f"its own state_dict: {loads}\nConv2d, blocks: {blocks}\nConv2d, single weights: {singles}")
assert "0.parametrizations.weight.0.mask" in loads, "behaviour has changed"
assert blocks.startswith("RuntimeError") and singles.startswith("RuntimeError"), "behaviour has changed"
EOF
