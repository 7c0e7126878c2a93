"""A mask that moves to where the gradient is: RigL, which is SET with one method changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.masks.base import STRICT
from tost_plugins.masks.methods.set import Set


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RigL(Set):
    """Now and then each layer drops its smallest weights and grows those with the largest dense gradient.

    The gradient is that of the whole step: averaged over the ranks, summed over the micro-batches, not masked. All
    else, and the fields, are as in `Set`: an update takes the place of that step's weight update, grown weights and
    their optimizer state start at 0, counts stay exact in every layer.

    Paper: Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020.
    Differs from the paper: ties go to the lower index, where its code adds noise.

    Example:
        >>> from tost_plugins.training.clock import Clock
        >>> mask, weight = {"w": torch.tensor([True, True, False, False])}, {"w": torch.tensor([0.1, -2.0, 0.0, 0.0])}
        >>> grads, layer = {"w": torch.tensor([0.0, 3.0, -4.0, 1.0])}, RigL(sparsity=0.5, drop=0.5)
        >>> layer.update(mask, weight, grads, Clock(0, 100), torch.Generator())["w"].tolist()
        [False, True, True, False]
    """

    kind: Literal["rigl"] = "rigl"  # type: ignore[assignment]

    def wishes(self, name: str, weight: Tensor, grads: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """|gradient|; raises TostError for a weight that got none."""
        if name not in grads:
            raise TostError(
                f"rigl: expected a gradient for {name}, got none; add {name.removesuffix('.weight')!r} to `ignore` if it "
                f"is frozen or not used, or step its optimizer whenever others step"
            )
        return grads[name].abs()
