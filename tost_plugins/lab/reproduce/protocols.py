"""How long, and on what, a table is run: as published, in minutes on a GPU, or in hours on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tost_plugins.lab.studies.base import Row, Size
from tost_plugins.lab.studies.settings import tweaks


@dataclass(frozen=True)
class Protocol:
    """How long and on what a table is run: `changes` of its recipe, where `data` and `optimizer` only change what they
    name; `tweaks`, in place of the recipe's, for the tables that train with and without them; `masks`, options of mask
    methods; which masks and sparsities there are unless `--masks` and `--sparsities` say so; and the size of the
    studies that tables of single tweaks are."""

    about: str
    changes: Row = field(default_factory=dict)
    tweaks: list[Row] | None = None
    masks: Mapping[str, Row] = field(default_factory=dict)
    only_masks: tuple[str, ...] = ()
    only_sparsities: tuple[float, ...] = ()
    size: Size = "paper"


PROTOCOLS: dict[str, Protocol] = {
    "full": Protocol("as published: 182 epochs, batch 128, on all images (the shipped recipes)"),
    "short": Protocol(
        "a GPU in minutes: 20 epochs, batch 512, bf16, on all images",
        {
            "duration": "20ep", "precision": "bf16", "data": {"batch_size": 512}, "optimizer": {"lr": 0.2},
            "schedule": {"kind": "steps", "at": ["10ep", "15ep"], "factor": 0.1, "warmup": "1ep"},
        },
        masks={"lottery_ticket": {"prune": 0.632}},
    ),
    "cpu": Protocol(
        "a CPU in hours: ResNet-20 on 20,000 images of 16 px, 12 epochs, batch 64, bf16",
        {
            "model": "cifar/resnet20", "duration": "12ep", "precision": "bf16", "schedule": {"kind": "cosine"},
            "data": {"limit": 20_000, "validation": 500, "batch_size": 64, "image_size": 16},
        },
        tweaks=tweaks(60, 0.01),
        masks={"snip": {"batches": 2}, "lottery_ticket": {"prune": 0.632}},
        only_masks=("random", "snip", "synflow"), only_sparsities=(95, 98), size="cpu",
    ),
}  # fmt: skip
