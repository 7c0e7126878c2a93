"""What a sparse network is made of, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tost_plugins.masks.mask import density
from tost_plugins.session.active_tweaks import ActiveTweaks
from tost_plugins.session.masked_weights import MaskedWeights


@dataclass(frozen=True)
class Report:
    """What a sparse network is made of. `active_parameters` counts the weights that the mask keeps, everything that is
    not masked, and the ghosts while they are there; `rows` has one entry per masked layer."""

    sparsity: float
    layers: int
    active_parameters: int
    ghost_parameters: int
    total_parameters: int
    left_out: tuple[str, ...] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """The numbers that trainers log."""
        return {
            "tost/sparsity": self.sparsity,
            "tost/active_parameters": float(self.active_parameters),
            "tost/ghost_parameters": float(self.ghost_parameters),
        }

    def __str__(self) -> str:
        ghosts = f" ({self.ghost_parameters:,} of them ghosts)" if self.ghost_parameters else ""
        return (
            f"sparsity {self.sparsity:.4f} over {self.layers} layers, "
            f"{self.active_parameters:,} active parameters{ghosts} of {self.total_parameters:,}"
        )


def report(weights: MaskedWeights, tweaks: ActiveTweaks, rows: bool) -> Report:
    """The report of a model with these masked weights and tweaks, per layer with `rows`."""
    (total, ghosts), removed = tweaks.sizes, weights.size - weights.count
    table = [
        {"layer": name, "shape": list(m.shape), "kept": int(m.sum()), "density": density(m)}
        for name, m in (weights.mask.items() if rows else ())
    ]
    share = removed / weights.size if weights.size else 0.0
    return Report(share, len(weights.weights), total - removed, ghosts, total, tuple(tweaks.left_out), table)
