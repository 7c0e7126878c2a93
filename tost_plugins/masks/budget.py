"""Exactly so many weights, counted as a recipe's `budget` says: all that are kept, or those on a path alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.masks.allocation import Counts, kept_count
from tost_plugins.masks.base import Allocation, Budget, OnCollapse
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.paths.connectivity import Paths, refusal
from tost_plugins.masks.scoring import wide
from tost_plugins.masks.topk import check_finite, count_true, counts, split, tell_ties, tied, top_mask
from tost_plugins.training.log import say
from tost_plugins.training.task import Task

_CLOSE = 0.98  # of the count: so many live weights are near enough for the rest to be filled in one by one
_TRIES = 1000  # weights that would bring along too many others, before the count is given up


class Scored(Protocol):
    """The fields of a method that keeps the weights with the highest scores."""

    @property
    def sparsity(self) -> float:
        """Share of weights that go."""
        ...

    @property
    def allocation(self) -> Any:
        """How those that stay are shared out."""
        ...

    @property
    def on_collapse(self) -> OnCollapse:
        """For layers that lose everything."""
        ...

    @property
    def budget(self) -> Budget:
        """Whether the sparsity counts "kept" or "live" weights."""
        ...


def chosen(scores: Mapping[str, Tensor], method: Scored, task: Task, shares: Allocation | Counts | None = None) -> Mask:
    """The mask of the highest scores: `top_mask`, or with `budget: live` the round((1 - sparsity) * N) weights that lie on a
    path from the inputs to the outputs, see `live_mask`. `shares` are the method's allocation, by default as it says."""
    given: Allocation | Counts = method.allocation if shares is None else shares
    if method.budget == "kept":
        return top_mask(scores, method.sparsity, given, method.on_collapse)
    flat = torch.cat([wide(tensor.detach()).reshape(-1) for tensor in scores.values()])
    check_finite(flat, scores)
    count = counts(scores, method.sparsity, given)
    mask = live_mask(ordered(scores, flat, count), scores, kept_count(method.sparsity, flat.numel()), Paths(task))
    tell_ties(tied(flat, torch.cat([mask[name].to(flat.device).flatten() for name in scores]), count, scores))
    return mask


def live_mask(order: Tensor, like: Mapping[str, Tensor], count: int, paths: Paths) -> Mask:
    """Exactly `count` weights, all on a path; `order` are the indices of all weights in a row, the best first.

    As many of the best are taken as it needs for `count` of them to be live, and those that are not are left out; what is
    missing then, since one more would bring too many along, is made up of the best that are live as soon as they are kept.
    Where `count` of the best are all live this is their mask. Where any path among the best brings too many along, the weakest
    links of the best paths are held and the others are taken from higher up. Raises TostError where no path is that short.
    A network in which no single weight can be added (chains) may end with a few less, which a line says.
    """
    search = _Search(order, like, paths)
    found = search.held(count)
    while (missing := count - int(count_true(found))) > 0:
        more = search.joined(found, missing)
        more = search.chained(found, count) if more is None else more
        if more is None:
            say(f"mask: {missing} of {count} weights are left out, since each would need others to lie on a path")
            break
        found = more
    return Mask(split(found, like))


class _Search:
    """Weights in a row, the best first, and which of them lie on a path together."""

    def __init__(self, order: Tensor, like: Mapping[str, Tensor], paths: Paths) -> None:
        self.order, self.like, self.paths = order, like, paths
        self.place = torch.empty_like(order)  # of each weight in the order
        self.place[order] = torch.arange(len(order), device=order.device)

    def live(self, kept: Tensor) -> Tensor:
        """Those of a row that lie on a path."""
        return self._row(self.paths.live(split(kept, self.like)))

    def held(self, count: int) -> Tensor:
        """Those of the best that are live, at most `count`, with the links held without which none would be, or few."""
        held = best = torch.zeros_like(self.order, dtype=torch.bool)
        links = live = 0
        while live < _CLOSE * count:
            number, found = self.most(held, count, self.place, _CLOSE)
            more = int(count_true(found))
            if more > live:
                best, live = found, more
            elif live:
                break
            links += 1
            if number == len(self.order) or links > count:
                break
            held = held.clone()
            held[self.order[number]] = True
        if not live:
            self._refuse(count, links)
        return best

    def _refuse(self, count: int, links: int) -> None:
        """Raise TostError: there is no path, or none that is as short as this."""
        dense = self.paths.connectivity(split(torch.ones_like(self.order, dtype=torch.bool), self.like))
        if not dense.connected:
            raise refusal(dense)
        raise TostError(
            f"budget: live: expected at least {links} weights, as many as lie on one path, got {count}; set a lower sparsity"
        )

    def most(self, held: Tensor, count: int, place: Tensor, close: float = 1) -> tuple[int, Tensor]:
        """How many of the best can be taken beside the `held` ones until more than `count` are live, or so close to that, and
        which ones are."""
        low, high = 0, len(self.order)
        found, number = self.live(held), min(count, high)
        while low < high:
            tried = self.live(held | (place < number))
            live = int(count_true(tried))
            if live > count:
                high = number - 1
            else:
                low, found = number, tried
                if live >= close * count:
                    break
            number = min(2 * low, high) if high == len(self.order) and low < high // 2 else -(-(low + high) // 2)
        return low, found

    def joined(self, found: Tensor, missing: int) -> Tensor | None:
        """With the best of those that are live as soon as they are kept, half of what is missing at once."""
        free = self._row(self.paths.joins(split(found, self.like))) & ~found
        places = self.place[free]
        if not len(places):
            return None
        number = min(missing if missing < 64 else missing // 2, len(places))
        more = found.clone()
        more[self.order[places.sort().values[:number]]] = True
        return more

    def chained(self, found: Tensor, count: int) -> Tensor | None:
        """With the best of those that are live together with others."""
        place = self.place.clone()
        for _ in range(_TRIES):
            number, more = self.most(found, count, place)
            if int(count_true(more)) > int(count_true(found)):
                return more
            if number >= len(self.order):
                return None
            place[place == number] = len(self.order)
            place[(place > number) & (place < len(self.order))] -= 1
        return None

    def _row(self, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([parts[name].flatten() for name in self.like]).to(self.order.device)


def ordered(scores: Mapping[str, Tensor], flat: Tensor, count: Mapping[str, int] | int) -> Tensor:
    """The indices of all weights, the best first: by score, or by the place in their layer as a share of its count."""
    if isinstance(count, int):
        return flat.argsort(descending=True, stable=True)
    places = []
    for name, part in split(flat, scores).items():
        order = part.flatten().argsort(descending=True, stable=True)
        place = torch.empty(len(order), dtype=torch.float64, device=flat.device)
        place[order] = torch.arange(len(order), dtype=torch.float64, device=flat.device) + 0.5
        places.append(place / count[name] if count[name] else place + len(flat))
    return torch.cat(places).argsort(stable=True)
