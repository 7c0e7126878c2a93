"""Modules that compute some of their channels only. Parameters, statistics, names and shapes stay those of the whole module:
slices are taken in the forward pass, and gradients of what is left out are 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tost_plugins.channels.plan import CONVOLUTIONS, NORMS, Part
from tost_plugins.training.params import clean_name, device_of, plain_modules
from tost_plugins.tweaks.ghost_skip import beside
from tost_plugins.tweaks.surgery.swap import original_class, restore, swap

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Slices:
    """What a module computes at the moment: all (`part` is None), or a part."""

    def __init__(self) -> None:
        self.part: Part | None = None
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None

    def set(self, part: Part | None, device: torch.device) -> None:
        """From now on compute this part."""
        self.part = part
        places = (None, None) if part is None else (part.inputs, part.outputs)
        self.inputs, self.outputs = (None if p is None else torch.from_numpy(p).to(device) for p in places)


def _of(tensor: Tensor, places: Tensor | None, dim: int = 0) -> Tensor:
    """The slice of a tensor along a dimension, all of it for None."""
    return tensor if places is None else tensor.index_select(dim, places.to(tensor.device))


class _Sliced:
    """Mixin: the weight and the bias of a part."""

    tost_slices: Slices

    def _sliced(self: Any) -> tuple[Tensor, Tensor | None]:
        slices: Slices = self.tost_slices
        weight = _of(self.weight, slices.outputs)
        if getattr(self, "groups", 1) == 1:
            weight = _of(weight, slices.inputs, 1)
        return weight, None if self.bias is None else _of(self.bias, slices.outputs)


class SlicedConvolution(_Sliced):
    """Mixin for a convolution."""

    def forward(self: Any, input: Tensor) -> Tensor:
        """The channels of its part alone; the whole convolution where it has none."""
        if self.tost_slices.part is None:
            return super().forward(input)  # type: ignore[misc]
        weight, bias = self._sliced()
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        convolve, groups = _CONVOLVE[weight.ndim - 2], self.tost_slices.part.groups
        return convolve(input, weight, bias, self.stride, padding, self.dilation, groups)


class SlicedLinear(_Sliced):
    """Mixin for a linear layer."""

    def forward(self: Any, input: Tensor) -> Tensor:
        """The features of its part alone; the whole layer where it has none."""
        if self.tost_slices.part is None:
            return super().forward(input)  # type: ignore[misc]
        return F.linear(input, *self._sliced())


class SlicedNorm(_Sliced):
    """Mixin for batch norm, whose statistics go on in the whole buffers."""

    def forward(self: Any, input: Tensor) -> Tensor:
        """As the norm, over the channels of its part; statistics of the others go on as if they had been computed."""
        if self.tost_slices.part is None:
            return super().forward(input)  # type: ignore[misc]
        self._check_input_dim(input)
        kept = self.tost_slices.outputs
        weight, bias = (None if param is None else _of(param, kept) for param in (self.weight, self.bias))
        if self.running_mean is None:
            return F.batch_norm(input, None, None, weight, bias, True, 0.0, self.eps)
        mean, var = _of(self.running_mean, kept), _of(self.running_var, kept)
        if not self.training:
            return F.batch_norm(input, mean, var, weight, bias, False, 0.0, self.eps)
        self.num_batches_tracked.add_(1)
        step = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        out = F.batch_norm(input, mean, var, weight, bias, True, step, self.eps)
        _go_on(self, mean, var, step)
        return out


class SlicedOwnNorm(_Sliced):
    """Mixin for a batch norm with a forward pass of its own, timm's with an activation in it say: it finds parts in the place
    of its tensors."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A norm's own forward pass, with its tensors cut to the channels of its part meanwhile."""
        kept = self.tost_slices.outputs
        if self.tost_slices.part is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        params, stats = dict(self._parameters), dict(self._buffers)
        counter = stats.get("num_batches_tracked")
        counted = None if counter is None else counter._version  # its number would wait for the device
        try:
            for tensors in (self._parameters, self._buffers):
                for name in {"weight", "bias", "running_mean", "running_var"} & tensors.keys():
                    tensors[name] = None if tensors[name] is None else _of(tensors[name], kept)
            out = super().forward(*args, **kwargs)  # type: ignore[misc]
            mean, var = self._buffers.get("running_mean"), self._buffers.get("running_var")
        finally:
            self._parameters.update(params)
            self._buffers.update(stats)
        if counter is not None and mean is not None and var is not None and self.training:
            step = 1.0 / max(int(self.num_batches_tracked), 1) if self.momentum is None else self.momentum
            _go_on(self, mean, var, step if self.num_batches_tracked._version != counted else 0.0)
        return out


@torch.no_grad()
def _go_on(norm: Any, mean: Tensor, var: Tensor, step: float) -> None:
    """Write the statistics back; channels that are left out have seen a constant."""
    fill, kept = norm.tost_slices.part.fill, norm.tost_slices.outputs
    if isinstance(fill, Tensor):
        norm.running_mean.lerp_(fill.to(mean), step)
        norm.running_var.mul_(1 - step)
    elif fill is not None:  # 0, where the convolution has no bias: a tensor made of it here would wait for the device
        torch._foreach_mul_([norm.running_mean, norm.running_var], 1 - step)
    norm.running_mean.index_copy_(0, kept.to(mean.device), mean)
    norm.running_var.index_copy_(0, kept.to(var.device), var)


def add(model: nn.Module) -> None:
    """Give all modules that can have slices some; they compute all of themselves until `compute` says less. Before whatever
    else gives modules another forward pass, which then sees what the slices return."""
    for _, module in plain_modules(model):
        _give(module)


def add_to_ghosts(model: nn.Module) -> None:
    """The same for ghosts, which read and write the channels of the convolutions that they stand beside."""
    for ghost, _ in beside(model):
        _give(ghost.conv)
        _give(ghost.norm)


def compute(model: nn.Module, parts: Mapping[str, Part]) -> None:
    """From now on compute these parts, and all of every other module."""
    device = device_of(model)
    for path, module in plain_modules(model):
        if (slices := slices_of(module)) is not None:
            slices.set(parts.get(clean_name(path)), device)
    for ghost, conv in beside(model):
        own, of_conv, of_norm = (slices_of(module) for module in (conv, ghost.conv, ghost.norm))
        part = None if own is None else own.part
        ghost.channels = None if part is None or own is None else own.outputs
        if of_conv is not None and of_norm is not None:
            of_conv.set(part, device)
            of_norm.set(part if ghost.channels is not None else None, device)


def remove(model: nn.Module) -> None:
    """Give the modules their own forward passes back."""
    for module in model.modules():
        if slices_of(module) is not None:
            restore(module, _mixin_for(module))  # type: ignore[arg-type]
            del module.tost_slices


def slices_of(module: nn.Module) -> Slices | None:
    """The slices that a module has, if any."""
    found = getattr(module, "tost_slices", None)
    return found if isinstance(found, Slices) else None


def _give(module: nn.Module) -> None:
    mixin = _mixin_for(module)
    if mixin is not None:
        module.tost_slices = Slices()  # type: ignore[assignment]
        swap(module, mixin)


def _mixin_for(module: nn.Module) -> type | None:
    own = original_class(module)
    if own in CONVOLUTIONS:
        return SlicedConvolution
    if own is nn.Linear:
        return SlicedLinear
    return SlicedNorm if own in NORMS else SlicedOwnNorm if issubclass(own, NORMS) else None
