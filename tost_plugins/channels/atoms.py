"""Channels that have to stay or go together: what a sum adds, a concatenation lines up, a norm passes on."""

from __future__ import annotations

import numpy as np

#: The channels of a tensor: the dimension that they lie along, and the atom of each place there.
Ids = np.ndarray


class Atoms:
    """Classes of channels. `new` makes some, `join` makes one of two, `pin` keeps one whatever happens."""

    def __init__(self) -> None:
        self._parent = np.zeros(0, dtype=np.int64)
        self._pinned = np.zeros(0, dtype=bool)

    def new(self, count: int) -> Ids:
        """`count` channels of their own."""
        start = len(self._parent)
        self._parent = np.concatenate([self._parent, np.arange(start, start + count)])
        self._pinned = np.concatenate([self._pinned, np.zeros(count, dtype=bool)])
        return np.arange(start, start + count)

    def roots(self, ids: Ids) -> Ids:
        """The class of each."""
        found = self._parent[ids]
        while not np.array_equal(above := self._parent[found], found):
            found = above
        self._parent[ids] = found
        return found

    def join(self, first: Ids, second: Ids) -> None:
        """Place by place, one class of two."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            low, high = sorted((self._root(a), self._root(b)))
            self._parent[high] = low
            self._pinned[low] |= self._pinned[high]

    def pin(self, ids: Ids) -> None:
        """Keep these."""
        self._pinned[self.roots(ids)] = True

    def pinned(self, ids: Ids) -> np.ndarray:
        """Whether each is kept whatever happens."""
        return self._pinned[self.roots(ids)]

    def _root(self, atom: int) -> int:
        while (above := int(self._parent[atom])) != atom:
            self._parent[atom] = self._parent[above]
            atom = above
        return atom
