#!/usr/bin/env bash
# timm 1.0.31 and accelerate 1.15.0 (torch 2.7.0): torch's optimizer step hooks on an optimizer that is wrapped.
# Expected: Lookahead and AcceleratedOptimizer are torch.optim.Optimizer by isinstance, so
#   register_step_post_hook(hook) calls the hook after each step().
# Seen: timm's Lookahead takes the hook and does not call it, until its zero_grad() has run once, from where on
#   it does; accelerate's raises AttributeError. Neither runs Optimizer.__init__, which is what puts the hooks
#   around step(); in Lookahead the first zero_grad() does that by way of torch's unpickling code.
# Hit: whoever keeps something true after each step (a mask, an average) by hooks: with Lookahead the first
#   step, and each step of a loop that calls model.zero_grad(), goes by without a word. The wrapped optimizer's
#   own hooks do work, but run before Lookahead moves the weights.
# Output seen:
#   timm 1.0.31, accelerate 1.15.0, torch 2.7.0
#   Lookahead is an Optimizer: True
#   calls of the hook after each of 4 steps, zero_grad() before the third: [0, 0, 1, 2]
#   AcceleratedOptimizer is an Optimizer: True
#   it says to a hook: AttributeError: 'AcceleratedOptimizer' object has no attribute '_optimizer_step_post_hooks'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.7.0 torchvision==0.22.0 numpy==2.3.5 timm==1.0.31 accelerate==1.15.0
cd "$work"
venv/bin/python - <<'EOF'
import accelerate
import timm
import torch
from timm.optim import Lookahead


def setting():
    weight = torch.nn.Parameter(torch.ones(3))
    return weight, torch.optim.SGD([weight], lr=0.1)


calls = []
weight, inner = setting()
optimizer = Lookahead(inner)
optimizer.register_step_post_hook(lambda *_: calls.append("hook"))
counts = []
for step in range(4):
    if step == 2:
        optimizer.zero_grad()
    weight.grad = torch.ones(3)
    optimizer.step()
    counts.append(len(calls))
print(f"timm {timm.__version__}, accelerate {accelerate.__version__}, torch {torch.__version__.split('+')[0]}")
print(f"Lookahead is an Optimizer: {isinstance(optimizer, torch.optim.Optimizer)}")
print(f"calls of the hook after each of 4 steps, zero_grad() before the third: {counts}")

prepared = accelerate.Accelerator(cpu=True).prepare(setting()[1])
try:
    prepared.register_step_post_hook(lambda *_: None)
    said = "nothing"
except AttributeError as error:
    said = f"AttributeError: {error}"
print(f"{type(prepared).__name__} is an Optimizer: {isinstance(prepared, torch.optim.Optimizer)}")
print(f"it says to a hook: {said}")
assert counts == [0, 0, 1, 2] and said.startswith("AttributeError"), "behaviour has changed"
EOF
