#!/usr/bin/env bash
# torch 2.7.0: torch.distributed.checkpoint.state_dict and a parameter that has had no gradient yet.
# Expected: get_state_dict(model, optimizer) of a run can be set in the same model and optimizer, freshly made, as
#   optimizer.state_dict() can be loaded.
# Seen: set_state_dict raises a bare KeyError with the name of the parameter, since the saved optimizer has no numbers
#   for one that it never stepped, and the fresh one, which takes a step of zeros first, has. The optimizer's own
#   load_state_dict loads. Versions since (2.13.0) raise a RuntimeError that says so and names strict=False.
# Hit: whoever resumes a run with heads, experts or branches that were idle so far; Composer 0.32 loads its checkpoints
#   this way, and pins torch below 2.7.1.
# Output seen:
#   torch 2.7.0
#   saved numbers of: ['used.bias', 'used.weight']
#   load_state_dict of the optimizer: loads
#   set_state_dict: KeyError: 'idle.weight'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.7.0 numpy==2.3.5
cd "$work"
venv/bin/python - <<'EOF'
import copy

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def setting():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "idle": torch.nn.Linear(2, 2)})
    return model, torch.optim.AdamW(model.parameters())


print(f"torch {torch.__version__.split('+')[0]}")
model, optimizer = setting()
model["used"](torch.ones(1, 2)).sum().backward()
optimizer.step()
weights, numbers = copy.deepcopy(get_state_dict(model, optimizer))
print(f"saved numbers of: {sorted(numbers['state'])}")
again, own = setting()
own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
print("load_state_dict of the optimizer: loads")
again, own = setting()
try:
    set_state_dict(again, own, model_state_dict=weights, optim_state_dict=numbers)
    said = "loads"
except KeyError as error:
    said = f"KeyError: {error}"
print(f"set_state_dict: {said}")
assert said == "KeyError: 'idle.weight'", "behaviour has changed"
EOF
