"""How the cost of a static mask grows: with parameters, layers, ranks and steps."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from interleave import Contender, Ratio, Row, alone, rounds, timed
from step import STATIC
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tost_plugins import Session
from tost_plugins.lab import models

TITLE = "Growth"
ABOUT = """
A training step with a static mask against that of the untouched network. Parameters: three equally wide linear layers, a batch of
256 rows; little but the weights is worked on, so the mask weighs more than in a convolutional network of as many parameters.
Layers: 3x3 convolutions of 8 channels with a norm and a shortcut each, on 16 images of 8 px: what a layer costs by itself. Ranks:
ResNet-18 at 32 px under DDP on gloo, a thread and 16 images each; ranks beyond the number of cores share them. Steps: a small
network at its 10th and its 2000th step; the cost must not change.
"""

RATIOS = [Ratio("untouched again", "untouched again", "untouched"), Ratio("static", "static", "untouched")]
_NAMES = ("untouched", "untouched again", "static")


def measure(small: bool) -> Iterator[Row]:
    """The rows of all four."""
    count = 2 if small else 15
    for width in (58,) if small else (180, 577, 1826, 5774):
        parts = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
        yield from _timed(f"{3 * width * width / 1e6:.2g} M parameters", nn.Sequential(*parts), (256, width), count)
    for depth in (10,) if small else (10, 50, 150, 500):
        yield from _timed(f"{depth} layers", _deep(depth), (16, 8, 8, 8), count)
    for ranks in (2,) if small else (1, 2, 4):
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
        model = "cifar/resnet8" if small else "torchvision/resnet18"
        found = alone("growth.py", model, str(count), launcher=launcher, OMP_NUM_THREADS="1")
        yield from (
            Row(f"{ranks} ranks", name, i, value, "s") for name in _NAMES for i, value in enumerate(found[name])
        )
    with ExitStack() as stack:
        contenders = {name: _contender(name, _deep(10), (16, 8, 8, 8), stack) for name in _NAMES}
        yield from timed("10th step", contenders, count, warm_up=9)
        for step in contenders.values():
            for _ in range(10 if small else 2000):
                step()
        yield from timed("2000th step", contenders, count)
        stack.pop_all()


def _timed(case: str, model: nn.Module, shape: tuple[int, ...], count: int) -> Iterator[Row]:
    with ExitStack() as stack:
        yield from timed(case, {name: _contender(name, model, shape, stack) for name in _NAMES}, count)
        stack.pop_all()  # the runs are not finished: leave without a word


class _Layer(nn.Module):
    """With a shortcut, without which hundreds of them would not train."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(x)))


def _deep(depth: int) -> nn.Sequential:
    return nn.Sequential(*[_Layer() for _ in range(depth)], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def _contender(name: str, model: nn.Module, shape: tuple[int, ...], stack: ExitStack, ranks: bool = False) -> Contender:
    """A function that takes a training step of a copy of the model, under DDP with `ranks`."""
    torch.manual_seed(0)
    network: Any = copy.deepcopy(model).train()
    inputs, labels = torch.randn(*shape), torch.randint(10, shape[:1])
    session = Session(network, {"mask": STATIC}).attach() if name == "static" else None
    wrapped = DistributedDataParallel(network) if ranks else network
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    if session is not None:
        stack.enter_context(session.drive(optimizer, total_steps=10**9))

    def step() -> None:
        loss = F.cross_entropy(wrapped(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _rank(model: str, count: str) -> None:
    """One of the ranks; the first prints the seconds of each round."""
    dist.init_process_group("gloo")
    with ExitStack() as stack:
        network = models.build(model, 10)
        contenders = {name: _contender(name, network, (16, 3, 32, 32), stack, ranks=True) for name in _NAMES}
        found = rounds(contenders, int(count))
        stack.pop_all()
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(*sys.argv[1:])
