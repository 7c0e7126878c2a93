#!/usr/bin/env bash
# sparsimony 0.1.0 (torch 2.13.0): its SET moves no weight at all if `delta_t` is even, and stops with an
# AssertionError at its first move if it is odd.
# Expected: at each delta_t-th step the smallest weights go and as many grow at random, as with its RigL beside it.
# Seen: SET counts each step twice, so the scheduler is asked at 1, 3, 5 ... only. No even delta_t ever divides these:
#   the mask of the first step is that of the last, without a message, and what is measured is a static mask from
#   magnitudes. With an odd delta_t the move comes at half of the step that was asked for, and the check behind it
#   compares the weights that are left with the share that should be gone: it holds at a sparsity of 0.5 only.
# Hit: comparisons with SET, whose usual intervals (100, 1000 steps) are even.
# Output seen:
#   sparsimony 0.1.0, torch 2.13.0; 200 steps
#                 RigL, sparsity 0.9      SET, sparsity 0.9           SET, sparsity 0.5
#   delta_t 2     51 moves, from step 2   0 moves                     0 moves
#   delta_t 10    20 moves, from step 10  0 moves                     0 moves
#   delta_t 50    4 moves, from step 50   0 moves                     0 moves
#   delta_t 100   2 moves, from step 100  0 moves                     0 moves
#   delta_t 5     38 moves, from step 5   AssertionError at step 3    40 moves, from step 3
#   delta_t 25    8 moves, from step 25   AssertionError at step 13   8 moves, from step 13
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==1.26.4 sparsimony==0.1.0
cd "$work"
venv/bin/python - <<'EOF'
from importlib.metadata import version

import torch
from sparsimony.distributions.base import UniformDistribution
from sparsimony.dst.rigl import RigL
from sparsimony.dst.set import SET
from sparsimony.schedulers.base import ConstantScheduler
from torch import nn

torch.manual_seed(0)
inputs, targets = torch.randn(64, 40), torch.randn(64, 10)


def run(method, delta_t, sparsity):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    schedule = ConstantScheduler(pruning_ratio=0.3, t_end=1000, delta_t=delta_t)
    sparsifier = method(schedule, UniformDistribution(), optimizer, sparsity=sparsity)
    sparsifier.prepare(net, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])

    def masks():
        return torch.cat([layer.parametrizations.weight[0].mask.flatten() for layer in (net[0], net[2])])

    moves = []
    for step in range(1, 201):
        before = masks().clone()
        optimizer.zero_grad()
        nn.functional.mse_loss(net(inputs), targets).backward()
        optimizer.step()
        try:
            sparsifier.step()
        except AssertionError:
            return f"AssertionError at step {step}"
        if not torch.equal(before, masks()):
            moves.append(step)
    return f"{len(moves)} moves" + (f", from step {moves[0]}" if moves else "")


print(", ".join(f"{name} {version(name).split('+')[0]}" for name in ("sparsimony", "torch")) + "; 200 steps")
print(f"{'':14}{'RigL, sparsity 0.9':24}{'SET, sparsity 0.9':28}SET, sparsity 0.5")
for delta_t in (2, 10, 50, 100, 5, 25):
    rigl, high, half = run(RigL, delta_t, 0.9), run(SET, delta_t, 0.9), run(SET, delta_t, 0.5)
    print(f"delta_t {delta_t:<6}{rigl:24}{high:28}{half}")
    assert rigl.endswith(f"moves, from step {delta_t}"), "RigL has changed"
    if delta_t % 2 == 0:
        assert high == half == "0 moves", "behaviour has changed"
    else:
        early = delta_t // 2 + 1
        assert high == f"AssertionError at step {early}", "behaviour has changed"
        assert half.endswith(f"from step {early}"), "behaviour has changed"
EOF
