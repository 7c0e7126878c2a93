"""When a structure that moves becomes what it will be: the overlap of masks along a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tost_plugins.errors import TostError
from tost_plugins.masks.mask import Mask


def emergence(masks: Mapping[int, Mask]) -> list[dict[str, Any]]:
    """A row per moment of a run (optimizer step -> mask, in order): its overlap with the last mask and with the one
    before it (None for the first), as intersection over union of the kept weights: 1 equal, 0 disjoint.

    `random` is what two random masks of these densities, layer by layer, have in common on average.
    Raises TostError for no masks, and for masks of different layers.

    Paper: Van Gelder et al., Deconstructing the Structure of Sparse Neural Networks, 2020, figure 3.
    Differs from the paper: nothing.

    Example:
        >>> import torch
        >>> a, b = (Mask({"w": torch.tensor(bits)}) for bits in ([[True, True, False]], [[False, True, True]]))
        >>> [(row["step"], round(row["with_final"], 2)) for row in emergence({0: a, 10: b})]
        [(0, 0.33), (10, 1.0)]
    """
    if not masks:
        raise TostError("emergence: expected at least one mask, got none; watch a run with `watch: [emergence]`")
    rows, final, before = [], masks[max(masks)], None
    for step, mask in sorted(masks.items()):
        rows.append({
            "step": step, "sparsity": mask.sparsity, "with_final": mask.overlap(final),
            "with_previous": None if before is None else mask.overlap(before), "random": _by_chance(mask, final),
        })  # fmt: skip
        before = mask
    return rows


def _by_chance(a: Mask, b: Mask) -> float:
    both = sum(int(keep.sum()) * int(b[name].sum()) / keep.numel() for name, keep in a.items())
    return both / (a.kept + b.kept - both) if a.kept + b.kept else 1.0
