"""What studies train unless they say otherwise, at each size, and the papers whose figures they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Row = dict[str, Any]
Size = Literal["smoke", "cpu", "paper"]
Content = Mapping[str, Any]  # a recipe's content, with the user's changes

_STEPS = {"schedule": {"kind": "steps", "at": ["90ep", "135ep"], "factor": 0.1}, "duration": "182ep"}
_SNIP = {"kind": "snip", "sparsity": 0.95, "batches": 2, "on_collapse": "keep_one"}


def tweaks(iterations: int, learning_rate: float = 0.02, alpha: float = 0.05) -> list[Row]:
    """The four tweaks as the shipped recipes have them, with this much of rescaled_init."""
    return [
        {"kind": "ghost_skip", "until": "0.1dur"},
        {"kind": "soft_activation", "until": "0.1dur"},
        {"kind": "rescaled_init", "iterations": iterations, "learning_rate": learning_rate},
        {"kind": "label_smoothing", "alpha": alpha},
    ]


#: What a study of each size trains, unless it says otherwise; `--set` changes it.
BASES: dict[str, Row] = {
    "smoke": {
        "mask": _SNIP, "tweaks": tweaks(2), "model": "cifar/resnet8", "duration": "3ep", "trainer": "torch",
        "data": {"name": "digits", "limit": 384, "batch_size": 64},
    },
    "cpu": {
        "mask": _SNIP, "tweaks": tweaks(30), "model": "cifar/resnet20", "duration": "4ep", "trainer": "torch",
        "data": {"name": "cifar10", "limit": 5000, "validation": 500, "batch_size": 64}, "precision": "bf16",
    },
    "paper": {
        "mask": {"kind": "lottery_ticket", "sparsity": 0.9, "prune": 0.2, "rewind": "0ba"},
        "tweaks": tweaks(180, 1e-3, 0.1), "model": "cifar/resnet18", "trainer": "torch", **_STEPS,
        "data": {"name": "cifar100", "batch_size": 128},
    },
}  # fmt: skip
#: What the second paper trains: CIFAR-10, and its methods; smaller, the usual networks without tweaks.
STRUCTURES: dict[str, Row] = {
    "smoke": {"tweaks": []}, "cpu": {"tweaks": []}, "paper": {"tweaks": [], "data": {"name": "cifar10", "batch_size": 128}},
}  # fmt: skip
#: The two papers, and what is said of a figure without numbers.
TOST, GELDER, CURVES = "Jaiswal et al., ICML 2022", "Van Gelder et al., 2020", "; curves only, so compare directions."
#: The tweaks that are gone at the end, and a time beyond the end of any run.
GHOSTS, NEVER = ("ghost_skip", "soft_activation"), "1000000000ba"
SEEDS: dict[str, int] = {"smoke": 1, "cpu": 3, "paper": 3}
