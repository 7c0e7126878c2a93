"""What a mask method is, and the fields that several of them share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from pydantic import AfterValidator, ConfigDict, Field
from torch import Tensor

from tost_plugins.masks.mask import Mask
from tost_plugins.training.clock import Clock
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
    float, AfterValidator(_check_sparsity), Field(json_schema_extra={"minimum": 0, "exclusiveMaximum": 1})
]

#: How the kept weights are shared out: over all layers at once, evenly, by Erdos-Renyi (kernel) rules, each with a plus that
#: spares ends of the network, or a map glob -> sparsity of those layers (the rest share what is left, evenly).
Allocation = Literal["global", "uniform", "uniform_plus", "er", "erk", "erk_plus"] | dict[str, Sparsity]

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
