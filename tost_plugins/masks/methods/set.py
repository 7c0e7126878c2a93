"""A mask that moves at random: Sparse Evolutionary Training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.masks.base import STRICT, OnCollapse, Sparsity
from tost_plugins.masks.like import Shares
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.methods.random import Random
from tost_plugins.masks.topk import count_true, drop_and_grow
from tost_plugins.training.clock import Clock, Time, TimeField
from tost_plugins.training.numbers import NUMBER
from tost_plugins.training.params import some
from tost_plugins.training.task import Task


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Set:
    """Now and then each layer drops its smallest weights and grows as many at random; every count stays exact.

    The first mask is random. An update takes the place of that step's weight update; grown weights, and what the
    optimizer keeps of them, start at 0. A weight just dropped may be drawn again; it then stays as it was.

    Fields: `sparsity` in [0, 1), 0 is dense; `every`, the time between updates, and `until`, when the mask stops
    moving; `drop`, the share of a layer's kept weights that move in the first update, above 0 (hardly any) to 1 (all),
    which falls with half a cosine to 0 at `until`, rounded down; `allocation`, how the kept weights are shared out at
    the start, and so for good, as in `Random`; `ignore`, globs of layers to leave alone; `on_collapse`, for a layer that loses
    everything at the start.

    Paper: Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
    network science, Nature Communications 2018.
    Differs from the paper: the smallest magnitudes go, not the least positive and the largest negative weights; the
    schedule is RigL's (Evci et al., ICML 2020), the paper has a constant share after every epoch; erk for er.

    Example:
        >>> layer, done = Set(sparsity=0.5, every="10ba"), Clock(step=10, total_steps=100)
        >>> mask, weight = torch.tensor([True] * 4 + [False] * 4), torch.tensor([4.0, 3, 2, 1, 0, 0, 0, 0])
        >>> new = layer.update({"w": mask}, {"w": weight}, {}, done, torch.Generator().manual_seed(0))["w"]
        >>> layer.due(done), int(new.sum()), new[:3].tolist()
        (True, 4, [True, True, True])
    """

    takes_step: ClassVar[bool] = True
    hides: ClassVar[bool] = False

    kind: Literal["set"] = "set"
    sparsity: Sparsity
    allocation: Shares = "erk"
    ignore: tuple[str, ...] = ()
    on_collapse: OnCollapse = "error"
    every: TimeField = Time(100, "ba")
    until: TimeField = Time(0.75, "dur")
    drop: Annotated[float, Field(gt=0, le=1), NUMBER] = 0.3

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """A random mask; raises TostError on a frozen layer, whose grown weights would stay 0."""
        frozen = [name.removesuffix(".weight") for name, param in task.params.items() if not param.requires_grad]
        if frozen:
            raise TostError(
                f"expected layers that get gradients, got frozen ones: {some(frozen)}; add them to `ignore`, or unfreeze them"
            )
        first = Random(sparsity=self.sparsity, allocation=self.allocation, on_collapse=self.on_collapse)
        return first.start(task, generator)

    def due(self, clock: Clock) -> bool:
        """At every multiple of `every` before `until`, not at the start."""
        return 0 < clock.step < self.until.steps(clock) and clock.step % max(1, self.every.steps(clock)) == 0

    def settled(self, clock: Clock) -> bool:
        """From `until` on."""
        return clock.step >= self.until.steps(clock)

    def update(
        self,
        mask: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        clock: Clock,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Each layer's mask after dropping and growing; layers without a weight to spare stay as they are."""
        share = self.drop * (1 + math.cos(math.pi * clock.progress(self.until))) / 2
        return {
            name: drop_and_grow(
                kept, weights[name].abs(), self.wishes(name, weights[name], grads, generator),
                int(share * int(count_true(kept))),
            )
            for name, kept in mask.items()
        }  # fmt: skip

    def wishes(self, name: str, weight: Tensor, grads: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """The higher, the sooner a weight grows."""
        return torch.rand(weight.shape, generator=generator).to(weight.device)
