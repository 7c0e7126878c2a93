"""What a training step needs in memory, and mask files and exported networks in bytes."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from interleave import Ratio, Row, alone, peak, resident
from safetensors.torch import save_file
from step import RECIPES, Case, contender

from tost_plugins import Session
from tost_plugins.lab import models
from tost_plugins.lab.export import export

TITLE = "Memory and files"
ABOUT = """
The most memory that a process has in use during its third training step, above what it had before there was a network: weights,
gradients, momentum, masks and activations. For files: "n/8 bytes" is a bit for each of the n weights, "log2 C(n, k) bits" the
least that tells the k kept ones from all choices of k; an exported network is compared with its kept values and the rest of its
state dict plus a bit for each weight. It is written dense, so that it loads into the plain network: that is what the ratio says.
"""

NAMES = ("untouched again", *(name for name in RECIPES if name in ("static", "all tweaks", "after the ghosts", "rigl", "dnw")),
         "prune", "parametrize")  # fmt: skip
RATIOS = [
    *(Ratio(f"step: {name}", name, "untouched", unit="B") for name in NAMES),
    Ratio("mask file, to n/8 bytes", "mask file", "n/8 bytes", unit="B"),
    Ratio("mask file, to log2 C(n, k) bits", "mask file", "log2 C(n, k) bits", unit="B"),
    Ratio("exported network, to kept values and a bit per weight", "exported network", "kept values", unit="B"),
    Ratio("exported network, to the untouched one's", "exported network", "untouched network", unit="B"),
]


def measure(small: bool) -> Iterator[Row]:
    """The rows of all networks."""
    cases = (
        [("cifar/resnet8", 8, 16)] if small else [(f"torchvision/{n}", 32, 32) for n in ("resnet18", "mobilenet_v2")]
    )
    for model, batch, size in cases:
        for name in ("untouched", *NAMES):
            found = alone("memory.py", name, model, str(batch), str(size))
            yield Row(str(Case(model, batch, size)), name, 0, found["bytes"], "B")
        for name, count in _files(model).items():
            yield Row(model.rpartition("/")[2], name, 0, count, "B")


def _files(name: str) -> dict[str, float]:
    """Sizes, and what is in them."""
    torch.manual_seed(0)
    model = models.build(name, 10)
    session = Session(model, RECIPES["static"]).attach()
    session.start(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=1)
    mask = session.mask
    n, k = mask.size, mask.kept
    rest = sum(value.numel() * value.element_size() for value in models.build(name, 10).state_dict().values()) - 4 * n
    choices = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
    with tempfile.TemporaryDirectory() as folder:
        names = ("mask file", "exported network", "untouched network")
        paths = {what: Path(folder) / f"{i}.safetensors" for i, what in enumerate(names)}
        mask.save(paths["mask file"])
        torch.save(model.state_dict(), Path(folder) / "checkpoint.pt")
        export(Path(folder) / "checkpoint.pt", paths["exported network"])
        save_file(models.build(name, 10).state_dict(), str(paths["untouched network"]))
        sizes = {what: os.path.getsize(path) for what, path in paths.items()}
    return {**sizes, "n/8 bytes": n / 8, "log2 C(n, k) bits": choices / 8, "kept values": 4 * k + rest + n / 8}


def _step(name: str, model: str, batch: str, size: str) -> None:
    before = resident()
    with ExitStack() as stack:
        step = contender(name.removesuffix(" again"), Case(model, int(batch), int(size)), stack)
        step()
        step()
        resident()
        step()
        print(json.dumps({"bytes": peak() - before}))
        stack.pop_all()


if __name__ == "__main__":
    _step(*sys.argv[1:])
