"""FSDP2 (`fully_shard`): weights of which every rank holds a part, and the whole network for a moment."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tost_plugins.errors import TostError


def is_part(tensor: Tensor) -> bool:
    """Whether this rank holds only its part of the tensor (a DTensor)."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds, as a view; a plain tensor is its own part."""
    return tensor.to_local() if is_part(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of the tensor on every rank, by a collective for a part; a plain tensor is whole."""
    return tensor.full_tensor() if is_part(tensor) else tensor  # type: ignore[attr-defined]


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, equal on all ranks, laid out over them as `other` is; nothing is sent."""
    if not is_part(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)  # type: ignore[attr-defined]


def reshard(model: nn.Module) -> None:
    """Give the modules their parts back: after a forward pass alone the outermost one still has whole weights, which
    are other objects than those that the optimizer trains."""
    for module in model.modules():
        if isinstance(module, _fsdp("FSDPModule")):
            module.reshard()  # type: ignore[attr-defined, operator]


@contextmanager
@torch.no_grad()
def unsharded(model: nn.Module) -> Iterator[None]:
    """Within: the plain network, with whole weights that may be changed; afterwards every rank has its part of them.

    Every rank has to come by, and to do the same. A model that is not sharded stays as it is.
    """
    reshard(model)
    places = [
        (module, name, param)
        for module in model.modules()
        for name, param in module._parameters.items()
        if param is not None and is_part(param)
    ]
    wholes = {param: nn.Parameter(whole(param).clone(), param.requires_grad) for _, _, param in places}
    hooks = [_without_fsdp(table) for module in model.modules() for table in _hooks(module)] if wholes else []
    for module, name, param in places:
        module._parameters[name] = wholes[param]
    try:
        yield
    finally:
        for module, name, param in places:
            module._parameters[name] = param
        for table, entries in hooks:
            table.clear()
            table.update(entries)
        for param, changed in wholes.items():
            local(param).copy_(local(like(changed.detach(), param)))


def any_rank(found: bool, like: Tensor) -> bool:
    """Whether it is so on any rank that holds parts of the same tensor; on this rank for a plain one."""
    if not is_part(like):
        return found
    flag = torch.tensor(float(found), device=like.device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def check_bare(where: str, model: nn.Module) -> None:
    """Raise TostError for a model that is sharded already."""
    if any(is_part(param) for param in model.parameters()) or _by_fsdp1(model):
        raise TostError(
            f"{where}: expected the bare model, got one that is sharded; attach first, then fully_shard (FSDP2), and "
            f"make the optimizer after that"
        )


def check_kind(where: str, model: nn.Module) -> None:
    """Raise TostError for a model that FSDP1 has wrapped since it was attached."""
    if _by_fsdp1(model):
        raise TostError(
            f"{where}: expected DDP or FSDP2, got FullyShardedDataParallel (FSDP1), which hides weights in flat rows "
            f"that no mask fits; use torch.distributed.fsdp.fully_shard (FSDP2), or DistributedDataParallel"
        )


def _by_fsdp1(model: nn.Module) -> bool:
    """Either kind of FSDP marks its modules; FSDP2's have parts for parameters, or are of its class."""
    modules = list(model.modules())
    if any(isinstance(module, _fsdp("FullyShardedDataParallel")) for module in modules):
        return True
    marked = any(getattr(module, "_is_fsdp_managed_module", False) for module in modules)
    second = any(isinstance(module, _fsdp("FSDPModule")) for module in modules)
    return marked and not second and not any(is_part(param) for param in model.parameters())


def _fsdp(name: str) -> Any:
    """A class of torch.distributed.fsdp; nothing is one of it where nobody has imported that, or torch lacks it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), name, ())


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return module._forward_pre_hooks, module._forward_hooks


def _without_fsdp(table: dict[int, Any]) -> tuple[dict[int, Any], dict[int, Any]]:
    """Take FSDP2's hooks, which swap whole weights in and out, from a table; returns it, and what was in it."""
    entries = dict(table)
    for key, hook in entries.items():
        if type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp"):
            del table[key]
    return table, entries
