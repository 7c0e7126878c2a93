"""Finding a mask, and the rescaled initialisation, in units of a forward and backward pass and of a plain restatement."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator

import plain
import torch
import torch.nn.functional as F
from interleave import Ratio, Row, alone, peak, resident, timed
from torch import nn

from tost_plugins import masks
from tost_plugins.lab import models
from tost_plugins.training.task import Task
from tost_plugins.tweaks.rescaled_init import rescale

TITLE = "Finding a mask, and the rescaled initialisation"
ABOUT = """
"plain" is the formula of the paper and nothing else (`benchmarks/plain.py`): it checks nothing, and uses the model up. The pass
is one forward and backward of the same batch: 100 images of 32 px for SNIP and GraSP, else 40. SynFlow is timed with 4 rounds,
and once with its 100; the rescaled initialisation with 1 of its 180 iterations, of which each is as long as another. Memory is
the most that a fresh process uses above what it had with network and batch in place.
"""

METHODS = ("snip", "grasp", "synflow", "rescaled_init")
RATIOS = [
    Ratio("time, in passes", "ours", "pass"),
    Ratio("plain: time, in passes", "plain", "pass"),
    Ratio("time, to the plain one's", "ours", "plain", most=1.3),
    Ratio("memory, in passes", "ours", "pass", unit="B"),
    Ratio("plain: memory, in passes", "plain", "pass", unit="B"),
    Ratio("memory, to the plain one's", "ours", "plain", most=1.3, unit="B"),
]
_DENSITY, _SHAPE, _ITERATIONS, _PER_CLASS = 0.1, (3, 32, 32), 1, 10


def measure(small: bool) -> Iterator[Row]:
    """The rows of all methods and networks: times in turn, then memory in processes of their own."""
    names, count = (["cifar/resnet8"], 2) if small else (["torchvision/resnet18", "torchvision/resnet50"], 15)
    for name, method in itertools.product(names, METHODS):
        short = name.rpartition("/")[2]
        contenders = {who: contender(who, method, name, 4) for who in ("pass", "plain", "ours")}
        yield from timed(
            f"{short}, {method}" + (" (4 rounds)" if method == "synflow" else ""), contenders, count, warm_up=1
        )
        case = f"{short}, {method}" + (" (100 rounds)" if method == "synflow" else "")
        for who in ("pass", "plain", "ours"):
            found = alone("finding.py", who, method, name, "4" if small else "100")
            yield Row(case, who, 0, found["bytes"], "B")
            if method == "synflow":
                yield Row(case, who, 0, found["seconds"], "s")


def contender(who: str, method: str, name: str, rounds: int) -> Callable[[], None]:
    """A function that finds what the method finds, once, on a network of its own."""
    torch.manual_seed(0)
    model = models.build(name, 10).train()
    count = 10 * _PER_CLASS if method in ("snip", "grasp") else 40
    batch = torch.randn(count, *_SHAPE), torch.arange(count) % 10
    if who == "pass":
        return lambda: _drop(plain.forward_backward(model, batch))
    if who == "ours":
        return lambda: _drop(ours(method, model, batch, rounds))
    return lambda: _drop(restated(method, model, batch, rounds))


def ours(method: str, model: nn.Module, batch: plain.Batch, rounds: int) -> object:
    """By the library."""
    if method == "rescaled_init":
        task = Task.of(model, batches=[batch], loss_fn=F.cross_entropy)
        return rescale(task, _mask(model), iterations=_ITERATIONS)
    options = {"snip": {}, "grasp": {"per_class": _PER_CLASS}, "synflow": {"rounds": rounds}}[method]
    return masks.find(model, method, 1 - _DENSITY, [batch], F.cross_entropy, on_collapse="keep_one", **options)


def restated(method: str, model: nn.Module, batch: plain.Batch, rounds: int) -> object:
    """By the formula."""
    if method == "synflow":
        return plain.synflow(model, _SHAPE, _DENSITY, rounds)
    if method == "rescaled_init":
        return plain.rescaled_init(model, itertools.repeat(batch), _mask(model), _ITERATIONS)
    return plain.highest({"snip": plain.snip, "grasp": plain.grasp}[method](model, batch), _DENSITY)


def _mask(model: nn.Module) -> masks.Mask:
    return masks.find(model, "random", 1 - _DENSITY, allocation="erk", on_collapse="keep_one")


def _drop(found: object) -> None:
    """What is found is not kept."""


def _once(who: str, method: str, name: str, rounds: str) -> None:
    run, before = contender(who, method, name, int(rounds)), resident()
    start = time.perf_counter()
    run()
    print(json.dumps({"seconds": time.perf_counter() - start, "bytes": peak() - before}))


if __name__ == "__main__":
    _once(*sys.argv[1:])
