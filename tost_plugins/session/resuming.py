"""What is said when a run goes on from a checkpoint: what it takes from there, and what of its own it does not use."""

from __future__ import annotations

from tost_plugins.masks.allocation import kept_count
from tost_plugins.masks.mask import Mask
from tost_plugins.training.clock import LENGTHS, Clock


def line(sparsity: float | None, saved: Clock, asked: Clock, mask: Mask, kind: str | None = None) -> tuple[str, bool]:
    """The line, and whether the checkpoint stands above something that the run asked for, which deserves a warning.

    `saved` and `mask` are the checkpoint's clock and mask; `sparsity` and `asked` are what the run would have started with,
    the first None where its mask moves or is given, and `kind` how its mask would have been found, None where in the same way.

    Example:
        >>> import torch
        >>> half = Mask({"fc.weight": torch.tensor([1, 0])})
        >>> line(0.9, Clock(4, 4), Clock(0, 100), half)[0]
        'goes on from a checkpoint: step 4 of 4, a mask of sparsity 0.5000; not used: sparsity 0.9, total_steps 100'
    """
    unused = [] if kind is None else [f"mask {kind}"]
    if sparsity is not None and mask.kept != kept_count(sparsity, mask.size):
        unused.append(f"sparsity {sparsity:g}")
    for key in LENGTHS:
        before, now = getattr(saved, key), getattr(asked, key)
        if before is not None and now is not None and before != now:
            unused.append(f"{key} {now}")
    length = "" if saved.total_steps is None else f" of {saved.total_steps}"
    text = f"goes on from a checkpoint: step {saved.step}{length}, a mask of sparsity {mask.sparsity:.4f}"
    return text + (f"; not used: {', '.join(unused)}" if unused else ""), bool(unused)
