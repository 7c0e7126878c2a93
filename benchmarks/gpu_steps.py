"""A training step on a GPU: dense, under a mask, compact and with the tweaks, eager and compiled."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from interleave import Contender, Ratio, Row, timed
from step import tweaks
from torch.nn.utils import prune

from tost_plugins import Mask, Session, masks
from tost_plugins.lab import models
from tost_plugins.session import compaction
from tost_plugins.training.params import prunable

ABOUT = """
SGD with momentum on random images. "static": SynFlow's mask of 98 %; "compact" the same with `compact: true`, which on a GPU
fills its counts of channels up to multiples of 8, and "counts as they come" without that; "all tweaks": ghost skips and soft
activations at work, and label smoothing; "after the ghosts": the same recipe when its schedules have ended; "over a run": a
tenth of its steps with all tweaks, nine tenths after. "prune" is `torch.nn.utils.prune` with that mask. Each compiled contender
is a network of its own that goes through `torch.compile` after the session is attached. float32 is as PyTorch comes:
convolutions in TF32. "waits": how often the CPU waits for the GPU; PyTorch counts them.

Why there are misses, as far as it was looked for. A static mask: the look for NaN and infinity before the step waits for the
backward pass (`torch.nn.utils.prune` does not look), and the GPU has nothing to do until the optimizer has launched the next
kernels. Compact: 0.41 of the forward pass's operations are left, but 0.86 of its maps (SynFlow takes channels inside the late
blocks, and few of the wide maps), and on this card it is the maps, through norms and activations, that take the time; slicing
the weights is a launch of its own for each. All tweaks: in this run the soft activations multiplied bfloat16 by a float32
tensor, for which PyTorch has no vectorized kernel; they multiply by a number since, and that has not been on a GPU. At 64 images
the CPU, which launches the kernels, sets the time, and every launch counts.
"""
SPARSITY = 0.98
_AS_THEY_COME = "compact, counts as they come"
RECIPES: dict[str, dict[str, Any]] = {
    "static": {},
    "compact": {"compact": True},
    _AS_THEY_COME: {"compact": True},
    "all tweaks": {"tweaks": tweaks("1dur")},
    "after the ghosts": {"tweaks": tweaks("1ba")},
}
CONTENDERS = ("dense", "dense again", *RECIPES, "prune")
RATIOS = [
    Ratio("dense again", "dense again", "dense"),
    Ratio("static", "static", "dense", most=1.01),
    Ratio("compact", "compact", "dense", most=0.6),
    Ratio(_AS_THEY_COME, _AS_THEY_COME, "dense"),
    Ratio("all tweaks", "all tweaks", "dense", most=1.25),
    Ratio("over a run", "all tweaks", "dense", most=1.03, share=0.1, rest="after the ghosts"),
    Ratio("prune", "prune", "dense"),
    Ratio("peak memory of a compact step", "memory, compact", "memory, dense", unit="B"),
    Ratio("peak memory of a static step", "memory, static", "memory, dense", unit="B"),
    *(Ratio(f"waits for the device in a step: {name}", f"waits, {name}", unit="") for name in ("static", "compact")),
]


@dataclass(frozen=True)
class Case:
    """A network, its batch, and how its steps are computed."""

    model: str
    batch: int
    size: int
    precision: str
    compiled: bool
    only: tuple[str, ...] = CONTENDERS

    def __str__(self) -> str:
        how = f"{self.precision}, {'compiled' if self.compiled else 'eager'}"
        return f"{self.model.rpartition('/')[2]}, {self.batch} images of {self.size} px, {how}"


_FEW = ("dense", "static", "compact")  # compilation takes most of the time
CASES = [
    Case("torchvision/resnet50", 256, 224, "bf16", False),
    Case("torchvision/resnet50", 256, 224, "float32", False),
    Case("torchvision/resnet50", 64, 224, "bf16", False),
    Case("torchvision/resnet50", 256, 224, "bf16", True, _FEW),
    Case("torchvision/resnet50", 256, 224, "float32", True, _FEW),
]
SMALL = [Case("cifar/resnet8", 8, 16, "bf16", False), Case("cifar/resnet8", 8, 16, "float32", False)]


def steps(device: torch.device, small: bool, until: float) -> Iterator[Row]:
    """The rows of one case after another, while there is time."""
    for case in SMALL if small else CASES:
        if time.monotonic() > until:
            print(f"no time was left for {case}", flush=True)
            continue
        began, mask = time.monotonic(), _mask(case.model, case.size, device)
        with ExitStack() as stack:
            made = {name: _step(name, case, mask, device, stack) for name in case.only}
            for name, step in made.items():
                yield from _first(case, name, step, device)
            print(f"{case}: ready after {time.monotonic() - began:.0f} s", flush=True)
            contenders = {name: _several(step, 2 if small else 4, device) for name, step in made.items()}
            yield from timed(str(case), contenders, 3 if small else 7, warm_up=1)
            stack.pop_all()  # the runs are not finished: leave without a word
        torch.compiler.reset()


@functools.cache
def _mask(model: str, size: int, device: torch.device) -> Mask:
    torch.manual_seed(0)
    return masks.find(models.build(model, 10).to(device), "synflow", SPARSITY, input_shape=(3, size, size))


def _step(name: str, case: Case, mask: Mask, device: torch.device, stack: ExitStack) -> Callable[[], None]:
    """A function that takes one training step."""
    torch.manual_seed(0)
    model = models.build(case.model, 10).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    images = torch.randn(case.batch, 3, case.size, case.size, device=device)
    images, labels = (
        images.contiguous(memory_format=torch.channels_last),
        torch.randint(10, (case.batch,), device=device),
    )
    loss_fn: Callable[..., torch.Tensor] = F.cross_entropy
    if name == "prune":
        modules = dict(model.named_modules())
        for weight in prunable(model):
            prune.custom_from_mask(modules[weight.removesuffix(".weight")], "weight", mask[weight].float().to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    if name in RECIPES:
        spec = {"mask": {"kind": "random", "sparsity": SPARSITY}, **RECIPES[name]}
        session = Session(model, spec, mask).attach()
        loss_fn = session.criterion(loss_fn)
        together = {} if name == _AS_THEY_COME else compaction.TOGETHER
        with mock.patch.object(compaction, "TOGETHER", together):
            stack.enter_context(session.drive(optimizer, [(images[:2], labels[:2])], total_steps=10**9))
    forward = torch.compile(model) if case.compiled else model
    half = case.precision == "bf16"

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = loss_fn(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _first(case: Case, name: str, step: Callable[[], None], device: torch.device) -> Iterator[Row]:
    """The first steps, compilation and all; on a GPU, the most memory that one adds, and how often the CPU waits for the GPU."""
    for _ in range(2):
        step()
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        yield Row(str(case), f"memory, {name}", 0, torch.cuda.max_memory_allocated() - before, "B")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            step()
            torch.cuda.set_sync_debug_mode("default")
        yield Row(str(case), f"waits, {name}", 0, sum("synchroniz" in str(wait.message) for wait in waits), "")


def _several(step: Callable[[], None], count: int, device: torch.device) -> Contender:
    """The seconds of a step, in the mean over some."""

    def contender() -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            step()
        _wait(device)
        return (time.perf_counter() - start) / count

    return contender
