#!/usr/bin/env bash
# torch 2.13.0: DDP's PowerSGD hook, as it is set up by default, turns a gradient that is all 0 into NaN, silently.
# Expected: 0, which low rank holds exactly; or at least the error that the code means to log for this case, with the
#   advice to set orthogonalization_epsilon, before it puts zeros in.
# Seen: NaN at the first compressed step, without a log line: that branch waits for a ZeroDivisionError, which a
#   division of tensors never raises. By default compression begins at step 1000, so 1000 steps go well before it.
#   With matrix_approximation_rank 2, one live row in a matrix is too few as well: the second column, less its
#   projection on the first, is all 0. Rank 4 is factored in another way (QR) and is right.
# Hit: training with layers whose weights are all masked, or all but one filter's, or with branches gated off. The NaN
#   reaches removed weights, NaN times a mask's 0 is NaN, and the next loss is NaN.
# Remedy: PowerSGDState(..., orthogonalization_epsilon=1e-8). The default of 0 is meant, for accuracy:
#   https://github.com/pytorch/pytorch/pull/55738.
# Output seen:
#   torch 2.13.0
#   first step of 12 with a NaN loss (0: none) at rank 1, 2, 4; the same with orthogonalization_epsilon=1e-8
#   all weights live  [0, 0, 0]   [0, 0, 0]
#   all masked        [6, 6, 0]   [0, 0, 0]
#   all but a row     [0, 6, 0]   [0, 0, 0]
#   gate at 0         [6, 6, 0]   [0, 0, 0]
#   warnings and errors logged by the hook: 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5
cd "$work"
venv/bin/python - <<'EOF'
import logging

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power
from torch.nn.parallel import DistributedDataParallel

records = []
handler = logging.Handler(logging.WARNING)
handler.emit = records.append
power.logger.addHandler(handler)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # one process is enough to see it


class Net(nn.Module):
    """Two layers of one shape, the second with a mask and a gate."""

    def __init__(self, mask, gate):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.mask, self.gate = mask, gate

    def forward(self, x):
        masked = nn.functional.linear(x, self.second.weight * self.mask, self.second.bias)
        return self.first(x) + self.gate * masked


def first_nan(mask, gate, **settings):
    """The step (from 1, of 12) at which the loss is NaN for the first time; compression begins at step 5."""
    net = DistributedDataParallel(Net(mask, gate))
    net.register_comm_hook(power.PowerSGDState(None, start_powerSGD_iter=4, **settings), power.powerSGD_hook)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for step in range(1, 13):
        loss = net(torch.randn(8, 32)).square().mean()
        if loss.isnan():
            return step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return 0


ones = torch.ones(32, 32)
row = torch.zeros(32, 32)
row[3] = 1
cases = {"all weights live": (ones, 1), "all masked": (row * 0, 1), "all but a row": (row, 1), "gate at 0": (ones, 0)}
print(f"torch {torch.__version__.split('+')[0]}")
print("first step of 12 with a NaN loss (0: none) at rank 1, 2, 4; the same with orthogonalization_epsilon=1e-8")
seen = {}
for name, case in cases.items():
    steps = [first_nan(*case, matrix_approximation_rank=rank) for rank in (1, 2, 4)]
    safe = [first_nan(*case, matrix_approximation_rank=rank, orthogonalization_epsilon=1e-8) for rank in (1, 2, 4)]
    seen[name] = steps
    print(f"{name:17} {steps}   {safe}")
    assert safe == [0, 0, 0], "behaviour has changed"
print(f"warnings and errors logged by the hook: {len(records)}")
assert list(seen.values()) == [[0, 0, 0], [6, 6, 0], [0, 6, 0], [6, 6, 0]], "behaviour has changed"
assert not records, "behaviour has changed: it says something now"
EOF
