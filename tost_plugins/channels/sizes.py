"""The sizes of layers: which attributes and tensors of a module say how many channels it has, and a module with other ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def resizable(module: nn.Module) -> bool:
    """Whether it is a layer of torch's own, or any batch norm."""
    return type(module) in (*_CONVS, nn.Linear) or isinstance(module, _NORMS)


def sizes(module: Any) -> dict[str, int]:
    """The attributes that say how many channels a layer or a batch norm has.

    Example:
        >>> sizes(nn.Linear(3, 4))
        {'in_features': 3, 'out_features': 4}
    """
    if not resizable(module):
        return {}
    if isinstance(module, nn.Linear):
        return {name: getattr(module, name) for name in ("in_features", "out_features")}
    if isinstance(module, _CONVS):
        return {name: getattr(module, name) for name in ("in_channels", "out_channels", "groups")}
    return {"num_features": module.num_features}


def shapes(module: nn.Module, wanted: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's tensors with these sizes; raises ValueError where they make no sense."""
    if wanted.keys() != sizes(module).keys() or not all(type(n) is int and 0 < n < 2**31 for n in wanted.values()):
        raise ValueError(f"sizes of a {type(module).__name__}")
    if isinstance(module, nn.Linear):
        return {"weight": (wanted["out_features"], wanted["in_features"]), "bias": (wanted["out_features"],)}
    if isinstance(module, _CONVS):
        inputs, outputs, groups = wanted["in_channels"], wanted["out_channels"], wanted["groups"]
        if inputs % groups or outputs % groups:
            raise ValueError(f"groups of a {type(module).__name__}")
        return {"weight": (outputs, inputs // groups, *module.kernel_size), "bias": (outputs,)}
    return {name: (wanted["num_features"],) for name in ("weight", "bias", "running_mean", "running_var")}


def resize(module: nn.Module, wanted: Mapping[str, int], bias: bool) -> None:
    """Give a module these sizes, and tensors without values in the shapes that fit; `bias`: it is to have one."""
    found = shapes(module, wanted)
    for name, value in wanted.items():
        setattr(module, name, value)
    first = next(iter([*module.parameters(recurse=False), *module.buffers(recurse=False)]), torch.empty(0))
    if bias and module._parameters.get("bias") is None and "weight" in module._parameters:
        module.bias = nn.Parameter(torch.empty(0, dtype=first.dtype, device=first.device), first.requires_grad)
    for name, shape in found.items():
        old = getattr(module, name, None)
        if old is None:
            continue
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(new, old.requires_grad)
        else:
            module._buffers[name] = new


def changed(before: nn.Module, after: nn.Module) -> dict[str, dict[str, tuple[int, int]]]:
    """Path -> the sizes before and after, of the modules that are smaller in the second of two networks, or have a new bias."""
    own = dict(before.named_modules())
    return {
        path: {name: (size, now[name]) for name, size in sizes(own[path]).items()}
        for path, module in after.named_modules()
        if (now := sizes(module)) != sizes(own[path]) or _names(module) != _names(own[path])
    }


def _names(module: nn.Module) -> list[str]:
    return [name for name, param in module._parameters.items() if param is not None]
