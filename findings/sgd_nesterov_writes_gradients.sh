#!/usr/bin/env bash
# torch 2.13.0: SGD with Nesterov momentum, for one tensor at a time (the choice on a CPU) and for several at once
#   (foreach, the choice on a GPU).
# Expected: a step reads gradients. After it p.grad is what the backward pass has left there, in either form.
# Seen: with foreach=True the step adds momentum * buffer to p.grad itself, so that after it p.grad is the update
#   and no gradient; with foreach=False, and without nesterov in either form, it is left alone. The weights agree.
#   A second step without a new backward pass therefore goes another way than on the CPU: the weights differ.
# Hit: what looks at gradients behind optimizer.step(): norms in a log, RigL's growth, rules that multiply weights
#   by their gradients, a gradient that is kept for the next step. On a CPU it is right, on a GPU another number.
# Output seen:
#   torch 2.13.0
#   foreach=False nesterov=True: gradient behind the first step [1.0, 1.0], weights after a second on it 0.539
#   foreach=True nesterov=True: gradient behind the first step [1.9, 1.9], weights after a second on it 0.368
#   foreach=False nesterov=False: gradient behind the first step [1.0, 1.0], weights after a second on it 0.710
#   foreach=True nesterov=False: gradient behind the first step [1.0, 1.0], weights after a second on it 0.710
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5
cd "$work"
venv/bin/python - <<'EOF'
import torch

print(f"torch {torch.__version__.split('+')[0]}")
seen = {}
for nesterov in (True, False):
    for foreach in (False, True):
        weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
        optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=nesterov, foreach=foreach)
        for weight in weights:
            weight.grad = torch.ones(1)
        optimizer.step()
        gradients = [round(weight.grad.item(), 3) for weight in weights]
        optimizer.step()
        seen[foreach, nesterov] = gradients, f"{weights[0].item():.3f}"
        print(
            f"foreach={foreach} nesterov={nesterov}: gradient behind the first step {gradients}, "
            f"weights after a second on it {seen[foreach, nesterov][1]}"
        )
assert seen[True, True][0] == [1.9, 1.9] and seen[False, True][0] == [1.0, 1.0], "behaviour has changed"
assert seen[True, True][1] != seen[False, True][1], "behaviour has changed"
assert seen[True, False] == seen[False, False], "behaviour has changed"
EOF
