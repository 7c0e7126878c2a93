#!/usr/bin/env bash
# torch 2.13.0: how far a weight goes in its first steps if its gradient was 0 for a thousand steps before.
# Expected: like a new weight, about a learning rate a step; NAdam, "Adam with Nesterov momentum", like Adam.
# Seen, with default settings and equal gradients from then on: Adam 2.5 learning rates in the first step, RMSprop
#   10, NAdam 13; over the first ten steps Adam 44, NAdam 84. NAdam starts with little momentum (its schedule
#   runs over thousands of steps), so half of the new gradient counts at once, over a second moment that has
#   only just begun to rise.
# Hit: weights that grow back under moving masks (RigL, SET), layers that are unfrozen late, rare embeddings:
#   what is tuned with Adam can diverge with NAdam or RMSprop at the same learning rate.
# Output seen:
#   torch 2.13.0; in learning rates: first step, first ten steps
#   Adagrad    1.00    5.02
#   Adamax     0.10    4.14
#   RAdam      1.62   28.48
#   Adam       2.52   44.03
#   RMSprop   10.00   50.65
#   NAdam     13.43   83.80
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5
cd "$work"
venv/bin/python - <<'EOF'
import torch


def moves(name):
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = getattr(torch.optim, name)([weight], lr=1.0)
    for step in range(1000):
        weight.grad = torch.tensor([0.0, 0.01 * (-1) ** step])
        optimizer.step()
    idle = weight[0].item()
    path = []
    for _ in range(10):
        weight.grad = torch.tensor([0.01, 0.01])
        optimizer.step()
        path.append(-weight[0].item())
    return idle, path


print(f"torch {torch.__version__.split('+')[0]}; in learning rates: first step, first ten steps")
seen = {}
for name in ("Adagrad", "Adamax", "RAdam", "Adam", "RMSprop", "NAdam"):
    idle, path = moves(name)
    assert idle == 0, f"{name} moves weights without a gradient: behaviour has changed"
    seen[name] = path[0]
    print(f"{name:8} {path[0]:6.2f} {path[-1]:7.2f}")
assert 2 < seen["Adam"] < 3.2 and 9 < seen["RMSprop"] < 11 and seen["NAdam"] > 4 * seen["Adam"], "behaviour has changed"
EOF
