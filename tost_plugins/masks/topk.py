"""Exactly so many of the highest scores: over all layers or in each, without a sort, and what happens to a layer that
would lose everything."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.masks.allocation import Counts, allocate, kept_count
from tost_plugins.masks.base import Allocation, OnCollapse
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.scoring import wide
from tost_plugins.training.finite import all_finite, not_finite
from tost_plugins.training.log import say
from tost_plugins.training.params import some
from tost_plugins.training.sharding import whole

_LONG = 1 << 17  # from here on `kthvalue` takes longer than looking at a sample first
_SAMPLE = 1 << 14
_APART = 1e-3  # of a value: how much wider than the sample shows it an edge is taken to be


def top_mask(
    scores: Mapping[str, Tensor],
    sparsity: float,
    allocation: Allocation | Counts = "global",
    on_collapse: OnCollapse = "error",
) -> Mask:
    """The mask that keeps the round((1 - sparsity) * N) weights with the highest scores.

    Over all layers for the allocation "global", within each layer's count for the others (see `allocate`).
    Ties go to the lower index, layers in their order, so the count is exact; a warning says where scores of 0 are decided
    so. A layer may lose every weight, unless `on_collapse` is "keep_one": then it keeps its best weight in place of the worst
    kept one elsewhere, and a warning says so. Raises TostError on a score that is not finite. Whether what stays connects the
    inputs with the outputs is looked at when the mask is found (`connected.check`).

    Example:
        >>> mask = top_mask({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0, 2.0])}, sparsity=0.5)
        >>> mask["a"].tolist(), mask["b"].tolist()
        ([True, False], [True, False])
    """
    flat = torch.cat([wide(tensor.detach()).reshape(-1) for tensor in scores.values()])
    count = counts(scores, sparsity, allocation)
    kept, lost = choose(scores, flat, count, on_collapse, dense_layers(scores, count))
    tell(lost)
    tell_ties(tied(flat, kept, count, scores))
    return Mask(split(kept, scores))


def counts(tensors: Mapping[str, Tensor], sparsity: float, allocation: Allocation | Counts) -> dict[str, int] | int:
    """How many weights stay: layer by layer, or one number over all layers for the allocation "global"."""
    shares = allocate(allocation, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, sparsity)
    if shares is None:
        return kept_count(sparsity, sum(tensor.numel() for tensor in tensors.values()))
    return shares


def check_finite(flat: Tensor, like: Mapping[str, Tensor]) -> None:
    """Raise TostError, with the layer, on a score that is not finite."""
    if not all_finite([flat]):
        name = not_finite(split(flat, like))[0]
        raise TostError(f"expected finite scores, got NaN or infinity in {name}; check the weights and the batches")


def dense_layers(tensors: Mapping[str, Tensor], count: Mapping[str, int] | int) -> list[str]:
    """The layers that an allocation leaves all their weights: "keep_one" takes none from them."""
    return [] if isinstance(count, int) else [name for name in tensors if count[name] == tensors[name].numel()]


def split(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A row with an entry per weight as views in the shapes of `like`, under its names."""
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {name: part.view(like[name].shape) for name, part in zip(like, parts, strict=True)}


def choose(
    like: Mapping[str, Tensor],
    flat: Tensor,
    count: Mapping[str, int] | int,
    on_collapse: OnCollapse,
    dense: Sequence[str] = (),
) -> tuple[Tensor, list[str]]:
    """What `top_mask` does, on a row of scores for the tensors `like`: True where a weight stays, and the layers
    which "keep_one" had to help, at the cost of others than the `dense` ones."""
    scores = split(flat, like)
    check_finite(flat, like)
    if isinstance(count, int):
        kept = top_k(flat, count)
    else:
        kept = torch.cat([top_k(score.flatten(), count[name]) for name, score in scores.items()])
    lost = empty(split(kept, like)) if on_collapse == "keep_one" else []
    return _keep_one(scores, flat, kept, dense) if lost else kept, lost


def drop_and_grow(kept: Tensor, size: Tensor, wish: Tensor, count: int) -> Tensor:
    """Remove `count` of the kept weights, those of the least `size`, and let in as many, those of the highest `wish`.

    Any shape, the same for all three. What was just removed may come back at once. Exactly as many stay as before;
    of equal sizes the lower index stays, of equal wishes it comes. `count` goes from 0 (nothing changes) to the number
    of kept weights (all are chosen anew).

    Example:
        >>> drop_and_grow(torch.tensor([True, True, False, False]), torch.tensor([0.1, 3.0, 0.0, 0.0]),
        ...               torch.tensor([0.5, 9.0, 0.2, 0.7]), count=1).tolist()
        [False, True, False, True]
    """
    inside, least = kept.flatten(), float("-inf")
    total = int(count_true(inside))
    stay = top_k(wide(size.flatten()).masked_fill(~inside, least), total - count)
    come = top_k(wide(wish.flatten()).masked_fill(stay, least), count)
    return (stay | come).view(kept.shape)


def revive(mask: Mask, weights: Mapping[str, Tensor], on_collapse: OnCollapse) -> Mask:
    """A mask that was found elsewhere; with "keep_one" a layer without weights keeps its largest."""
    lost = empty(mask) if on_collapse == "keep_one" else []
    tell(lost)
    sizes = {name: wide(whole(weights[name].detach())).abs() for name in lost}
    found = {name: top_k(size.flatten(), 1).view(size.shape) for name, size in sizes.items()}
    return Mask({**mask, **found}) if lost else mask


def tell(lost: Sequence[str]) -> None:
    """The warning that `on_collapse: keep_one` had to act; nothing without such layers."""
    if lost:
        say(
            f"mask: {len(lost)} layers would have lost all weights and keep one each "
            f"(on_collapse: keep_one): {some(lost, 20)}",
            logging.WARNING,
        )


def tied(flat: Tensor, kept: Tensor, count: Mapping[str, int] | int, like: Mapping[str, Tensor]) -> list[str]:
    """The layers of which some weights stay and others go though the scores of both are 0; over all layers for one count."""
    zero = flat == 0
    if not bool((staying := zero & kept).any()) or not bool((going := zero & ~kept).any()):
        return []
    if isinstance(count, int):
        return [name for name, part in split(zero, like).items() if bool(part.any())]
    stay, go = split(staying, like), split(going, like)
    return [name for name in like if bool(stay[name].any()) and bool(go[name].any())]


def tell_ties(names: Sequence[str]) -> None:
    """The warning that the order of the weights has decided; nothing without such layers."""
    if names:
        say(
            f"mask: scores of 0 say nothing about weights of {len(names)} layers, of which those with the lower index stay "
            f"({some(names, 6)}); set a higher sparsity or another mask method",
            logging.WARNING,
        )


def empty(masks: Mapping[str, Tensor]) -> list[str]:
    """The layers of which no weight is kept."""
    return [name for name, mask in masks.items() if mask.numel() and not bool(mask.any())]


def _keep_one(scores: Mapping[str, Tensor], flat: Tensor, kept: Tensor, dense: Sequence[str]) -> Tensor:
    """As many weights as `kept`, with the best of every layer, and all of the layers that are to be dense."""
    stay = {name: int(count_true(part)) for name, part in split(kept, scores).items()}
    more = {name: score.numel() if name in dense else min(score.numel(), 1) for name, score in scores.items()}
    if sum(stay.values()) < sum(more.values()):
        raise TostError(
            f"expected enough weights to keep one in every layer, got {sum(stay.values())} where {sum(more.values())} are "
            f"needed; set a lower sparsity"
        )
    # as many others go, those of the lowest scores
    missing = sum(max(more[name] - count, 0) for name, count in stay.items())
    safe = torch.zeros_like(kept)
    for name, part in split(safe, scores).items():
        if name in dense:
            part.fill_(True)
        elif more[name] and stay[name] <= missing:  # a layer with more cannot lose them all
            part.view(-1)[scores[name].argmax()] = True  # of equal ones the first
    free = kept.logical_and(~safe).nonzero().flatten()
    safe[free[top_k(flat[free], sum(stay.values()) - int(count_true(safe)))]] = True
    return safe


def top_k(flat: Tensor, count: int, before: Tensor | None = None) -> Tensor:
    """True for the `count` highest of a row of finite scores; of equal ones those with the lower index.

    `count` from 0 (none) to the row's length (all). `before`, True for the highest a moment ago, makes it faster.

    Example:
        >>> top_k(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2).tolist()
        [False, True, True, False]
    """
    if count <= 0 or count >= flat.numel():
        return torch.full_like(flat, count > 0, dtype=torch.bool)
    threshold = kth_lowest(flat, flat.numel() - count + 1, before)
    kept = flat >= threshold
    excess = int(count_true(kept)) - count
    if excess:
        kept[(flat == threshold).nonzero().flatten()[-excess:]] = False
    return kept


def kth_lowest(flat: Tensor, k: int, above: Tensor | None = None) -> Tensor:
    """The k-th lowest value of a row, k from 1 (the minimum) to its length (the maximum).

    In a long row a sample shows between which two values it must lie, and `kthvalue` looks at those between them only. That
    is several times as fast, and exact: the values outside are counted, and if the sample misled, another one is taken, and
    at last all are looked at. `above` is True for the values that were the k-th lowest or higher a moment ago: the sample's
    edge between them and the others tells far more than its ranks. A value that fills much of the row (0, say) may be the lower
    of the two, and is found by counting.
    """
    size = flat.numel()
    tries = [_edge] if above is not None and size >= _SAMPLE else []
    for bracket in tries + ([_bracket] if size >= _LONG else []):
        low, high = bracket(flat, k, above)
        over = flat > low
        skipped = size - int(count_true(over))
        if skipped < k:
            inside = _where(flat, over.logical_and_(flat <= high))
            if k <= skipped + inside.numel():
                return inside.kthvalue(k - skipped).values
        elif int(count_true(flat < low)) < k:
            return low
    return flat.kthvalue(k).values


def _where(flat: Tensor, mask: Tensor) -> Tensor:
    """`flat[mask]` for a mask with few True: on a CPU eight of its entries are looked at as one number."""
    if not mask.is_cpu or mask.numel() % 8 or mask.storage_offset() % 8:
        return flat[mask]
    rows = mask.view(torch.uint8).view(torch.int64).nonzero().flatten()
    return flat.view(-1, 8)[rows][mask.view(-1, 8)[rows]]


def _stride(flat: Tensor) -> int:
    """How far apart a sample's values lie: in step with no kernel of 2 or 3, nor with the channels, which come in powers of 2
    (one that was missed most of SynFlow's edges by a little, so that all 11 million values were looked at)."""
    return next(step for step in range(flat.numel() // _SAMPLE, 0, -1) if math.gcd(step, 6) == 1)


def _edge(flat: Tensor, k: int, above: Any) -> tuple[Tensor, Tensor]:
    """Two values of the row, a little apart, between which those that were above meet the others."""
    stride = _stride(flat)
    sample = flat[::stride].contiguous()
    over = above[::stride]
    ends = torch.stack([sample.masked_fill(~over, math.inf).min(), sample.masked_fill(over, -math.inf).max()])
    return ends.min() * (1 - _APART), ends.max() * (1 + _APART)


def _bracket(flat: Tensor, k: int, above: Any) -> tuple[Tensor, Tensor]:
    """Two values of the row between which its k-th lowest almost certainly lies (above the first, up to the
    second)."""
    sample = flat[:: _stride(flat)].contiguous()
    place, slack = k * sample.numel() / flat.numel(), 2 * math.sqrt(sample.numel())  # 4 standard deviations
    low, high = round(place - slack), round(place + slack)
    return (
        sample.kthvalue(low).values if low >= 1 else sample.new_tensor(-math.inf),
        sample.kthvalue(high).values if high <= sample.numel() else sample.new_tensor(math.inf),
    )


def count_true(mask: Tensor) -> Tensor:
    """How many entries are True, int64 and 0-dim; on a CPU several times as fast as `count_nonzero`.

    Eight bytes are added as one number, 128 times, which no byte overflows at; then bytes are added.

    Example:
        >>> int(count_true(torch.tensor([True, False, True])))
        2
    """
    if not mask.is_cpu or not mask.is_contiguous() or mask.numel() < 1 << 14:
        return mask.count_nonzero()
    flat = mask.view(-1).view(torch.uint8)
    start = -flat.storage_offset() % 8
    end = start + (flat.numel() - start) // 1024 * 1024
    sums = flat[start:end].view(torch.int64).view(-1, 128).sum(1)
    return sums.view(torch.uint8).sum() + flat[:start].sum() + flat[end:].sum()
