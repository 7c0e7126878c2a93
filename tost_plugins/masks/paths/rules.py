"""What torch's functions do with paths: which numbers of a result a path from the inputs can reach, given those of the
arguments.

A reach is a tensor of zeros and positive numbers in the shape of the real one. The rules add only, so that their own backward
pass says which numbers lie on a path to the outputs. Products and quotients count as sums: what is constant need not be 0, so
a path through either factor is a path. Functions without a rule let each number of the result depend on all that goes in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_HOMES = (torch, Tensor, F, torch._C._nn, torch.special)

#: Kind -> the names of its functions. "each": number by number, broadcast. "shape": numbers are moved and added. "layer":
#: an input and a weight. "pool": the largest of a window; "largest": of whole dimensions. "norm": over some dimensions.
#: "product": of matrices. "write": into a part of a tensor. All others mix everything.
_NAMES = {
    "each": """
        relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ selu selu_ celu celu_ gelu silu mish hardswish hardtanh hardtanh_
        hardsigmoid sigmoid sigmoid_ tanh tanh_ softplus softsign logsigmoid hardshrink softshrink tanhshrink threshold rrelu
        prelu clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_ clip dropout dropout1d dropout2d dropout3d alpha_dropout
        feature_dropout feature_alpha_dropout abs abs_ exp exp_ expm1 log log1p log2 sqrt rsqrt square pow neg sin cos erf
        reciprocal sign round floor ceil trunc frac nan_to_num expit positive
        add add_ sub sub_ subtract rsub mul mul_ multiply div div_ divide true_divide maximum minimum fmax fmin where lerp
        lerp_ addcmul addcmul_ addcdiv addcdiv_ masked_fill masked_fill_ atan2 remainder fmod copysign
        eq ne lt le gt ge logical_not logical_and logical_or isnan isinf isfinite
        batch_norm instance_norm contiguous clone detach detach_ requires_grad_ to type type_as float double half bfloat16
        cpu cuda bool int long alias fill_ zero_ copy_
        __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__
        __div__ __rdiv__ __idiv__ __pow__ __rpow__ __neg__ __abs__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__
        __invert__ __mod__ __floordiv__""",
    "shape": """
        view view_as reshape reshape_as flatten unflatten permute transpose swapaxes swapdims movedim moveaxis t adjoint
        squeeze unsqueeze cat concat concatenate stack hstack vstack dstack chunk split split_with_sizes tensor_split unbind
        narrow select index_select gather take_along_dim __getitem__ expand expand_as broadcast_to repeat tile
        repeat_interleave roll flip rot90 pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle unfold fold
        im2col col2im pad constant_pad_nd sum mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
        adaptive_avg_pool3d diagonal nansum interpolate upsample upsample_nearest""",
    "layer": "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear",
    "pool": "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
    "largest": "amax amin max min logsumexp norm std var",
    "norm": "layer_norm rms_norm group_norm softmax log_softmax softmin normalize local_response_norm",
    "product": "matmul mm bmm mv addmm einsum __matmul__ __rmatmul__",
    "write": "__setitem__",
}

_KINDS: dict[Callable[..., Any], str] = {
    getattr(home, name): kind
    for kind, names in _NAMES.items()
    for name in names.split()
    for home in _HOMES
    if callable(getattr(home, name, None))
}
# as a mode sees attributes of tensors
_KINDS |= {getattr(Tensor, name).__get__: "shape" for name in ("T", "mT", "H", "mH")}
_KINDS |= {getattr(Tensor, name).__get__: "each" for name in ("data", "real")}


def kind_of(function: Callable[..., Any]) -> str:
    """The kind of rule that a function has; "mix" for one that is not known."""
    return _KINDS.get(function, "mix")


class _Whether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reach: Tensor) -> Tensor:
        return (reach > 0).to(reach.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return (grads[0] > 0).to(grads[0].dtype)


def whether(reach: Tensor) -> Tensor:
    """1 where there is a path, forward and backward, so that no depth makes the numbers too large or too small."""
    return _Whether.apply(reach)  # type: ignore[return-value]


def each(shape: torch.Size, reaches: list[Tensor]) -> Tensor | None:
    """Number by number: reached where any argument is; None where they do not broadcast to this shape."""
    try:
        if any(torch.broadcast_shapes(reach.shape, shape) != shape for reach in reaches):
            return None
    except RuntimeError:
        return None
    total = reaches[0].expand(shape)
    for other in reaches[1:]:
        total = total + other
    return total


def mixed(shape: torch.Size, reaches: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Everything depends on everything, and all weights that go in are read where something comes in."""
    total = torch.stack([part.sum() for part in reaches or weights]).sum()
    if reaches and weights:
        total = total + whether(total) * torch.stack([weight.sum() for weight in weights]).sum()
    return total.expand(shape)


def pool(name: str, reach: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], shape: torch.Size) -> Tensor:
    """The largest of a window: any number there may be that."""
    dims = int(name[-2])
    if "adaptive" in name:
        return getattr(F, f"adaptive_avg_pool{dims}d")(reach, shape[-dims:])
    order = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    given = dict(zip(order, args[1:], strict=False)) | kwargs
    if given.get("dilation", 1) not in (1, [1] * dims, (1,) * dims):
        return reach.flatten(-dims).sum(-1).reshape(*reach.shape[:-dims], *[1] * dims).expand(shape)
    taken = {key: given[key] for key in order if key != "dilation" and given.get(key) is not None}
    return getattr(F, f"avg_pool{dims}d")(reach, **taken)


def largest(reach: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], shape: torch.Size) -> Tensor | None:
    """The largest over a dimension, a spread or a norm; None where the arguments say something else."""
    dim = kwargs.get("dim", next((arg for arg in args[1:] if isinstance(arg, (int, tuple, list))), None))
    if dim is None or isinstance(dim, bool):
        return None
    for keep in (False, True):
        found = reach.sum(dim, keepdim=keep)
        if found.shape == shape:
            return found
    return None


def norm(name: str, reach: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Over some dimensions: each number depends on all of them there."""
    if name == "group_norm":
        groups = args[1] if len(args) > 1 else kwargs["num_groups"]
        grouped = reach.reshape(reach.shape[0], groups, -1)
        return grouped.sum(-1, keepdim=True).expand(grouped.shape).reshape(reach.shape)
    if name in ("layer_norm", "rms_norm"):
        shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
        dims: Any = tuple(range(-(1 if isinstance(shape, int) else len(shape)), 0))
    elif name == "local_response_norm":
        dims = (1,)
    else:
        given = kwargs.get("dim", next((arg for arg in args[1:] if isinstance(arg, int)), None))
        dims = tuple(range(reach.ndim)) if given is None else given
    return reach.sum(dims, keepdim=True).expand(reach.shape)
