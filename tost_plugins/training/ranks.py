"""What several processes must agree on: averages and masks. Without torch.distributed everything is the identity."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """How many processes train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def mean(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor averaged over the ranks, with one collective for all of them."""
    if world() == 1:
        return dict(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    dist.all_reduce(flat)
    flat /= world()
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


@torch.no_grad()
def broadcast(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Rank 0's tensors on every rank, returned where they were; they travel over `device` (NCCL needs a GPU's)."""
    if world() == 1:
        return dict(tensors)
    sent = {}
    for name, tensor in tensors.items():
        carrier = tensor.to(device, torch.uint8 if tensor.dtype == torch.bool else tensor.dtype, copy=True)
        dist.broadcast(carrier, src=0)
        sent[name] = carrier.to(tensor.device, tensor.dtype)
    return sent
