"""Layer shares borrowed from another method's mask: as many weights in each layer, at places of one's own."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field

from tost_plugins.errors import TostError, unknown
from tost_plugins.masks.allocation import Counts
from tost_plugins.masks.base import Allocation, Moving, OnCollapse, checked_allocation
from tost_plugins.training.task import Task

#: Every method by its kind: `masks/methods` puts them here, since its files, which it imports, may not import it.
METHODS: dict[str, type] = {}

_LIKE = "like:"


def _made(allocation: str, sparsity: float) -> Any:
    """The method after `like:`, with its defaults; raises ValueError where it does not find a mask of a sparsity at once."""
    kind = allocation.removeprefix(_LIKE)
    if kind not in METHODS:
        raise unknown("like", "mask method", kind, _one_shot())
    if kind not in _one_shot():
        raise ValueError(
            f"expected a method that finds a mask of a given sparsity at once, got {allocation!r}; known: "
            f"{', '.join(_one_shot())}"
        )
    return METHODS[kind](sparsity=sparsity)


def _one_shot() -> list[str]:
    """The methods that share weights out as they find best, with a sparsity and nothing else to be told."""
    return [kind for kind, method in METHODS.items() if _shares(method)]


def _shares(method: type) -> bool:
    fields = getattr(method, "__dataclass_fields__", {})
    if not {"sparsity", "allocation"} <= fields.keys() or "rewind" in fields:  # those with rounds of training
        return False
    try:
        return not isinstance(method(sparsity=0.5), Moving)
    except TostError:
        return False


def _check(allocation: object) -> object:
    if isinstance(allocation, str) and allocation.startswith(_LIKE):
        _made(allocation, 0.5)
        return allocation
    return checked_allocation(allocation, [f"{_LIKE}KIND"])


#: The allocations of masks that are drawn: the usual ones, and `like:KIND`, the layer shares of the mask of that kind.
Shares = Annotated[Allocation | Annotated[str, Field(pattern=f"^{_LIKE}")], BeforeValidator(_check)]


def shares(
    allocation: Shares, sparsity: float, on_collapse: OnCollapse, task: Task, generator: torch.Generator
) -> Allocation | Counts:
    """The allocation itself, or for `like:KIND` the counts of each layer in the mask of that kind, found with the seed of
    `generator`, whose state stays. Raises TostError where that method does.

    Paper: Liu et al., The Unreasonable Effectiveness of Random Pruning, ICLR 2022.
    Differs from the paper: the counts are exact instead of expected ones.

    Example:
        >>> from tost_plugins.masks import MASKS
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> net[0].weight.data, net[1].weight.data = torch.full((2, 2), 3.0), torch.tensor([[4.0, 1], [1, 1]])
        >>> shares("like:magnitude", 0.375, "error", Task.of(net), torch.Generator())
        {'0.weight': 4, '1.weight': 1}
    """
    if not isinstance(allocation, str) or not allocation.startswith(_LIKE):
        return allocation  # type: ignore[return-value]
    method = _made(allocation, sparsity)
    if hasattr(method, "on_collapse"):
        method = type(method)(sparsity=sparsity, on_collapse=on_collapse)
    try:
        mask = method.start(task, torch.Generator().manual_seed(generator.initial_seed()))
    except TostError as error:
        raise error.at(f"allocation {allocation}") from None
    return Counts({name: int(keep.sum()) for name, keep in mask.fit(task.params).items()})
