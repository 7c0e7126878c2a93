"""How many weights each layer keeps: exact counts from a sparsity and a rule that shares them out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from tost_plugins.errors import TostError, unknown
from tost_plugins.training.params import is_recurrent, matches, some

Shape = Sequence[int]


class Counts(dict[str, int]):
    """How many weights each layer keeps, known already: what `allocation: like:KIND` comes to."""


def kept_count(sparsity: float, size: int) -> int:
    """How many of `size` weights stay: round((1 - sparsity) * size); all at sparsity 0."""
    return round((1 - sparsity) * size)


def allocate(
    allocation: str | Mapping[str, float] | Counts, shapes: Mapping[str, Shape], sparsity: float
) -> dict[str, int] | None:
    """How many weights each layer keeps, name -> count; None for "global", which gives no layer a share.

    "uniform" gives every layer the same density; "er" a density proportional to (n_in + n_out) / (n_in *
    n_out), with channels for n; "erk" the same with the kernel's sides in the sum and in the product. A
    layer whose density would exceed 1 becomes dense and the others are scaled up. "erk_plus" is "erk" with the
    last fully-connected layer dense; "uniform_plus" is "uniform" with the first layer dense and at least 20 % of
    the last fully-connected one; both keep the total. A map glob -> sparsity
    gives the layers that match exactly that sparsity (the first matching glob wins; with or without
    `.weight`), and the rest share evenly what is left. `shapes` are those of the weights, `sparsity` the
    total in [0, 1). The counts sum to round((1 - sparsity) * N) exactly: largest remainders are rounded up,
    ties by index. `Counts` are taken as they are. Raises TostError on an unknown rule, a glob without a layer, a
    map that does not go with `sparsity`, "erk_plus" without a fully-connected layer, and where the layers that a
    rule spares hold more than the total.

    Paper: er: Mocanu et al., Nature Communications 2018; erk: Evci et al., RigL, ICML 2020; uniform_plus: Gale et al.,
    The State of Sparsity in Deep Neural Networks, 2019; erk_plus: Liu et al., The Unreasonable Effectiveness of Random
    Pruning, ICLR 2022.
    Differs from the paper: exact counts instead of Bernoulli draws (er) or rounding layer by layer (erk).

    Example:
        >>> allocate("erk", {"stem": (4, 3, 3, 3), "body": (16, 16, 3, 3)}, sparsity=0.9)
        {'stem': 61, 'body': 180}
        >>> allocate({"stem": 0.0}, {"stem": (4, 3, 3, 3), "body": (16, 16, 3, 3)}, sparsity=0.9)
        {'stem': 108, 'body': 133}
        >>> allocate("uniform_plus", {"stem": (2, 2), "body": (10, 10), "head": (10, 5)}, sparsity=0.8)
        {'stem': 4, 'body': 17, 'head': 10}
    """
    if isinstance(allocation, Counts):
        return dict(allocation)
    if allocation == "global":
        return None
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if isinstance(allocation, Mapping):
        return _mapped(allocation, sizes, sparsity)
    total = kept_count(sparsity, sum(sizes.values()))
    if allocation in _PLUS:
        return _PLUS[allocation](shapes, sizes, total)
    if allocation not in _DENSITY:
        raise unknown("allocation", "rule", allocation, ["global", *_DENSITY, *_PLUS])
    density = {name: _DENSITY[allocation](shape) for name, shape in shapes.items()}
    return _whole(_targets(density, sizes, total), sizes, total)


_DENSITY: dict[str, Callable[[Shape], float]] = {
    "uniform": lambda shape: 1.0,
    "er": lambda shape: sum(shape[:2]) / max(math.prod(shape[:2]), 1),
    "erk": lambda shape: sum(shape) / max(math.prod(shape), 1),
}


def _erk_plus(shapes: Mapping[str, Shape], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    last = _last_connected(shapes)
    if last is None:
        raise TostError(
            f"allocation: erk_plus: expected a fully-connected layer, which stays dense, got none; use erk "
            f"(layers: {some(dict(shapes))})"
        )
    return _around("erk_plus", {last: sizes[last]}, shapes, sizes, total)


def _uniform_plus(shapes: Mapping[str, Shape], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    first, last = next(iter(shapes)), _last_connected(shapes)
    fixed = {first: sizes[first]}
    counts = _around("uniform_plus", fixed, shapes, sizes, total)
    if last is not None and counts[last] < (least := -(-sizes[last] // 5)):
        counts = _around("uniform_plus", {**fixed, last: least}, shapes, sizes, total)
    return counts


_PLUS = {"erk_plus": _erk_plus, "uniform_plus": _uniform_plus}


def _last_connected(shapes: Mapping[str, Shape]) -> str | None:
    """The last fully-connected layer; recurrent ones are none."""
    return next((name for name in reversed(list(shapes)) if len(shapes[name]) == 2 and not is_recurrent(name)), None)


def _around(
    rule: str, fixed: Mapping[str, int], shapes: Mapping[str, Shape], sizes: Mapping[str, int], total: int
) -> dict[str, int]:
    """The `fixed` counts, and the rest of the total shared out among the other layers by the rule without its plus."""
    rest = {name: size for name, size in sizes.items() if name not in fixed}
    left = total - sum(fixed.values())
    if left < 0:
        most = 1 - sum(fixed.values()) / sum(sizes.values())
        raise TostError(
            f"allocation: {rule}: expected a total of more than the {sum(fixed.values())} weights of {some(dict(fixed))} that "
            f"it spares, got {total}; set a sparsity well below {most:.6g}, or {rule.removesuffix('_plus')}"
        )
    density = {name: _DENSITY[rule.removesuffix("_plus")](shapes[name]) for name in rest}
    shared = _whole(_targets(density, rest, left), rest, left)
    return {name: fixed[name] if name in fixed else shared[name] for name in sizes}


def _targets(density: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, float]:
    """Counts, not yet whole, proportional to density * size; a layer that would exceed its size is dense."""
    dense: set[str] = set()
    while True:
        free = [name for name in sizes if name not in dense]
        left = total - sum(sizes[name] for name in dense)
        weight = sum(density[name] * sizes[name] for name in free)
        scale = left / weight if weight else 0.0
        over = {name for name in free if scale * density[name] > 1}
        if not over:
            return {n: float(sizes[n]) if n in dense else scale * density[n] * sizes[n] for n in sizes}
        dense |= over


def _whole(targets: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """The targets rounded to whole numbers by largest remainder; their sum is `total` where one step each
    suffices."""
    counts = {name: min(math.floor(target), sizes[name]) for name, target in targets.items()}
    left = total - sum(counts.values())
    order = sorted(counts, key=lambda name: counts[name] - targets[name])
    for name in [name for name in order if counts[name] < sizes[name]][: max(left, 0)]:
        counts[name] += 1
    return counts


def _mapped(globs: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
    owner = _owners(globs, sizes)
    targets = {name: (1 - globs[glob]) * sizes[name] for name, glob in owner.items()}
    rest = {name: size for name, size in sizes.items() if name not in owner}
    if not rest:
        return _all_mapped(targets, sizes, sparsity)
    mapped = {name: round(target) for name, target in targets.items()}
    taken, room, size = sum(mapped.values()), sum(rest.values()), sum(sizes.values())
    left = kept_count(sparsity, size) - taken
    if not 0 <= left <= room:
        most, least = 1 - taken / size, 1 - (taken + room) / size
        raise TostError(
            f"allocation: expected a map that leaves the {len(rest)} other layers 0 to {room} weights, "
            f"got {left}; with this map sparsity lies between {least:.6g} and {most:.6g}"
        )
    shared = _whole(_targets(dict.fromkeys(rest, 1.0), rest, left), rest, left)
    return {name: mapped[name] if name in mapped else shared[name] for name in sizes}


def _all_mapped(targets: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
    size = sum(sizes.values())
    total = kept_count(sparsity, size)
    counts = _whole(targets, sizes, total)
    if sum(counts.values()) != total:
        given = 1 - round(sum(targets.values())) / size
        raise TostError(
            f"allocation: expected a map whose total is the sparsity {sparsity:g}, "
            f"got {given:.10g} in total; set sparsity to {given:.10g}, or leave a layer out of the map"
        )
    return counts


def _owners(globs: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, str]:
    """Layer -> the first glob that matches it; every glob must come first for some layer."""
    owner: dict[str, str] = {}
    for glob in globs:
        matching = [name for name in sizes if matches(name, glob)]
        mine = [name for name in matching if name not in owner]
        if not matching:
            raise TostError(f"allocation: expected globs that match a layer, got {glob!r}; layers: {some(dict(sizes))}")
        if not mine:
            raise TostError(
                f"allocation: expected globs that match a layer first, got {glob!r} after others "
                f"that match all of its layers; put it before them"
            )
        owner |= dict.fromkeys(mine, glob)
    return owner
