#!/usr/bin/env bash
# torch 2.13.0 and ema-pytorch 0.8.3: what averages of a model make of a boolean mask in a buffer.
# Expected: the mask is copied (as of the newest model), or use_buffers=True refuses a buffer that has no mean.
# Seen, after the mask has moved from one half to the other:
#   - AveragedModel with the exponential average: all True, the union of all masks there were. It computes
#     0.9 * True + 0.1 * False = 0.9 and stores that as a boolean;
#   - AveragedModel with the equal average: RuntimeError at the second update, for a mask and (with
#     get_swa_multi_avg_fn) for the step counter of any BatchNorm, so use_buffers=True does not go with it;
#   - ema_pytorch.EMA: the first mask for ever, and a mask kept as floats (as torch.nn.utils.prune does) turns
#     into fractions between the two.
# Hit: sparse training with moving masks beside an average: the averaged network is denser than any there was,
#   or multiplies its weights by halves.
# Output seen:
#   torch 2.13.0, ema_pytorch 0.8.3; masks 1 0 1 0, then 0 1 0 1
#   torch, exponential: [1.0, 1.0, 1.0, 1.0]
#   torch, equal: RuntimeError: Subtraction, the `-` operator, with two bool tensors is not supported
#   ema_pytorch, boolean: [1.0, 0.0, 1.0, 0.0]
#   ema_pytorch, float: [0.1, 0.9, 0.1, 0.9]
#   torch, equal, a BatchNorm: RuntimeError: Integer division with addcdiv is no longer supported, and in a future 
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5 ema-pytorch==0.8.3
cd "$work"
venv/bin/python - <<'EOF'
import ema_pytorch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn


class Net(nn.Module):
    def __init__(self, boolean):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        first = torch.tensor([1, 0, 1, 0])
        self.register_buffer("mask", first.bool() if boolean else first.float())


def run(average, net):
    """Two updates with the first mask, five with the opposite one."""
    update = average.update if hasattr(average, "update") else lambda: average.update_parameters(net)
    try:
        for step in range(7):
            if step == 2:
                net.mask.copy_(1 - net.mask.int())
            update()
    except RuntimeError as error:
        return f"RuntimeError: {str(error).split('.')[0][:70]}"
    inner = average.ema_model if hasattr(average, "ema_model") else average.module
    return [round(float(x), 2) for x in inner.mask]


def average_of(net, fn):
    return AveragedModel(net, use_buffers=True, multi_avg_fn=fn)


seen = {}
net = Net(boolean=True)
seen["torch, exponential"] = run(average_of(net, get_ema_multi_avg_fn(0.9)), net)
net = Net(boolean=True)
seen["torch, equal"] = run(average_of(net, get_swa_multi_avg_fn()), net)
for boolean in (True, False):
    net = Net(boolean)
    ema = ema_pytorch.EMA(net, beta=0.9, update_after_step=0, update_every=1)
    seen[f"ema_pytorch, {'boolean' if boolean else 'float'}"] = run(ema, net)
net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
average = average_of(net, get_swa_multi_avg_fn())
average.update_parameters(net)
try:
    average.update_parameters(net)
    seen["torch, equal, a BatchNorm"] = "works"
except RuntimeError as error:
    seen["torch, equal, a BatchNorm"] = f"RuntimeError: {str(error).split('.')[0][:70]}"

print(f"torch {torch.__version__.split('+')[0]}, ema_pytorch 0.8.3; masks 1 0 1 0, then 0 1 0 1")
for name, what in seen.items():
    print(f"{name}: {what}")
assert seen["torch, exponential"] == [1, 1, 1, 1], "behaviour has changed"
assert all(str(seen[key]).startswith("RuntimeError") for key in ("torch, equal", "torch, equal, a BatchNorm"))
assert seen["ema_pytorch, boolean"] == [1, 0, 1, 0], "behaviour has changed"
assert all(0 < x < 1 for x in seen["ema_pytorch, float"]), "behaviour has changed"
EOF
