"""Where channels lie after a function that moves numbers: a view, a permutation, a concatenation, an index.

It is done once with the classes of channels as numbers, and twice with some of them left out: the results show where each has
gone, and whether the function counts on how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from tost_plugins.channels.atoms import Ids
from tost_plugins.masks.paths.follow import Call, Constant, Value


@dataclass(frozen=True)
class Channels:
    """The dimension of a tensor along which its channels lie, from the front, and the class of each place there."""

    axis: int
    ids: Ids


def moved(call: Call, known: Mapping[Value, Channels]) -> list[Channels] | None:
    """The channels of each result; None where they do not lie along one dimension, or the function counts them."""
    whole = _done(call, {value: _spread(value, channels) for value, channels in known.items()})
    if whole is None or len(whole) != len(call.outs):
        return None
    results = []
    for part in whole:
        axis = _axis_of(part)
        if axis is None:
            return None
        results.append(Channels(axis, part.movedim(axis, 0).unsqueeze(-1).flatten(1)[:, 0].numpy().astype(np.int64)))
    everything = np.unique(np.concatenate([channels.ids for channels in known.values()]))
    for left_out in (everything[:1], everything[1::2]):
        parts = _done(call, {value: _spread(value, channels, left_out) for value, channels in known.items()})
        if parts is None or len(parts) != len(whole):
            return None
        for part, full, channels in zip(parts, whole, results, strict=True):
            stay = torch.from_numpy(np.flatnonzero(~np.isin(channels.ids, left_out)))
            if not torch.equal(part, full.index_select(channels.axis, stay)):
                return None
    return results


def _done(call: Call, values: Mapping[Value, Tensor]) -> list[Tensor] | None:
    """What the function returns with these in the place of its arguments; None where it takes no such ones."""

    def inside(part: Any) -> Any:
        return values[part] if isinstance(part, Value) else part

    if any(isinstance(part, Constant) for part in tree_flatten((call.args, call.kwargs))[0]) or call.function is None:
        return None
    try:
        args, kwargs = (tree_map(inside, part) for part in (call.args, call.kwargs))
        out = call.function(*args, **kwargs)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None
    return [part for part in tree_flatten(out)[0] if isinstance(part, Tensor)]


def _spread(value: Value, channels: Channels, left_out: np.ndarray | None = None) -> Tensor:
    """A tensor of the value's shape in which every number is the class of its channel, less some channels."""
    ids = channels.ids if left_out is None else channels.ids[~np.isin(channels.ids, left_out)]
    sides, shape = [1] * len(value.shape), list(value.shape)
    sides[channels.axis] = shape[channels.axis] = len(ids)
    return torch.from_numpy(ids.astype(np.float64)).reshape(sides).expand(shape).contiguous()


def _axis_of(part: Tensor) -> int | None:
    """The one dimension along which classes differ; None where they differ along several, or along none."""
    differ = [d for d in range(part.ndim) if part.shape[d] > 1 and bool((part != part.narrow(d, 0, 1)).any())]
    return differ[0] if len(differ) == 1 else None
