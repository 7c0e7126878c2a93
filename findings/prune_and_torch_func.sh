#!/usr/bin/env bash
# torch 2.13.0: torch.func over a network pruned by torch.nn.utils.prune leaves things behind in the network.
# Expected: functional_call leaves a module as it was, and torch.func.grad over it has no effect but its result.
# Seen: the attribute `weight`, which pruning's hook computes before each call, keeps what the last call made of
#   it: after functional_call with zeros layer.weight is all 0 though weight_orig and weight_mask are not; after
#   torch.func.grad it is a wrapper of a transform that has ended, so torch.save(layer), which worked before,
#   raises. The next ordinary call mends it.
# Hit: per-sample gradients, influence scores, Hessian products or ensembles over pruned networks, followed by
#   counting zeros or saving.
# Output seen:
#   torch 2.13.0
#   torch.save before: works
#   after functional_call with zeros: 0 weights in layer.weight, 8 in weight_orig * weight_mask
#   after torch.func.grad: NotImplementedError: Cannot access storage of TensorWrapper
#   after one more call: works
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5
cd "$work"
venv/bin/python - <<'EOF'
import io

import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn.utils import prune


def outcome(function):
    try:
        function()
        return "works"
    except (RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error)[:90]}"


def saving(layer):
    return outcome(lambda: torch.save(layer, io.BytesIO()))


torch.manual_seed(0)
layer, x = nn.Linear(4, 4), torch.randn(3, 4)
prune.l1_unstructured(layer, "weight", amount=0.5)
params = {name: p.detach() for name, p in layer.named_parameters()}
print(f"torch {torch.__version__.split('+')[0]}")
before = saving(layer)
print(f"torch.save before: {before}")

functional_call(layer, {name: torch.zeros_like(p) for name, p in params.items()}, (x,))
stale = int(layer.weight.count_nonzero()), int((layer.weight_orig * layer.weight_mask).count_nonzero())
print(f"after functional_call with zeros: {stale[0]} weights in layer.weight, {stale[1]} in weight_orig * weight_mask")

layer(x)
grad(lambda p: functional_call(layer, p, (x,)).sum())(params)
after = saving(layer)
print(f"after torch.func.grad: {after}")
layer(x)
mended = saving(layer)
print(f"after one more call: {mended}")
assert before == mended == "works", "behaviour has changed"
assert stale == (0, 8) and after != "works", "behaviour has changed"
EOF
