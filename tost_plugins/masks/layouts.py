"""Which tensors of a file are masks, and of which weights: our buffers, torch's and others' ways to keep both side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.files.containers import PEFT
from tost_plugins.files.tensors import comparable
from tost_plugins.masks.quantized import added, check_quantized
from tost_plugins.training.log import say
from tost_plugins.training.params import some

_WEIGHT = re.compile(r"(?:^|[._])weight(?:_(?:ih|hh|hr)_l\d+(?:_reverse)?)?$")
_PARAMETRIZED = re.compile(r"^(?P<layer>(?:.*\.)?)parametrizations\.(?P<key>[^.]+)\.(?P<part>original\d*|\d+\..+)$")
_MASK_PART = re.compile(r"^\d+\.mask$")
_GRADIENT = re.compile(r"^\d+\.dense_grad$")  # sparsimony's, for weights that grow


class Layout(NamedTuple):
    """What is in a file: the `plain` network's tensors, the `masks` by the names of their weights, tensors that are 0 where the
    weight that is computed from them is (`zeros`: weight norm, spectral norm), the `hidden` weights, which are computed from what
    the file has in a way that it does not say, and `strange` ones: masks by their names and values, of nobody knows what."""

    plain: dict[str, Tensor]
    masks: dict[str, Tensor]
    zeros: dict[str, Tensor]
    hidden: list[str]
    strange: list[str]


def layout(tensors: Mapping[str, Tensor]) -> Layout:
    """Tell masks and weights apart, by what lies beside what.

    A mask is `weight_mask` beside `weight` (ours) or `weight_orig` (torch.nn.utils.prune), `mask`, `pruning_mask` or what else
    has the word in it beside `weight`, or `parametrizations.weight.0.mask` beside its `original` (torch.nn.utils.parametrize,
    sparsimony); also a `weight_mask` alone.
    A buffer that is called so and has no weight of its shape (Swin's `attn_mask`) is a tensor as any other. What a
    parametrization without a mask computes from stays in `plain` under its names.
    """
    found = Layout({}, {}, {}, [], [])
    for name, tensor in tensors.items():
        weight = _masked(name, tensor, tensors)
        if weight is not None:
            found.masks[weight] = tensor
    for name, tensor in tensors.items():
        if _masked(name, tensor, tensors) is None and not _PARAMETRIZED.match(name):
            original = name.endswith("_orig") and name.removesuffix("_orig") in found.masks
            found.plain[name.removesuffix("_orig") if original else name] = tensor
    _old_norms(found)
    shapes = {tensor.shape for name, tensor in found.plain.items() if _is_weight(name, tensor)}
    words = [
        (name, tensor) for name, tensor in found.plain.items() if "mask" in name.lower() and tensor.shape in shapes
    ]
    found.strange.extend(name for name, tensor in words if only_0_and_1(tensor) and not bool((tensor != 0).all()))
    groups: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = _PARAMETRIZED.match(name)
        if match is not None:
            groups.setdefault(f"{match['layer']}{match['key']}", {})[match["part"]] = name
    for weight, names in groups.items():
        _parametrized(found, weight, {part: tensors[name] for part, name in names.items()}, names)
    return found


def mask_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mask in a file's tensors, by weights: its masks; else all of them, where they hold 0 and 1 alone; else where its
    weights are not 0. Raises TostError where none of them is there, or where the file does not say what the weights are."""
    found = layout(tensors)
    if found.masks:
        return found.masks
    check_quantized(found.plain)
    if not found.hidden and all(map(only_0_and_1, tensors.values())):
        ends = all(name.endswith("_mask") for name in tensors)
        return {name.removesuffix("_mask") if ends else name: tensor for name, tensor in tensors.items()}
    check_hidden(found)
    check_strange(found)
    numbers = {
        name: t
        for name, t in tensors.items()
        if name not in found.strange
        and t.ndim >= 2
        and (t.is_floating_point() or t.is_complex())
        and not name.endswith("_mask")
        and not added(name, t)
    }
    weights = {name: tensor for name, tensor in numbers.items() if _WEIGHT.search(name)} | found.zeros or numbers
    if not weights:
        if any(added(name, tensor) for name, tensor in tensors.items()):
            raise TostError(f"expected masks or weights, got {PEFT}")
        raise TostError("expected masks or weights, got neither; save model.state_dict() or a dict name -> mask")
    return {name: comparable(tensor) != 0 for name, tensor in weights.items()}


def check_hidden(found: Layout) -> None:
    """Raise TostError where a file has weights that it does not say enough of; one line where others in it are sparse."""
    if not found.hidden or found.masks:
        return
    text = (
        f"{some(found.hidden, 3)} under a parametrization of which the file does not say what it does (torch.ao.pruning leaves "
        f"its masks out); take it off, then save (sparsifier.squash_mask, torch.nn.utils.parametrize.remove_parametrizations)"
    )
    others = [tensor for name, tensor in found.plain.items() if _is_weight(name, tensor)]
    if all(bool((comparable(tensor) != 0).all()) for tensor in [*others, *found.zeros.values()]):
        raise TostError(f"expected weights, or masks beside them, got {text}")
    say(f"checkpoint: without {text}")


def check_strange(found: Layout) -> None:
    """Raise TostError for masks of which a file does not say whose they are, where nothing else in it is sparse."""
    weights = [tensor for name, tensor in found.plain.items() if name not in found.strange and _is_weight(name, tensor)]
    sparse = found.masks or any(not bool((comparable(t) != 0).all()) for t in [*weights, *found.zeros.values()])
    if found.strange and not sparse:
        raise TostError(
            f"expected masks by the names of their weights, got {some(found.strange, 3)} beside weights without zeros; "
            f"save a dict name -> mask"
        )


def _is_weight(name: str, tensor: Tensor) -> bool:
    return _WEIGHT.search(name) is not None and tensor.ndim >= 2


def only_0_and_1(tensor: Tensor) -> bool:
    """Whether a tensor may be a mask."""
    tensor = comparable(tensor)
    return bool(((tensor == 0) | (tensor == 1)).all())


def _masked(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> str | None:
    """The weight whose mask a tensor is; None for one that is none."""
    layer, dot, key = name.rpartition(".")
    weight = name.removesuffix("_mask")
    if "mask" not in key.lower().split("_"):
        return None
    if weight != name and _WEIGHT.search(weight):
        return weight  # alone, too: export asks for its weight
    own = f"{layer}{dot}weight"
    for other in (weight, own) if key != "mask" and key.endswith("_mask") else (own,):
        if any(name in tensors and tensors[name].shape == tensor.shape for name in (other, f"{other}_orig")):
            return other if only_0_and_1(tensor) else None
    return None


def _old_norms(found: Layout) -> None:
    """What `torch.nn.utils.spectral_norm` and `weight_norm` make: weights that are 0 where `weight_orig` is, or `weight_v`."""
    for name, tensor in found.plain.items():
        weight = name.removesuffix("_orig")
        if weight != name and f"{weight}_u" in found.plain:
            found.zeros[weight] = tensor
        weight = name.removesuffix("_v")
        if weight != name and f"{weight}_g" in found.plain:
            found.zeros[weight] = tensor.mul(found.plain[f"{weight}_g"] != 0)


def _parametrized(found: Layout, weight: str, parts: dict[str, Tensor], names: dict[str, str]) -> None:
    """Put a weight of `torch.nn.utils.parametrize` where it belongs."""
    masks = [part for key, part in parts.items() if _MASK_PART.match(key)]
    others = {key for key in parts if not _MASK_PART.match(key) and not _GRADIENT.match(key)}
    if masks and "original" in parts:
        found.plain[weight], found.masks[weight] = parts["original"], _product(masks)
        if others != {"original"}:
            found.hidden.append(weight)
        return
    found.plain.update({names[key]: part for key, part in parts.items()})
    if others == {"original0", "original1"} and parts["original0"].ndim == parts["original1"].ndim:  # of weight norm
        found.zeros[weight] = parts["original1"].mul(parts["original0"] != 0)
    elif others == {"original", "0._u", "0._v"}:  # of spectral norm
        found.zeros[weight] = parts["original"]
    else:
        found.hidden.append(weight)


def _product(masks: list[Tensor]) -> Tensor:
    kept = comparable(masks[0])
    for other in masks[1:]:
        kept = torch.logical_and(kept, comparable(other))
    return kept
