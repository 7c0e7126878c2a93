"""The curves of soft activations over beta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tost_plugins.tweaks.soft_activation import soft


def pswish(
    betas: Sequence[float] = (0.5, 1, 2, 5, 10), low: float = -4, high: float = 4, points: int = 161
) -> list[dict[str, Any]]:
    """Rows (`curve`, `x`, `y`) of x * sigmoid(beta * x) for each beta, and of ReLU, which they approach.

    Paper: Jaiswal et al., Training Your Sparse Neural Network Better with Any Mask, ICML 2022, figure 5.
    Differs from the paper: nothing.

    Example:
        >>> [row["y"] for row in pswish([1.0], low=0, high=2, points=2) if row["curve"] == "ReLU"]
        [0.0, 2.0]
    """
    x = torch.linspace(low, high, points, dtype=torch.float64)
    curves = {f"beta {beta:g}": soft(x, float(beta)) for beta in betas} | {"ReLU": F.relu(x)}
    return [
        {"curve": name, "x": at, "y": value}
        for name, y in curves.items()
        for at, value in zip(x.tolist(), y.tolist(), strict=True)
    ]
