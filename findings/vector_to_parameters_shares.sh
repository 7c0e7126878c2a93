#!/usr/bin/env bash
# torch 2.13.0: a vector that `torch.nn.utils.vector_to_parameters` has put into a network changes as that one trains.
# Expected: a vector that stays as it is; the function's documentation says that it copies slices of the vector.
# Seen: the parameters become views of the vector, so each step of the optimizer writes into it. A start that is kept
#   as one vector brings the network back once; from then on it is wherever the network is, and to rewind to it does
#   nothing: the second round begins with the first one's trained weights. Two networks that were given one vector
#   are one network, which both optimizers move. No error, no warning. With `vector.clone()` all is as expected.
# Hit: lottery tickets and other rewinding, masks that are compared from one start, ensembles and teachers that begin
#   alike, searches over directions in weight space with some training in between.
# Output seen:
#   torch 2.13.0
#   vector_to_parameters(start)          loss at each round's begin  3.50  1.36  0.37; start has moved by 1.98
#   vector_to_parameters(start.clone())  loss at each round's begin  3.50  3.50  3.50; start has moved by 0.00
#   two networks, one vector, one of them trains: the other one's loss goes from 3.50 to 1.36
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5
cd "$work"
venv/bin/python - <<'EOF'
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

torch.manual_seed(0)
inputs = torch.randn(64, 20)
targets = 2 * inputs[:, :1]


def network():
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 1))


def loss_of(net):
    return nn.functional.mse_loss(net(inputs), targets)


def train(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()


def rounds(net, start, copy):
    before, losses = start.clone(), []
    for _ in range(3):
        vector_to_parameters(start.clone() if copy else start, net.parameters())
        losses.append(loss_of(net).item())
        train(net)
    return losses, (start - before).norm().item()


net, other = network(), network()
true = parameters_to_vector(net.parameters()).detach()
print(f"torch {torch.__version__.split('+')[0]}")
for copy in (False, True):
    losses, moved = rounds(net, true.clone(), copy)
    call = f"vector_to_parameters({'start.clone()' if copy else 'start'})"
    seen = "".join(f"{loss:6.2f}" for loss in losses)
    print(f"{call:36} loss at each round's begin{seen}; start has moved by {moved:.2f}")
    if copy:
        assert moved == 0 and losses[0] == losses[1] == losses[2], "it is not the vector that the parameters share"
    else:
        assert moved > 0.1 and losses[1] < losses[0] / 2, "behaviour has changed"
start = true.clone()
vector_to_parameters(start, net.parameters())
vector_to_parameters(start, other.parameters())
before = loss_of(other).item()
train(net)
after = loss_of(other).item()
print(f"two networks, one vector, one of them trains: the other one's loss goes from {before:.2f} to {after:.2f}")
assert after < before / 2, "behaviour has changed"
EOF
