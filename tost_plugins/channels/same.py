"""Whether two networks compute the same: in float64, on one batch and on random numbers in its shape."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from tost_plugins.masks.paths.connectivity import Paths
from tost_plugins.training.batches import walk
from tost_plugins.training.calling import call
from tost_plugins.training.params import clean_name, plain_modules
from tost_plugins.training.task import untouched

#: How far outputs of two networks may lie apart, as a share of the largest number: in float64, and in less.
CLOSE, CLOSE_IN_LESS = 1e-10, 1e-3

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Constants(NamedTuple):
    """A layer's input, channel by channel: a value, and whether it is the same in all samples and places."""

    values: Tensor
    same: np.ndarray


class Outputs:
    """What a network in eval mode says to two batches, and what others have to say to them. `exact` is a copy in float64, or
    the network itself where it does not run so."""

    def __init__(self, plain: nn.Module, example: Any) -> None:
        self.plain = plain
        self.batches = [example, _random(example)]
        self.own = [outputs(plain, batch) for batch in self.batches]
        try:
            self.exact = duplicate(plain).double()
            self.wanted = [outputs(self.exact, self._like(batch)) for batch in self.batches]
        except (RuntimeError, TypeError):  # it makes tensors of another type itself
            self.exact, self.wanted = plain, self.own

    def constants(self) -> dict[str, Constants]:
        """What goes into each layer, by the layer's path."""
        seen: dict[str, Constants] = {}

        def look(path: str, module: Any, args: tuple[Any, ...]) -> None:
            given = args[0]
            dim = given.ndim - 1 if isinstance(module, nn.Linear) else given.ndim - module.weight.ndim + 1
            flat = given.detach().movedim(dim, 0).unsqueeze(-1).flatten(1)
            same = (flat == flat[:, :1]).all(1).numpy(force=True)
            if path in seen:
                same &= seen[path].same & (seen[path].values == flat[:, 0]).numpy(force=True)
            seen[path] = Constants(flat[:, 0].clone(), same)

        handles = [
            module.register_forward_pre_hook(functools.partial(look, path))
            for path, module in by_path(self.exact).items()
            if isinstance(module, LAYERS)
        ]
        try:
            for batch in self.batches:
                outputs(self.exact, self._like(batch))
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def difference(self, exact: nn.Module, plain: nn.Module) -> float | None:
        """The largest difference of a network's outputs from these; None where its copy in float64 says something else, or
        where one of the two does not run."""
        try:
            found = [outputs(exact, self._like(batch)) for batch in self.batches]
            own = [outputs(plain, batch) for batch in self.batches]
        except (RuntimeError, ValueError, IndexError, TypeError):  # it counts on how many channels there are
            return None
        most = CLOSE if self.exact is not self.plain else CLOSE_IN_LESS
        if apart(found, self.wanted, most) is None:
            return None
        return apart(own, self.own, CLOSE_IN_LESS)

    def _like(self, batch: Any) -> Any:
        if self.exact is self.plain:
            return batch
        return walk(lambda part: part.double() if _is_float(part) else part, batch)


def said(paths: Paths, mask: Mapping[str, Tensor], wanted: list[Tensor] | None = None) -> list[Tensor] | None:
    """What a network says under a mask to the batch that it was followed on, in float64 if it can; None where that is not
    what is `wanted`, or where it does not run."""
    for dtype in (torch.float64, None):
        try:
            found = paths.outputs(mask, dtype)
        except Exception:  # the user's network may raise anything
            continue
        if wanted is not None and [part.dtype for part in found] == [part.dtype for part in wanted]:
            double = all(part.dtype is torch.float64 for part in found)
            return None if apart([found], [wanted], CLOSE if double else CLOSE_IN_LESS) is None else found
        if wanted is None:
            return found
    return None


def duplicate(net: nn.Module) -> Any:
    """A copy, without the history of tensors that a forward pass has put aside in attributes."""
    parts = [part for module in net.modules() for part in tree_flatten(vars(module))[0]]
    return copy.deepcopy(
        net, {id(part): part.detach() for part in parts if isinstance(part, Tensor) and not part.is_leaf}
    )


def by_path(net: nn.Module) -> dict[str, nn.Module]:
    """The modules of a network by their clean paths."""
    return {clean_name(path): module for path, module in plain_modules(net)}


def outputs(net: nn.Module, batch: Any) -> list[Tensor]:
    """A network's floating-point outputs on a batch."""
    with untouched(net, train=False), torch.no_grad():
        found = call(net, walk(lambda part: part.clone() if isinstance(part, Tensor) else part, batch))
    return [part.detach().clone() for part in _floats(found)]


def apart(found: list[list[Tensor]], wanted: list[list[Tensor]], most: float) -> float | None:
    """The largest difference; None for other shapes, and where it is more than this share of the largest number, or than types
    of few bits round off."""
    largest = 0.0
    for ours, theirs in zip(found, wanted, strict=True):
        if [part.shape for part in ours] != [part.shape for part in theirs]:
            return None
        for a, b in zip(ours, theirs, strict=True):
            apart = float((a - b).abs().max()) if a.numel() else 0.0
            share = max(most, 32 * torch.finfo(b.dtype).eps)
            if not apart <= share * max(float(b.abs().max()) if b.numel() else 0.0, 1e-30):
                return None
            largest = max(largest, apart)
    return largest


def _random(batch: Any) -> Any:
    """Random numbers, always the same, in the place of all floating-point ones."""
    generator = torch.Generator().manual_seed(0)

    def drawn(part: Any) -> Any:
        return torch.randn(part.shape, generator=generator).to(part) if _is_float(part) else part

    return walk(drawn, batch)


def _is_float(part: Any) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point()


def _floats(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if _is_float(tree):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _floats(part)
    elif hasattr(tree, "__dict__") and not isinstance(tree, (nn.Module, Tensor)):
        yield from _floats(list(vars(tree).values()))
