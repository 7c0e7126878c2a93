"""What people put around a step, in four trainers: clipping, micro-batches, loss scaling, compilation, averaging."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moving_cases import STEPS, Digits, digits
from step_cases import TRAINERS, Around, train
from torch import Tensor

from tost_plugins import Mask, Session
from tost_plugins.params import prunable

RANDOM = {"kind": "random", "sparsity": 0.6, "allocation": "uniform"}
RIGL = {"kind": "rigl", "sparsity": 0.6, "every": "2ba", "until": "8ba", "drop": 0.6}
DNW = {"kind": "dnw", "sparsity": 0.6}
TWEAKS = [{"kind": "ghost_skip", "until": "4ba"}, {"kind": "soft_activation", "until": "7ba"}, {"kind": "label_smoothing"}]
CASES = {
    "static": {"mask": RANDOM},
    "tweaks": {"mask": RANDOM, "tweaks": TWEAKS},
    "rigl": {"mask": RIGL, "tweaks": TWEAKS},
    "dnw": {"mask": DNW, "tweaks": TWEAKS},
}
CLIP = 0.5


def weights(session: Session) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in session.model.state_dict().items()}


def differences(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    """Names of what is not bit for bit the same."""
    return [name for name in one.keys() | two.keys() if name not in one or not torch.equal(one[name], two[name])]


def plain_names(session: Session) -> dict[str, Tensor]:
    """The weights under the network's own names: adapters wrap it."""
    return {name.removeprefix("module.").removeprefix("module."): value for name, value in weights(session).items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trainer", TRAINERS[1:])
def test_clipped_runs_are_the_plain_loops(trainer: str, case: str) -> None:
    found: list[tuple[list[Mask], dict[str, Tensor]]] = []
    for which in ("torch", trainer):
        masks: list[Mask] = []
        around = Around(CASES[case], clip=CLIP, look=lambda step, session, masks=masks: masks.append(session.mask))
        session = train(which, around)
        found.append((masks, plain_names(session)))
    assert len(found[0][0]) == STEPS and found[0][0] == found[1][0]
    assert not differences(found[0][1], found[1][1])
