"""How a mask connects its units: in-degrees, dead units, and what a random mask would show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def degrees(mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layer -> the in-degree of each of its units: how many weights the unit (a filter, a row) has left.

    Example:
        >>> import torch
        >>> degrees({"fc.weight": torch.tensor([[True, True, False], [False, False, False]])})["fc.weight"].tolist()
        [2, 0]
    """
    return {name: keep.flatten(1).sum(1) for name, keep in mask.items()}


def in_degree(mask: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A row per layer: in-degrees of its units, beside those of a random mask of the same density.

    `mean`, `std` (over the units), `min` and `max` of the in-degree; `dead`, the units without any weight. A random mask
    draws each of a unit's `inputs` weights with probability `density`: its in-degrees are binomial, with
    `binomial_std` and, on average, `binomial_dead` dead units. `spread` is std / binomial_std: 1 is random, above 1
    is a structure that prefers some units; it is None where the layer is dense or empty and nothing is random.

    Paper: Van Gelder et al., Deconstructing the Structure of Sparse Neural Networks, 2020, figure 3.
    Differs from the paper: exact counts in a layer make a random mask's spread a little smaller than the binomial's.

    Example:
        >>> import torch
        >>> row, = in_degree({"fc.weight": torch.tensor([[True, True], [False, False]])})
        >>> row["mean"], row["std"], row["dead"], row["binomial_dead"]
        (1.0, 1.0, 1, 0.5)
    """
    rows = []
    for name, degree in degrees(mask).items():
        inputs, degree = mask[name][0].numel(), degree.double()
        density = float(degree.mean()) / inputs
        std, binomial = float(degree.std(correction=0)), (inputs * density * (1 - density)) ** 0.5
        rows.append({
            "layer": name, "units": len(degree), "inputs": inputs, "density": density,
            "mean": float(degree.mean()), "std": std, "min": int(degree.min()), "max": int(degree.max()),
            "dead": int((degree == 0).sum()), "binomial_std": binomial,
            "binomial_dead": len(degree) * (1 - density) ** inputs, "spread": std / binomial if binomial else None,
        })  # fmt: skip
    return rows
