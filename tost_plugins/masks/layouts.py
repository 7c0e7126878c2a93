"""Which tensors of a file are masks, and of which weights: our buffers, torch's and others' ways to keep both side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.files.tensors import comparable
from tost_plugins.training.params import some

_WEIGHT = re.compile(r"(?:^|[._])weight(?:_(?:ih|hh|hr)_l\d+(?:_reverse)?)?$")
_PARAMETRIZED = re.compile(r"^(?P<layer>(?:.*\.)?)parametrizations\.(?P<key>[^.]+)\.(?P<part>original\d*|\d+\..+)$")
_MASK_PART = re.compile(r"^\d+\.mask$")
_GRADIENT = re.compile(r"^\d+\.dense_grad$")  # sparsimony's, for weights that grow


class Layout(NamedTuple):
    """What is in a file: the `plain` network's tensors, the `masks` by the names of their weights, and the `hidden` weights,
    which something of which the file does not say enough computes from what it has."""

    plain: dict[str, Tensor]
    masks: dict[str, Tensor]
    hidden: list[str]


def layout(tensors: Mapping[str, Tensor]) -> Layout:
    """Tell masks and weights apart, by what lies beside what.

    A mask is `weight_mask` beside `weight` (ours) or `weight_orig` (torch.nn.utils.prune), `mask` beside `weight`, or
    `parametrizations.weight.0.mask` beside its `original` (torch.nn.utils.parametrize, sparsimony); also a `weight_mask` alone.
    A buffer that is called so and has no weight of its shape (Swin's `attn_mask`) is a tensor as any other.
    """
    plain, masks, hidden = {}, {}, []
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _PARAMETRIZED.match(name)
        if match is not None:
            groups.setdefault(f"{match['layer']}{match['key']}", {})[match["part"]] = tensor
            continue
        weight = _masked(name, tensor, tensors)
        if weight is not None:
            masks[weight] = tensor
            continue
        plain[name] = tensor
    for name in [name for name in plain if name.endswith("_orig")]:
        weight = name.removesuffix("_orig")
        if weight in masks:
            plain = {weight if other == name else other: tensor for other, tensor in plain.items()}
        elif weight not in plain:
            hidden.append(weight)  # of the old spectral norm
    hidden += [
        name[:-2] for name in plain if name.endswith("_v") and f"{name[:-2]}_g" in plain
    ]  # of the old weight norm
    for name, parts in groups.items():
        kept = [part for key, part in parts.items() if _MASK_PART.match(key)]
        if kept and "original" in parts:
            plain[name], masks[name] = parts["original"], _product(kept)
            others = [
                key for key in parts if key != "original" and not _MASK_PART.match(key) and not _GRADIENT.match(key)
            ]
        else:
            others = list(parts)
            plain |= {f"{name.rpartition('.')[0]}.parametrizations.{name.rpartition('.')[2]}.{key}".removeprefix("."): part
                      for key, part in parts.items()}  # fmt: skip
        hidden += [name] if others else []
    return Layout(plain, masks, hidden)


def mask_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mask in a file's tensors, by weights: its masks; else all of them, where they hold 0 and 1 alone; else where its
    weights are not 0. Raises TostError where none of them is there, or where the weights are computed from others."""
    found = layout(tensors)
    if found.masks:
        return found.masks
    if all(map(only_0_and_1, tensors.values())):
        ends = all(name.endswith("_mask") for name in tensors)
        return {name.removesuffix("_mask") if ends else name: tensor for name, tensor in tensors.items()}
    if found.hidden:
        raise TostError(
            f"expected weights, or masks beside them, got {some(found.hidden, 3)} under a parametrization that the file does not "
            f"say enough of; take it off first (torch.nn.utils.parametrize.remove_parametrizations, squash_mask, "
            f"remove_weight_norm, remove_spectral_norm), then save"
        )
    numbers = {
        name: t for name, t in tensors.items() if t.ndim >= 2 and t.is_floating_point() and not name.endswith("_mask")
    }
    weights = {name: tensor for name, tensor in numbers.items() if _WEIGHT.search(name)} or numbers
    if not weights:
        raise TostError("expected masks or weights, got neither; save model.state_dict() or a dict name -> mask")
    return {name: comparable(tensor) != 0 for name, tensor in weights.items()}


def only_0_and_1(tensor: Tensor) -> bool:
    """Whether a tensor may be a mask."""
    tensor = comparable(tensor)
    return bool(((tensor == 0) | (tensor == 1)).all())


def _masked(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> str | None:
    """The weight whose mask a tensor is; None for one that is none."""
    layer, dot, key = name.rpartition(".")
    weight = f"{layer}{dot}weight" if key == "mask" else name.removesuffix("_mask")
    if key != "mask" and not key.endswith("_mask"):
        return None
    if key != "mask" and _WEIGHT.search(weight):
        return weight  # alone, too: export asks for its weight
    beside = [weight] if key == "mask" else [weight, f"{weight}_orig"]
    fits = any(other in tensors and tensors[other].shape == tensor.shape for other in beside)
    return weight if fits and only_0_and_1(tensor) else None


def _product(masks: list[Tensor]) -> Tensor:
    kept = comparable(masks[0])
    for other in masks[1:]:
        kept = torch.logical_and(kept, comparable(other))
    return kept
