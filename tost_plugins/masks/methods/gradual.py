"""A mask that grows with the training: gradual magnitude pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from tost_plugins.masks.base import STRICT, Allocation, OnCollapse, Sparsity
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.scoring import wide
from tost_plugins.masks.topk import choose, count_true, counts, dense_layers, split, tell, top_mask
from tost_plugins.training.clock import Clock, Time, TimeField
from tost_plugins.training.schedules import cubic
from tost_plugins.training.task import Task


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Gradual:
    """Removes the smallest weights step by step: sparsity rises on a cubic curve, fast first, then slow.

    Fields: `sparsity`, the one at the end, in [0, 1); `initial`, the one before, 0 (dense) to `sparsity`; `begin` and
    `until`, when it starts and stops to rise; `every`, the time between two cuts (one more is made at `until`);
    `allocation`, how the kept weights are shared out each time; "uniform" prunes all layers alike, "global" compares
    them, a map says where layers end, and on the way each is as far as the whole network; `ignore`, globs of layers to
    leave alone; `on_collapse`, for a layer that loses everything. Removed weights stay removed. Each cut follows a step's
    weight update. For `initial` above 0 the training starts at it.

    Paper: Zhu and Gupta, To prune, or not to prune, ICLR 2018 workshop.
    Differs from the paper: nothing removed comes back, where its code lets weights grow again between cuts; "erk" shares
    by default, where the paper's are "uniform" (docs/methods.md compares them).

    Example:
        >>> layer, half = Gradual(sparsity=0.8, until="100ba", every="10ba"), Clock(step=50)
        >>> round(layer.sparsity_at(half), 3), layer.due(half), layer.due(Clock(step=55))
        (0.7, True, False)
    """

    takes_step: ClassVar[bool] = False
    hides: ClassVar[bool] = False

    kind: Literal["gradual"] = "gradual"
    sparsity: Sparsity
    initial: Sparsity = 0.0
    allocation: Allocation = "erk"
    ignore: tuple[str, ...] = ()
    on_collapse: OnCollapse = "error"
    begin: TimeField = Time(0, "ba")
    until: TimeField = Time(0.5, "dur")
    every: TimeField = Time(100, "ba")

    @model_validator(mode="after")
    def _rises(self) -> Gradual:
        if self.initial > self.sparsity:
            raise ValueError(
                f"expected initial of at most sparsity, {self.sparsity}, got {self.initial!r}; lower initial"
            )
        if self.begin.unit == self.until.unit and self.begin.value > self.until.value:
            raise ValueError(f"expected begin before until, {self.until}, got {self.begin}; begin earlier")
        return self

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """The mask at `initial`: the smallest weights of the untrained network are gone.

        Raises TostError also where the allocation cannot give the final sparsity.
        """
        counts(task.params, self.sparsity, self.allocation)
        return top_mask(
            {n: p.detach().abs() for n, p in task.params.items()},
            self.initial,
            self._allocation_at(self.initial),
            self.on_collapse,
        )

    def _allocation_at(self, sparsity: float) -> Allocation:
        """A map is that of the end: layers get there in step."""
        if not isinstance(self.allocation, dict) or not self.sparsity:
            return self.allocation
        return {glob: share * sparsity / self.sparsity for glob, share in self.allocation.items()}

    def due(self, clock: Clock) -> bool:
        """At `begin`, every `every` from there, and at `until`; at the start only if that is `until` already."""
        since, until = clock.step - self.begin.steps(clock), self.until.steps(clock)
        regular = since >= 0 and since % max(1, self.every.steps(clock)) == 0
        return clock.step == until or (0 < clock.step < until and regular)

    def settled(self, clock: Clock) -> bool:
        """From `until` on."""
        return clock.step >= self.until.steps(clock)

    def sparsity_at(self, clock: Clock) -> float:
        """The sparsity that is wanted at this moment."""
        begin, until = self.begin.steps(clock), self.until.steps(clock)
        progress = 1.0 if clock.step >= until else max(0, clock.step - begin) / max(1, until - begin)
        return cubic(self.initial, self.sparsity)(progress)

    def update(
        self,
        mask: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        clock: Clock,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The largest of the weights that are left; removed ones rank below all others, even below zeros."""
        scores = {name: wide(weights[name].detach()).abs().masked_fill(~kept, -1) for name, kept in mask.items()}
        sparsity = self.sparsity_at(clock)
        count = counts(scores, sparsity, self._allocation_at(sparsity))
        have = {name: int(count_true(kept)) for name, kept in mask.items()}
        count = min(count, sum(have.values())) if isinstance(count, int) else _at_most(count, have)
        flat = torch.cat([score.flatten() for score in scores.values()])
        kept, lost = choose(scores, flat, count, self.on_collapse, dense_layers(scores, count))
        tell(lost)
        return split(kept, scores)


def _at_most(count: dict[str, int], have: dict[str, int]) -> dict[str, int]:
    """The counts, in none more than a layer has: as shares fall, rounding may give a layer one more than before.

    What that leaves over goes to the first layers that can give more, so the sum is the same.
    """
    fitting = {name: min(wanted, have[name]) for name, wanted in count.items()}
    for name in fitting:
        rest = sum(count.values()) - sum(fitting.values())
        fitting[name] += min(rest, have[name] - fitting[name])
    return fitting
