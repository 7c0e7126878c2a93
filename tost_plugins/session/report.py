"""What a sparse network is made of, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tost_plugins.masks.mask import density
from tost_plugins.masks.paths.connectivity import Connectivity
from tost_plugins.session.active_tweaks import ActiveTweaks
from tost_plugins.session.masked_weights import MaskedWeights


@dataclass(frozen=True)
class Report:
    """What a sparse network is made of. `active_parameters` counts the weights that the mask keeps, everything that is
    not masked, and the ghosts while they are there; `rows` has one entry per masked layer. `live` are the kept weights on a
    path from the inputs to the outputs, `effective_sparsity` counts all others as removed; both are None where that is not
    known: where the network cannot be followed, and while a mask moves at every step."""

    sparsity: float
    layers: int
    active_parameters: int
    ghost_parameters: int
    total_parameters: int
    left_out: tuple[str, ...] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)
    live: int | None = None
    effective_sparsity: float | None = None

    def metrics(self) -> dict[str, float]:
        """The numbers that trainers log."""
        live = {} if self.live is None else {"tost/live": float(self.live)}
        return {
            "tost/sparsity": self.sparsity,
            **live,
            "tost/active_parameters": float(self.active_parameters),
            "tost/ghost_parameters": float(self.ghost_parameters),
        }

    def __str__(self) -> str:
        ghosts = f" ({self.ghost_parameters:,} of them ghosts)" if self.ghost_parameters else ""
        idle = ""
        share = (
            1.0 if self.effective_sparsity is None else (1 - self.effective_sparsity) / max(1 - self.sparsity, 1e-12)
        )
        if share < 0.99995:
            idle = f" (effective {self.effective_sparsity:.4f}: of the kept weights {share:.4f} are live)"
        return (
            f"sparsity {self.sparsity:.4f}{idle} over {self.layers} layers, "
            f"{self.active_parameters:,} active parameters{ghosts} of {self.total_parameters:,}"
        )


def report(weights: MaskedWeights, tweaks: ActiveTweaks, rows: bool, found: Connectivity | None) -> Report:
    """The report of a model with these masked weights and tweaks, per layer with `rows`; `found` is what the mask connects."""
    (total, ghosts), removed = tweaks.sizes, weights.size - weights.count
    table = [
        {"layer": name, "shape": list(m.shape), "kept": int(m.sum()), "density": density(m)}
        for name, m in (weights.mask.items() if rows else ())
    ]
    live = None
    if found is not None:
        for row, paths in zip(table, found.layers, strict=False):
            row |= {"live": paths.live, "channels": paths.channels, "dead_channels": paths.dead}
        live = found.live_count
    share = removed / weights.size if weights.size else 0.0
    effective = None if live is None else 1 - live / weights.size if weights.size else 0.0
    left_out = tuple(tweaks.left_out)
    return Report(share, len(weights.weights), total - removed, ghosts, total, left_out, table, live, effective)
