"""Which parameters are prunable, and their names without the prefixes that wrappers add."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from tost_plugins.errors import TostError
from tost_plugins.training.transformed import transforms

PRUNABLE = (
    nn.Linear,
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip

#: What can be compared with 0 and multiplied by a mask; quantized weights cannot.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)

_RECURRENT = re.compile(r"(?:^|\.)weight_(?:ih|hh|hr)_l\d+(?:_reverse)?$")

_PREFIXES = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def clean_name(name: str) -> str:
    """The name without what DDP, torch.compile, FSDP and activation checkpointing put in front.

    Example:
        >>> clean_name("module._orig_mod.layer1.0.conv1.weight")
        'layer1.0.conv1.weight'
    """
    return _PREFIXES.sub("", name)


def is_recurrent(name: str) -> bool:
    """Whether it is the name that `nn.LSTM`, `nn.GRU` and `nn.RNN` give to one of their weights.

    Example:
        >>> is_recurrent("lstm.weight_hh_l0_reverse"), is_recurrent("head.weight")
        (True, False)
    """
    return _RECURRENT.search(name) is not None


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


def is_layer(module: nn.Module) -> bool:
    """Whether it is a Conv, Linear or recurrent module, or the Hub's `Conv1D` (GPT-2), a linear layer that stores (inputs,
    outputs)."""
    return isinstance(module, (*PRUNABLE, nn.RNNBase)) or is_transposed(module)


def weight_keys(module: nn.Module) -> list[str]:
    """What a layer calls its weights: `weight`, or in a recurrent one `weight_ih_l0`, `weight_hh_l0` and so on, which hold all
    gates of one of its layers, one below the other.

    Example:
        >>> weight_keys(nn.Linear(2, 3)), weight_keys(nn.GRU(2, 3))
        (['weight'], ['weight_ih_l0', 'weight_hh_l0'])
    """
    if not isinstance(module, nn.RNNBase):
        return ["weight"]
    return [name for name in module._flat_weights_names if is_recurrent(name)]


def gates_of(layer: nn.Module, weight: torch.Tensor) -> int:
    """How many gates lie one below the other in a weight: 4 in an LSTM, 3 in a GRU; 1 elsewhere, and in projections.

    Example:
        >>> gates_of(layer := nn.LSTM(2, 3), layer.weight_hh_l0), gates_of(layer := nn.Linear(2, 3), layer.weight)
        (4, 1)
    """
    return max(1, weight.shape[0] // layer.hidden_size) if isinstance(layer, nn.RNNBase) else 1


def layer_of(name: str) -> str:
    """The layer that a weight's name belongs to; the name itself where it has no layer in front.

    Example:
        >>> layer_of("body.fc.weight"), layer_of("lstm.weight_ih_l0"), layer_of("weight")
        ('body.fc', 'lstm', 'weight')
    """
    layer, dot, key = name.rpartition(".")
    return layer if dot and (key == "weight" or is_recurrent(key)) else name


def is_transposed(module: nn.Module | None) -> bool:
    """Whether it is the Hub's `Conv1D`; nothing is one where nobody has imported transformers."""
    return isinstance(module, getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ()))


def prunable(
    model: nn.Module, ignore: Sequence[str] = (), among: Collection[str] | None = None
) -> dict[str, nn.Parameter]:
    """Name -> weight of every Conv, Linear and recurrent module that trains, less those whose name matches a glob in `ignore`.

    Names are clean (no `module.` and the like), shared weights come once under their first name and are ignored under any
    of their names, ghosts never. A network of which nothing trains is taken as if all of it did. Left out, and named by
    `left_out`, are weights that do not train and weights that their layer does not use as they are. `among` takes exactly
    those of these names, frozen or not: what a run has masked stays masked when others freeze or free it.
    Raises TostError when nothing is left, when a glob matches nothing, on weights that `torch.nn.utils.prune` hides under
    another name, on integers and 8-bit floats, on a model with lazy or meta tensors, and on one name for two layers.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, 10))
        >>> list(prunable(net, ignore=["2.*"]))
        ['0.weight']
    """
    _check_values(model)
    found: dict[str, nn.Parameter] = {}
    for name, module, why_not in _layers(model, ignore):
        if name in among if among is not None else why_not is None:
            if (weight := module._parameters.get(key_of(name))) is None:
                raise TostError(
                    f"{name}: expected the weight that was stored there at attach, got one that is computed from others "
                    f"(weight norm, a parametrization); do that before attach, or leave it out"
                )
            found.setdefault(name, weight)
    if not found:
        left = "; ".join(left_out(model, ignore))
        raise TostError(
            f"{type(model).__name__}: expected Conv, Linear or recurrent weights to prune, got none; check the model and `ignore`"
            + (f" (left out: {left})" if left else "")
        )
    return found


def left_out(model: nn.Module, ignore: Sequence[str] = ()) -> list[str]:
    """What of a network gets no mask though nobody asked to leave it alone, in words: layers that do not train, weights that
    their layers do not use as they are, and parameters of two and more dimensions in modules of other kinds.

    Example:
        >>> left_out(nn.Sequential(nn.Linear(2, 2), nn.Embedding(2, 4)))
        ['masks of Embedding (1.weight)']
    """
    groups: dict[str, list[str]] = {}
    held: set[int] = set()
    for name, module, why_not in _layers(model, ignore):
        held.update(id(param) for param in module.parameters())
        if why_not not in (None, _IGNORED):
            groups.setdefault(why_not, []).append(name.removesuffix(".weight"))
    for path, module in plain_modules(model):
        for key, param in module._parameters.items():
            if (
                param is not None
                and param.requires_grad
                and id(param) not in held
                and sum(s > 1 for s in param.shape) > 1
            ):
                held.add(id(param))
                groups.setdefault(type(module).__name__, []).append(clean_name(f"{path}.{key}" if path else key))
    return [f"masks of {why} ({some(names, 3)})" for why, names in groups.items()]


_IGNORED, _FROZEN = "ignored", "frozen layers"


def _layers(model: nn.Module, ignore: Sequence[str]) -> Iterator[tuple[str, nn.Module, str | None]]:
    """The name of each layer's weight, the layer, and why it is not prunable (None: it is), each weight once."""
    called: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        called.setdefault(id(param), []).append(clean_name(name))
    all_frozen = not any(param.requires_grad for param in model.parameters())
    used: set[str] = set()
    seen: set[int] = set()
    names: list[str] = []
    for path, module in plain_modules(model):
        if not is_layer(module):
            continue
        for key in weight_keys(module):
            name = clean_name(f"{path}.{key}" if path else key)
            names.append(name)
            weight = module._parameters.get(key)
            globs = [glob for glob in ignore if any(matches(n, glob) for n in [name, *called.get(id(weight), [])])]
            used.update(globs)
            if weight is None or id(weight) not in seen:
                seen.add(id(weight))
                yield name, module, _IGNORED if globs else _why_not(name, module, all_frozen)
    missed = [glob for glob in ignore if glob not in used]
    if missed:
        raise TostError(f"ignore: expected globs that match a layer, got {missed[0]!r}; layers: {some(names)}")


def matches(name: str, glob: str) -> bool:
    """Whether the glob names this weight, or the layer that has it."""
    return fnmatchcase(name, glob) or fnmatchcase(layer_of(name), glob)


def key_of(name: str) -> str:
    """What its layer calls a weight."""
    return name.rpartition(".")[2]


def _why_not(name: str, module: nn.Module, all_frozen: bool) -> str | None:
    """Why a layer that nobody ignores has no weight to prune; None where it has."""
    key = key_of(name)
    weight, trains = module._parameters.get(key), any(param.requires_grad for param in module.parameters())
    if weight is None and f"{key}_orig" in module._parameters and not _spectral(module):
        raise TostError(
            f"{name}: expected a plain parameter, got one that torch.nn.utils.prune hides; call "
            f"torch.nn.utils.prune.remove on it first (its zeros stay: from_zeros), or add it to `ignore`"
        )
    if weight is None:
        return "reparametrised weights" if trains else _FROZEN
    if weight.dtype not in _DTYPES:
        raise TostError(
            f"{name}: expected a floating-point weight of 16 bits or more, got {weight.dtype}; prune before the model is "
            f"quantized, or add {layer_of(name)!r} to `ignore`"
        )
    if not (weight.requires_grad or all_frozen):
        return _FROZEN
    if not weight.numel():
        return "weights without numbers"
    lost = not isinstance(module, nn.RNNBase) and transforms(module)
    return f"{type(module).__name__}, which transforms its weight" if lost else None


def _spectral(module: nn.Module) -> bool:
    """Whether it is torch's older spectral norm that hides the weight, under the name that pruning gives to one."""
    return any(type(hook).__name__ == "SpectralNorm" for hook in module._forward_pre_hooks.values())


def _check_values(model: nn.Module) -> None:
    """Raise TostError on tensors that have no values yet: whatever is attached to them now would not fit them later."""
    seen: dict[str, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        ours = name.rpartition(".")[2].startswith("tost_")  # a wrapper may have what its network has
        if not ours and seen.setdefault(clean_name(name), name) != name:
            raise TostError(
                f"{clean_name(name)}: expected one tensor of this name, got {seen[clean_name(name)]} and {name}, which differ "
                f"by a prefix that wrappers put in front; give the attribute another name than `module`"
            )
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
    """Name -> the module that holds this weight, for the names of `prunable`; the name's last part is what it is called there."""
    by_id = {id(param): name for name, param in params.items()}
    found: dict[str, nn.Module] = {}
    for _, module in plain_modules(model):
        held = dict(module._parameters.items()) if is_layer(module) else {}
        for key in weight_keys(module) if held else ():
            name = by_id.get(id(held.get(key)))
            if name is not None:
                found.setdefault(name, module)
    return found


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives; the CPU for a model without parameters."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
