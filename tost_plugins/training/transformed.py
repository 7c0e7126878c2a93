"""Layers that compute with another weight than the one they store, so that a stored 0 is no removed weight."""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.addmm, torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, torch.einsum,
}  # fmt: skip


def transforms(module: nn.Module) -> bool:
    """Whether a Conv or Linear module of somebody's own class loses the zeros of its weight on the way to its product, as
    weight standardisation does. Asked once per class, of a copy; torch's own classes do not.

    Example:
        >>> class Centred(nn.Linear):
        ...     def forward(self, x):
        ...         return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)
        >>> transforms(Centred(4, 2)), transforms(nn.Linear(4, 2))
        (True, False)
    """
    cls: Any = getattr(type(module), "tost_base", type(module))  # what it was before attach
    if "weight" not in module._parameters:  # it is computed from others: weight norm, a parametrization
        return True
    weight = module._parameters["weight"]
    if cls.forward in _torch_forwards() or weight is None or weight.numel() < 2:
        return False
    if cls not in _KNOWN:
        _KNOWN[cls] = _transforms(module, cls)
    return _KNOWN[cls]


_KNOWN: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


@functools.cache
def _torch_forwards() -> set[Any]:
    own = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return {cls.forward for cls in own}


@torch.no_grad()
def _transforms(module: Any, cls: Any) -> bool:
    weight = (
        torch.linspace(1, 2, module.weight.numel(), dtype=torch.float32).view(module.weight.shape) ** 3
    )  # no two alike
    weight.view(-1)[:: module.weight[0].numel()] = 0  # one in each filter
    probe = copy.copy(module)
    probe._parameters = {n: None if p is None else p.detach().float().cpu() for n, p in module._parameters.items()}
    probe._parameters["weight"] = weight
    probe._buffers = {n: None if b is None else b.detach().clone().cpu() for n, b in module._buffers.items()}
    seen = _Products(weight)
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]), seen:  # it may want another input
        cls.forward(probe, _no_samples(module))
    return seen.zeros is not None and seen.zeros < int((weight == 0).sum())


def _no_samples(module: Any) -> Tensor:
    """An input of the right shape that holds nothing: a layer computes its weight all the same."""
    if isinstance(module, nn.Linear):
        return torch.zeros(0, module.in_features, dtype=torch.float32)
    sides = [(side - 1) * gap + 1 for side, gap in zip(module.kernel_size, module.dilation, strict=True)]
    return torch.zeros(0, module.in_channels, *sides, dtype=torch.float32)


class _Products(TorchFunctionMode):
    """Counts the zeros in what a product is given that has as many numbers as a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.size, self.zeros = weight.numel(), None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            for value in (*args, *(kwargs or {}).values()):
                if isinstance(value, Tensor) and value.numel() == self.size:
                    self.zeros = int((value == 0).sum())
        return func(*args, **(kwargs or {}))
