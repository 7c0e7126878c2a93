"""A mask that moves to where the momentum is, also from layer to layer: sparse networks from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from tost_plugins.masks.base import STRICT
from tost_plugins.masks.methods.set import Set
from tost_plugins.masks.scoring import wide
from tost_plugins.masks.topk import count_true, top_k
from tost_plugins.training.clock import Clock, Time, TimeField
from tost_plugins.training.numbers import NUMBER
from tost_plugins.training.schedules import cosine

_LAST = 0.005  # the share that moves at the end
_FULL = 0.99  # of a layer's weights: what others cannot take comes on top


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Snfs(Set):
    """Once an epoch each layer drops its smallest weights; as many grow where momentum is largest, also in other layers.

    Momentum is an average of the whole gradients, removed weights' included; the optimizer sees those of the kept ones only,
    and its own momentum is another. What all layers have dropped is shared out in proportion to the mean |momentum| of each
    layer's kept weights; a layer that is 0.99 full gets no more, and the others share the rest. In each layer those of
    the removed weights grow, also of those just dropped, whose |momentum| is largest. They, and what the optimizer keeps of
    them, start at 0. The count over all layers stays exact; those of the layers move. An update follows a step.

    Fields: as in `Set`, with other defaults: `drop`, the share of the first update, falls with half a cosine to 0.005 at
    `until`. `momentum` is the share of the average that stays at each step, from 0 (the last gradient alone) to below 1.

    Paper: Dettmers and Zettlemoyer, Sparse Networks from Scratch: Faster Training without Losing Performance, 2019.
    Differs from the paper: the average is not the optimizer's, so that any optimizer will do; "erk" shares at the start,
    where the paper's layers all have the same density.

    Example:
        >>> mask = {"w": torch.tensor([True, True, False, False]), "v": torch.tensor([True, True, False, False])}
        >>> weights = {name: torch.tensor([2.0, 1.0, 0.0, 0.0]) for name in mask}
        >>> momentum = {"w": torch.tensor([3.0, 0.0, 1.0, 2.0]), "v": torch.tensor([0.0, 0.0, 9.0, 9.0])}
        >>> new = Snfs(sparsity=0.5).update(mask, weights, momentum, Clock(0, 100), torch.Generator())
        >>> {name: kept.tolist() for name, kept in new.items()}
        {'w': [True, False, True, True], 'v': [True, False, False, False]}
    """

    takes_step: ClassVar[bool] = False

    kind: Literal["snfs"] = "snfs"  # type: ignore[assignment]
    every: TimeField = Time(1, "ep")
    until: TimeField = Time(1, "dur")
    drop: Annotated[float, Field(gt=0, le=1), NUMBER] = 0.5
    momentum: Annotated[float, Field(ge=0, lt=1), NUMBER] = 0.9

    @property
    def average_keeps(self) -> float:
        """The share of an average that stays at each step."""
        return self.momentum

    def update(
        self,
        mask: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        clock: Clock,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The next mask; `grads` are the averages."""
        share = cosine(self.drop, min(self.drop, _LAST))(clock.progress(self.until))
        pull = {name: wide(grads[name]).abs() for name in mask}
        mean = {name: float((pull[name] * kept).sum() / count_true(kept).clamp_min(1)) for name, kept in mask.items()}
        have = {name: int(count_true(kept)) for name, kept in mask.items()}
        left = {name: count - int(share * count) for name, count in have.items()}
        room = {name: kept.numel() - left[name] for name, kept in mask.items()}
        more = spread(
            sum(have.values()) - sum(left.values()),
            mean,
            {name: max(0, int(_FULL * kept.numel()) - left[name]) for name, kept in mask.items()},
        )
        rest = sum(have.values()) - sum(left.values()) - sum(more.values())  # where all are full
        over = spread(rest, mean, {name: room[name] - more[name] for name in mask})
        return {
            name: _move(kept, wide(weights[name].detach()).abs(), pull[name], left[name], more[name] + over[name])
            for name, kept in mask.items()
        }


def spread(total: int, pull: Mapping[str, float], room: Mapping[str, int]) -> dict[str, int]:
    """`total` in whole numbers that are in proportion to `pull`, none above its `room`: what one cannot take the others share.

    Of fractions the largest are rounded up, of equal ones the first. Where nothing pulls, `room` does. The sum is `total`, or
    that of `room` if it is less.

    Example:
        >>> spread(4, {"a": 3.0, "b": 1.0}, {"a": 9, "b": 9}), spread(4, {"a": 3.0, "b": 1.0}, {"a": 2, "b": 9})
        ({'a': 3, 'b': 1}, {'a': 2, 'b': 2})
    """
    given, free = dict.fromkeys(room, 0), [name for name, most in room.items() if most]
    while free:
        rest, pulls = total - sum(given.values()), {name: pull[name] for name in free}
        pulls = pulls if sum(pulls.values()) else {name: float(room[name]) for name in free}
        wanted = {name: rest * value / sum(pulls.values()) for name, value in pulls.items()}
        full = [name for name in free if wanted[name] >= room[name]]
        given |= {name: room[name] for name in full}
        if not full:
            given |= {name: int(value) for name, value in wanted.items()}
            rest = total - sum(given.values())
            for name in sorted(free, key=lambda name: int(wanted[name]) - wanted[name])[:rest]:
                given[name] += 1
            break
        free = [name for name in free if name not in full]
    return given


def _move(kept: Tensor, size: Tensor, pull: Tensor, stay: int, come: int) -> Tensor:
    """The `stay` largest of the kept weights, and as many others as `come`, those that are pulled most."""
    least = float("-inf")
    old = top_k(size.masked_fill(~kept, least).flatten(), stay)
    return (old | top_k(pull.flatten().masked_fill(old, least), come)).view(kept.shape)
