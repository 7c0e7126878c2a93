#!/usr/bin/env bash
# torch 2.13.0: torch.nn.utils.prune moves a parameter to the end of its module's list, prune.remove leaves it
# there, and what goes by position (an optimizer's state_dict, AveragedModel) then takes the wrong one.
# Expected: after prune.remove a network is a plain one: its checkpoint (model and optimizer) goes on in a fresh
#   network of the same class.
# Seen: weight, bias has become bias, weight. The optimizer's state loads without a word and the bias gets the
#   weight's momentum: the first step raises a RuntimeError over shapes, or, where the shapes agree (a recurrent
#   layer without bias), trains on with the momenta of two matrices exchanged. An AveragedModel made before
#   pruning pairs weight with bias too.
# Hit: resuming a pruned network from an ordinary checkpoint; averages begun before pruning.
# Output seen:
#   torch 2.13.0
#   Linear, pruned and made plain: ['bias', 'weight'], fresh: ['weight', 'bias']
#   resumed: RuntimeError: output with shape [3] doesn't match the broadcast shape [3, 3]
#   RNN without bias, resumed: trains on, momenta exchanged: True
#   AveragedModel made before pruning: RuntimeError: output with shape [3] doesn't match the broadcast shape [3, 3]
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
from torch.optim.swa_utils import AveragedModel


def names(module):
    return [name for name, _ in module.named_parameters()]


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def train(module, optimizer, x):
    out = module(x)
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    optimizer.step()


def pruned_and_resumed(make, name, x):
    torch.manual_seed(0)
    module = make()
    prune.l1_unstructured(module, name, amount=0.5)
    prune.remove(module, name)
    optimizer = sgd(module)
    train(module, optimizer, x)
    fresh = make()
    fresh.load_state_dict(module.state_dict())
    resumed = sgd(fresh)
    resumed.load_state_dict(optimizer.state_dict())
    return module, optimizer, fresh, resumed


print(f"torch {torch.__version__.split('+')[0]}")
x = torch.randn(5, 3)
module, optimizer, fresh, resumed = pruned_and_resumed(lambda: nn.Linear(3, 3), "weight", x)
order = names(module), names(fresh)
print(f"Linear, pruned and made plain: {order[0]}, fresh: {order[1]}")
try:
    train(fresh, resumed, x)
    linear = "trains on"
except RuntimeError as error:
    linear = f"RuntimeError: {str(error)[:80]}"
print(f"resumed: {linear}")

x = torch.randn(2, 5, 3)
make = lambda: nn.RNN(3, 3, bias=False, batch_first=True)  # noqa: E731
module, optimizer, fresh, resumed = pruned_and_resumed(make, "weight_ih_l0", x)
momenta = [
    {name: opt.state[p]["momentum_buffer"].clone() for name, p in net.named_parameters()}
    for net, opt in ((module, optimizer), (fresh, resumed))
]
train(fresh, resumed, x)
exchanged = all(
    torch.equal(momenta[0][a], momenta[1][b])
    for a, b in (("weight_ih_l0", "weight_hh_l0"), ("weight_hh_l0", "weight_ih_l0"))
)
print(f"RNN without bias, resumed: trains on, momenta exchanged: {exchanged}")

module = nn.Linear(3, 3)
average = AveragedModel(module)
prune.l1_unstructured(module, "weight", amount=0.5)
try:
    average.update_parameters(module)
    average.update_parameters(module)
    averaged = "works"
except RuntimeError as error:
    averaged = f"RuntimeError: {str(error)[:80]}"
print(f"AveragedModel made before pruning: {averaged}")
assert order == (["bias", "weight"], ["weight", "bias"]) and exchanged, "behaviour has changed"
assert linear.startswith("RuntimeError") and averaged.startswith("RuntimeError"), "behaviour has changed"
EOF
