#!/usr/bin/env bash
# schedulefree 1.4.1 (torch 2.13.0): optimizer.eval() brings pruned weights back.
# Expected: a weight that is set to 0 after every step, and whose gradient is 0, is 0 when the network is
#   evaluated or saved.
# Seen: 90 % zeros in train mode, none after eval(). The parameters are a mix of two sequences; the one named z
#   lies in the optimizer's state, still has the value from before pruning, and eval() mixes it in again. So the
#   network that is trained is sparse, the one that is tested and saved is dense.
# Hit: pruning or sparse fine-tuning of a network that is already training with one of its optimizers: masks
#   must reach state[p]["z"] as well.
# Output seen:
#   schedulefree 1.4.1, torch 2.13.0
#   SGDScheduleFree: zeros 90% in training, 0% after eval(), where they are 0.09
#   AdamWScheduleFree: zeros 90% in training, 0% after eval(), where they are 0.09
#   RAdamScheduleFree: zeros 90% in training, 0% after eval(), where they are 0.09
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy==2.3.5 schedulefree==1.4.1
cd "$work"
venv/bin/python - <<'EOF'
import schedulefree
import torch

print(f"schedulefree 1.4.1, torch {torch.__version__.split('+')[0]}")
for cls in (schedulefree.SGDScheduleFree, schedulefree.AdamWScheduleFree, schedulefree.RAdamScheduleFree):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(1000))
    mask = (torch.arange(1000) % 10 == 0).float()
    optimizer = cls([weight], lr=0.01)
    optimizer.train()
    for step in range(40):
        weight.grad = torch.randn(1000)
        if step >= 20:  # pruned from here on
            weight.grad.mul_(mask)
        optimizer.step()
        if step >= 20:
            with torch.no_grad():
                weight.mul_(mask)
    training = (weight == 0).float().mean().item()
    optimizer.eval()
    testing = (weight == 0).float().mean().item()
    size = weight.detach()[mask == 0].abs().mean().item()
    print(f"{cls.__name__}: zeros {training:.0%} in training, {testing:.0%} after eval(), where they are {size:.2f}")
    assert abs(training - 0.9) < 0.01 and testing < 0.01 and size > 0.05, "behaviour has changed"
EOF
