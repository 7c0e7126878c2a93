"""What a weight was at the beginning and has become, as one number: how lottery tickets choose what survives a round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tost_plugins.masks.scoring import wide

#: The criteria of Zhou et al., under their names; all but the two of the final weight alone need the initial ones.
TicketScore = Literal[
    "large_final", "small_final", "large_init", "small_init", "large_init_large_final", "small_init_small_final",
    "magnitude_increase", "movement",
]  # fmt: skip


def ticket_score(kind: TicketScore, initial: Tensor, final: Tensor, kept: Tensor) -> Tensor:
    """The score of each weight of a layer, in its shape: the highest survive. Those outside `kept` have one without meaning.

    With w the weights as they were (`initial`) and v as they are (`final`): |v|, -|v|, |w|, -|w|, min(a |v|, |w|),
    -max(a |v|, |w|), |v| - |w| and |v - w|, where a makes the mean a |v| of the kept weights their mean |w|.

    Example:
        >>> w, v = torch.tensor([2.0, 1.0]), torch.tensor([-1.0, 3.0])
        >>> for kind in ("large_final", "magnitude_increase", "movement", "large_init_large_final"):
        ...     print(kind, ticket_score(kind, w, v, torch.tensor([True, True])).tolist())
        large_final [1.0, 3.0]
        magnitude_increase [-1.0, 2.0]
        movement [3.0, 2.0]
        large_init_large_final [0.75, 1.0]
    """
    return _SCORES[kind](wide(initial), wide(final), kept)


def _balanced(initial: Tensor, final: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The magnitudes of both, the final ones scaled so that over the kept weights both have the same mean."""
    first, last = initial.abs(), final.abs()
    size = last[kept].sum()
    return first, last * (first[kept].sum() / size) if size else last


_SCORES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "large_final": lambda w, v, kept: v.abs(),
    "small_final": lambda w, v, kept: -v.abs(),
    "large_init": lambda w, v, kept: w.abs(),
    "small_init": lambda w, v, kept: -w.abs(),
    "large_init_large_final": lambda w, v, kept: torch.minimum(*_balanced(w, v, kept)),
    "small_init_small_final": lambda w, v, kept: -torch.maximum(*_balanced(w, v, kept)),
    "magnitude_increase": lambda w, v, kept: v.abs() - w.abs(),
    "movement": lambda w, v, kept: (v - w).abs(),
}
