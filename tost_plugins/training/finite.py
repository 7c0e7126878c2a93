"""The one check for NaN and infinity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tost_plugins.training.sharding import local


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no number in them is NaN or infinite; of parts of tensors, whether this rank's are so.

    A sum, or a norm where one kernel takes all, is many times as fast as looking at each number; where it overflows, as in
    float16, each is looked at.

    Example:
        >>> all_finite([torch.ones(2)]), all_finite([torch.ones(2), torch.tensor([1.0, float("nan")])])
        (True, False)
    """
    parts = [part for tensor in tensors if (part := local(tensor.detach())).numel()]
    parts = [torch.view_as_real(part.resolve_conj()) if part.is_complex() else part for part in parts]
    if not parts:
        return True
    found = [part.sum() for part in parts] if parts[0].is_cpu else torch._foreach_norm(parts)
    if bool(torch.stack([each.float() for each in found]).isfinite().all()):
        return True
    return all(bool(part.isfinite().all()) for part in parts)


def not_finite(named: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold NaN or infinity."""
    return [] if all_finite(list(named.values())) else [n for n, tensor in named.items() if not all_finite([tensor])]
