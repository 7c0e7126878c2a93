"""What a mask method is, and the fields that several of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from torch import Tensor

from tost_plugins.errors import shown, unknown
from tost_plugins.masks.mask import Mask
from tost_plugins.training.clock import Clock
from tost_plugins.training.numbers import NUMBER
from tost_plugins.training.task import Task

#: How every method is declared: `@pydantic.dataclasses.dataclass(frozen=True, config=STRICT, kw_only=True)`.
STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)


def _check_sparsity(value: float) -> float:
    if not 0 <= value < 1:
        percent = f"; {value:g} % is written {value / 100:g}" if 1 < value < 100 else "; 0 is dense, 0.9 keeps 10 %"
        raise ValueError(f"expected a sparsity in [0, 1), got {value!r}{percent}")
    return value


#: Share of removed weights: 0 is dense, 0.9 keeps every tenth weight; 1 (no weights) is an error.
Sparsity = Annotated[
    float, AfterValidator(_check_sparsity), Field(json_schema_extra={"minimum": 0, "exclusiveMaximum": 1}), NUMBER
]

#: The rules that share weights out, by name.
RULES = ("global", "uniform", "uniform_plus", "er", "erk", "erk_plus")


def checked_allocation(value: object, more: Sequence[str] = ()) -> object:
    """The value itself; raises ValueError, with one reason where pydantic has one for each form that an allocation may have,
    unless it is a rule, or a map glob -> sparsity. `more` are other names that may be meant, to be offered."""
    if isinstance(value, str) and value not in RULES:
        raise ValueError(str(unknown("rule", "allocation", value, (*RULES, *more))))
    if isinstance(value, Mapping):
        for glob, share in value.items():
            if not isinstance(share, Real) or isinstance(share, bool):
                raise ValueError(
                    f"{glob}: expected a sparsity in [0, 1), got {shown(share)}; 0 is dense, 0.9 keeps 10 %"
                )
            try:
                _check_sparsity(float(share))
            except ValueError as error:
                raise ValueError(f"{glob}: {error}") from None
    elif not isinstance(value, str):
        raise ValueError(f"expected a rule's name or a map, got {shown(value)}; known: {', '.join((*RULES, *more))}")
    return value


#: How the kept weights are shared out: over all layers at once, evenly, by Erdos-Renyi (kernel) rules, each with a plus that
#: spares ends of the network, or a map glob -> sparsity of those layers (the rest share what is left, evenly).
Allocation = Annotated[
    Literal["global", "uniform", "uniform_plus", "er", "erk", "erk_plus"] | dict[str, Sparsity],
    BeforeValidator(checked_allocation),
]

#: What to do when layers lose all their weights: nothing while the others connect inputs and outputs, an error where they do
#: not; or to keep the best weight of such a layer and say so.
OnCollapse = Literal["error", "keep_one"]

#: Which weights the sparsity counts: all that are kept, or only those on a path from the inputs to the outputs.
Budget = Literal["kept", "live"]


class MaskMethod(Protocol):
    """A way to find a mask. Pure: it is given what it needs, and never keeps the model.

    `kind` is its name in recipes and in the registry; its fields are its hyper-parameters.
    """

    kind: Any
    ignore: tuple[str, ...]

    def start(self, task: Task, generator: torch.Generator) -> Mask:
        """The mask to train with; the same generator state gives the same mask."""
        ...


@runtime_checkable
class WithWeights(MaskMethod, Protocol):
    """A mask that comes with weights of its own, which a run starts with in place of the network's."""

    def starting_weights(self, task: Task, mask: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Name -> weight, none for layers that keep theirs; `mask` is what `start` gave from the same generator state."""
        ...


@runtime_checkable
class Moving(MaskMethod, Protocol):
    """A mask that changes while the network trains.

    `takes_step` says when: before the optimizer's step and instead of it (the dense gradients are given), or after
    the step (gradients are not looked at). `hides` says whether removed weights may go on training out of sight. Each
    layer's tensors may live on any device and come back there.
    """

    takes_step: ClassVar[bool]
    hides: ClassVar[bool]

    def due(self, clock: Clock) -> bool:
        """Whether the mask changes at this moment; `clock.step` counts the optimizer steps that are done."""
        ...

    def settled(self, clock: Clock) -> bool:
        """Whether the mask has come to its end, and stays as it is from here on."""
        ...

    def update(
        self,
        mask: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        clock: Clock,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The next mask, name -> bool tensor; `mask`, `weights` and `grads` are only read."""
        ...


@runtime_checkable
class Averaging(Moving, Protocol):
    """A mask that moves by averages of whole gradients, removed weights' included: `update` is given these for gradients.

    `average_keeps` is the share of an average that stays at each step.
    """

    @property
    def average_keeps(self) -> float:
        """From 0, the last gradient alone, to below 1."""
        ...


@runtime_checkable
class Exploring(Moving, Protocol):
    """A mask that hides weights of which only some train out of sight; the others keep their values there.

    `pulls` says how strongly weights are drawn to 0 by their gradients: kept ones, and those that train out of sight.
    """

    @property
    def pulls(self) -> tuple[float, float]:
        """(kept weights, those that train out of sight), 0 for not at all."""
        ...

    def trained(self, mask: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which weights train until the mask moves again, those of the mask among them; name -> bool tensor."""
        ...


@runtime_checkable
class Alternating(Moving, Protocol):
    """A mask that comes and goes, and so must not be left out when it comes."""

    def restarts(self, clock: Clock) -> bool:
        """Whether all weights go on without momentum after the move of this moment."""
        ...

    def instead(self, mask: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """What to take in place of this next mask, of which less than 0.9 lies on a path; None for that itself."""
        ...


@runtime_checkable
class Scored(Moving, Protocol):
    """A moving mask over weights that never train: it follows scores, one for each weight, which learn from the gradients.

    The session keeps the weights' values, the scores and their momenta; `update` is shown the scores as `weights`.
    """

    def prepare(self, weights: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> None:
        """Write into the weights what they are for the whole run, before anything looks at them."""
        ...

    def first_scores(self, weights: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The scores before the first step: those by which `start` chooses, of the same generator state."""
        ...

    def learn(self, scores: list[Tensor], speeds: list[Tensor], slopes: list[Tensor], clock: Clock) -> None:
        """A step of the scores along their gradients `slopes`; `scores` and their momenta `speeds` change in place."""
        ...
