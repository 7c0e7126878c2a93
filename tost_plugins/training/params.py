"""Which parameters are prunable, and their names without the prefixes that wrappers add."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from tost_plugins.errors import TostError

PRUNABLE = (
    nn.Linear,
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip

#: What can be compared with 0 and multiplied by a mask; quantized weights cannot.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)

_PREFIXES = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def clean_name(name: str) -> str:
    """The name without what DDP, torch.compile, FSDP and activation checkpointing put in front.

    Example:
        >>> clean_name("module._orig_mod.layer1.0.conv1.weight")
        'layer1.0.conv1.weight'
    """
    return _PREFIXES.sub("", name)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP, DataParallel and torch.compile wrappers; the same object if there are none."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def plain_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Like `named_modules`, in the same order, each module once, but without ghosts and what is inside them."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if module in seen or getattr(module, "tost_ghost", False):
            return
        seen.add(module)
        yield name, module
        for child_name, child in module.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name)

    return walk(model, prefix)


def prunable(model: nn.Module, ignore: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Name -> weight of every Conv and Linear module, less those whose name matches a glob in `ignore`.

    Names are clean (no `module.` and the like), shared weights come once under their first name, ghosts never.
    Raises TostError when nothing is left, when a glob matches nothing, on weights that `torch.nn.utils.prune` or a
    parametrization hides under another name, on integers and 8-bit floats, and on a model with lazy or meta tensors.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, 10))
        >>> list(prunable(net, ignore=["2.*"]))
        ['0.weight']
    """
    _check_values(model)
    found: dict[str, nn.Parameter] = {}
    used: set[str] = set()
    seen: set[int] = set()
    for path, module in plain_modules(model):
        if not isinstance(module, PRUNABLE):
            continue
        name = clean_name(f"{path}.weight" if path else "weight")
        globs = [glob for glob in ignore if fnmatchcase(name, glob) or fnmatchcase(name.removesuffix(".weight"), glob)]
        used.update(globs)
        weight = module._parameters.get("weight")
        if globs or (weight is not None and id(weight) in seen):
            continue
        if weight is None:
            raise TostError(
                f"{name}: expected a plain parameter, got a reparametrised weight; call torch.nn.utils.prune.remove "
                f"or torch.nn.utils.parametrize.remove_parametrizations on it first (its zeros stay: from_zeros)"
            )
        if weight.dtype not in _DTYPES:
            raise TostError(
                f"{name}: expected a floating-point weight of 16 bits or more, got {weight.dtype}; prune before the model is "
                f"quantized, or add {name.removesuffix('.weight')!r} to `ignore`"
            )
        seen.add(id(weight))
        found[name] = weight
    missed = [glob for glob in ignore if glob not in used]
    if missed:
        raise TostError(f"ignore: expected globs that match a layer, got {missed[0]!r}; layers: {some(found)}")
    if not found:
        raise TostError(
            f"{type(model).__name__}: expected Conv or Linear weights to prune, got none; check the model and `ignore`"
        )
    return found


def _check_values(model: nn.Module) -> None:
    """Raise TostError on tensors that have no values yet: whatever is attached to them now would not fit them later."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            raise TostError(
                f"{clean_name(name)}: expected a tensor with a shape, got a lazy one; run one batch through the model first"
            )
        if tensor.is_meta:
            raise TostError(
                f"{clean_name(name)}: expected a tensor with values, got one on the meta device; materialise the model first "
                f"(model.to_empty(device=...), then initialise it or load its weights)"
            )


def some(names: Sequence[str] | dict, most: int = 6) -> str:
    """The first few names for an error message, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f", ... ({len(names) - most} more)" if len(names) > most else "")


def owners(model: nn.Module, params: dict[str, nn.Parameter]) -> dict[str, nn.Module]:
    """Name -> the module that holds this weight as its `weight`, for the names of `prunable`."""
    by_id = {id(param): name for name, param in params.items()}
    found: dict[str, nn.Module] = {}
    for _, module in plain_modules(model):
        name = by_id.get(id(module._parameters.get("weight")))
        if name is not None and isinstance(module, PRUNABLE):
            found.setdefault(name, module)
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives; the CPU for a model without parameters."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
