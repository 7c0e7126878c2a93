#!/usr/bin/env bash
# torch 2.13.0: `get_optimizer_state_dict` (torch.distributed.checkpoint) steps an optimizer that has not stepped yet.
# Expected: to ask for a state changes nothing: a checkpoint at step 0 is the run's beginning, also in memory.
# Seen: it takes a step with gradients and a learning rate of 0 and leaves what that has done. The step is counted, so
#   Adam's first real one goes 0.74 as far, Adamax's and RAdam's half; SGD with dampening a tenth, with weight decay
#   (which is in the momentum twice) 1.34. Rprop takes its first step size from that learning rate, so it begins with
#   steps of 1e-6 and not of 0.01. Step hooks and with them masks that move by count are called once more.
#   `optimizer.state_dict()` does none of it.
# Hit: checkpoints before the first step, in elastic runs, in tests that compare a resumed run with a whole one, in
#   comparisons of which only one side saves.
# Known for AdamW: https://github.com/pytorch/pytorch/issues/164929 (open).
# Output seen:
#   torch 2.13.0; length of steps after get_optimizer_state_dict, without it 1
#                       first   second    tenth   calls of a step hook in 10 steps
#   Adam               0.7441   0.8645   1.0147   10, 11
#   AdamW              0.7443   0.8646   1.0147   10, 11
#   Adamax             0.5263   0.7263   1.0289   10, 11
#   NAdam              0.9891   1.0857   1.0284   10, 11
#   RAdam              0.5263   0.7014   1.0861   10, 11
#   Rprop              0.0001   0.0001   0.0002   10, 11
#   SGD, dampening     0.1000   0.1900   0.6532   10, 11
#   SGD, weight decay  1.3387   1.1575   1.0173   10, 11
#   SGD, momentum      1.0000   1.0000   1.0000   10, 11
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5
cd "$work"
venv/bin/python - <<'EOF'
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def run(name, options, look):
    torch.manual_seed(0)
    net = nn.Linear(20, 20)
    inputs = torch.randn(64, 20)
    targets = torch.randn(64, 20)
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=0.01, **options)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    look(net, optimizer)
    moves = []
    for _ in range(10):
        before = net.weight.detach().clone()
        optimizer.zero_grad()
        nn.functional.mse_loss(net(inputs), targets).backward()
        optimizer.step()
        moves.append((net.weight.detach() - before).norm().item())
    return moves, len(calls)


def steps_it(net, optimizer):
    get_optimizer_state_dict(net, optimizer)


cases = {
    "Adam": ("Adam", {}),
    "AdamW": ("AdamW", {}),
    "Adamax": ("Adamax", {}),
    "NAdam": ("NAdam", {}),
    "RAdam": ("RAdam", {}),
    "Rprop": ("Rprop", {}),
    "SGD, dampening": ("SGD", {"momentum": 0.9, "dampening": 0.9}),
    "SGD, weight decay": ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    "SGD, momentum": ("SGD", {"momentum": 0.9}),
}
version = torch.__version__.split("+")[0]
print(f"torch {version}; length of steps after get_optimizer_state_dict, without it 1")
print("                    first   second    tenth   calls of a step hook in 10 steps")
for name, case in cases.items():
    plain, calls = run(*case, lambda net, optimizer: optimizer.state_dict())
    after, more = run(*case, steps_it)
    first, second, tenth = (after[i] / plain[i] for i in (0, 1, 9))
    print(f"{name:17} {first:7.4f}  {second:7.4f}  {tenth:7.4f}   {calls}, {more}")
    assert calls == 10 and more == 11, "behaviour has changed"
    assert (abs(first - 1) > 0.01) == (name != "SGD, momentum"), "behaviour has changed"
EOF
