#!/usr/bin/env bash
# torch 2.13.0: torch.utils.checkpoint (use_reentrant=False) inside torch.func.functional_call gives wrong
# gradients.
# Expected: recomputing activations changes memory and time, not gradients.
# Seen: the forward pass uses the parameters handed to functional_call; the recomputation, which happens in the
#   backward pass, after functional_call has put the module's own ones back, uses those. The gradients of both
#   weights are off by more than their own length, nothing is said (the check that compares recomputed tensors
#   looks at shapes, types and devices), and the running statistics of the module's own batch norm are moved
#   though buffers were handed over too.
# Hit: masks put on by functional_call, hypernetworks, meta-learning, model ensembles, with any model that
#   checkpoints its blocks.
# Output seen:
#   torch 2.13.0
#   loss 75.6492 without and 75.6492 with checkpoint
#   gradient of linear.weight: off by 495% of its length
#   gradient of norm.weight: off by 113% of its length
#   the module's own running mean moved by 0.000 without and 0.045 with checkpoint
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5
cd "$work"
venv/bin/python - <<'EOF'
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, recompute):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.recompute = recompute

    def inner(self, x):
        return torch.tanh(self.norm(self.linear(x)))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False) if self.recompute else self.inner(x)


def gradients(recompute):
    block = Block(recompute)
    own = block.norm.running_mean.clone()
    torch.manual_seed(1)
    x, target = torch.randn(16, 4), torch.randn(16, 4)
    params = {name: torch.randn_like(p).requires_grad_() for name, p in block.named_parameters()}
    buffers = {name: b.clone() for name, b in block.named_buffers()}
    loss = (functional_call(block, (params, buffers), (x,)) - target).square().sum()
    grads = dict(zip(params, torch.autograd.grad(loss, tuple(params.values()))))
    return loss.item(), grads, (block.norm.running_mean - own).abs().max().item()


loss, right, still = gradients(recompute=False)
loss_again, grads, moved = gradients(recompute=True)
print(f"torch {torch.__version__.split('+')[0]}")
print(f"loss {loss:.4f} without and {loss_again:.4f} with checkpoint")
off = {
    name: ((grads[name] - right[name]).norm() / right[name].norm()).item() for name in ("linear.weight", "norm.weight")
}
for name, part in off.items():
    print(f"gradient of {name}: off by {part:.0%} of its length")
print(f"the module's own running mean moved by {still:.3f} without and {moved:.3f} with checkpoint")
assert loss == loss_again and min(off.values()) > 0.1 and still == 0 and moved > 0, "behaviour has changed"
EOF
