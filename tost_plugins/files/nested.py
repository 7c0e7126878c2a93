"""The tensors inside what a script has saved: the state dict of a checkpoint, and the masks that lie beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.training.params import clean_name, some

_WEIGHTS = ("state_dict", "state", "model", "model_state_dict", "net")
_MASKS = ("masks", "mask")
_NOT_WEIGHTS = re.compile(
    r"optim|sched|scaler|random|rng|metric|callback|loop|^args$|hyper_?param|config", re.IGNORECASE
)
_DEPTH, _MOST = 4, 1000  # how far, and in how many dicts, one of tensors is looked for


def flatten(content: object, path: Path | str) -> dict[str, Tensor]:
    """The tensors by name inside a loaded checkpoint: what lies under `state_dict`, `model`, `state` and the like, or else in
    the only dict of tensors that there is; arrays of NumPy too. Masks in a dict of their own beside the weights are put to
    them as `weight_mask`; alone they are the tensors. What TostLightning has put beside a state dict, under `tost`, is part
    of it.

    Raises TostError where there are none, where several dicts have some, and for masks that are of none of the weights.

    Example:
        >>> saved = {"epoch": 3, "model": {"fc.weight": torch.ones(1, 2)}, "masks": {"fc": torch.eye(1, 2)}}
        >>> list(flatten(saved, "x.pt"))
        ['fc.weight', 'fc.weight_mask']
    """
    if isinstance(content, Mapping) and isinstance(aside := content.get("tost"), Mapping) and "state_dict" in aside:
        content = {**content["state_dict"], **aside["state_dict"]}
    masks = next(filter(None, (_masks(each, path) for _, each in _within(content))), {})
    for _ in range(_DEPTH):  # a dict may hold itself
        inner = content if isinstance(content, Mapping) else {}
        content = next((inner[key] for key in _WEIGHTS if isinstance(inner.get(key), Mapping)), content)
    tensors = _tensors(content)
    if all(tensor.ndim == 0 for tensor in tensors.values()):
        tensors = _only(content, path) or masks or tensors
    if not tensors:
        raise TostError(
            f"{path}: expected a dict of tensors, got {type(content).__name__} without any; "
            f"save model.state_dict() or a dict name -> mask"
        )
    if "n_averaged" in tensors and all(name.startswith("module.") for name in tensors if name != "n_averaged"):
        del tensors["n_averaged"]  # torch's AveragedModel counts in it, around the network
    return tensors if tensors is masks else tensors | _beside(tensors, masks, path)


def _tensors(content: object) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    return {str(key): _tensor(value) for key, value in content.items() if _is_one(value)}


def _is_one(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biuf")


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))


def _masks(content: Mapping[Any, Any], path: Path | str) -> dict[str, Tensor]:
    """The masks that lie in a checkpoint as a dict of their own."""
    for key in _MASKS:
        value = content.get(key)
        if isinstance(value, (list, tuple)) and any(map(_is_one, value)):
            raise TostError(
                f"{path}: expected masks by the names of their weights, got a list of {len(value)} under {key!r}; "
                f"save a dict name -> mask"
            )
        if found := _tensors(value) or _only(value, path):
            return found
    return {}


def _only(content: object, path: Path | str) -> dict[str, Tensor]:
    """The only dict of tensors in a checkpoint, whatever it is called; {} where there is none."""
    tensors = {keys: _tensors(each) for keys, each in _within(content)}
    found = {keys: each for keys, each in tensors.items() if any(tensor.ndim for tensor in each.values())}
    if len(found) > 1:
        names = some([".".join(keys) for keys in found], 4)
        raise TostError(
            f"{path}: expected one state dict, got several ({names}); save one of them as a file of its own"
        )
    return next(iter(found.values()), {})


def _within(content: object) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """Dicts within others, from the outside in, by their keys; without masks, and what is kept of optimizers and the like."""
    left: list[tuple[tuple[str, ...], object]] = [((), content)]
    seen: set[int] = set()
    while left and len(seen) < _MOST:
        keys, each = left.pop(0)
        if not isinstance(each, Mapping) or id(each) in seen:
            continue
        seen.add(id(each))
        yield keys, each
        if len(keys) < _DEPTH:
            left += [
                ((*keys, key), value)
                for key, value in each.items()
                if isinstance(key, str) and key not in _MASKS and not _NOT_WEIGHTS.search(key)
            ]


def _beside(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], path: Path | str) -> dict[str, Tensor]:
    """The masks by the names that they have beside their weights, or those of the weights' layers."""
    weights = {clean_name(name).removesuffix("_orig"): name for name in tensors}
    found, strange = {}, []
    for name, mask in masks.items():
        near = (clean_name(name), f"{clean_name(name)}.weight", clean_name(name).removesuffix("_mask"))
        weight = next((weight for weight in near if weight in weights), None)
        if weight is None or tensors[weights[weight]].shape != mask.shape:
            strange.append(name)
        else:
            found[f"{weights[weight].removesuffix('_orig')}_mask"] = mask
    if strange:
        raise TostError(
            f"{path}: expected masks of the weights beside them, got {some(strange, 3)}, which fit none; "
            f"save the masks alone, by the names of their weights"
        )
    return found
