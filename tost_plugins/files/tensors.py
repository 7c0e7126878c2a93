"""Tensors in files of any kind, safetensors or torch.save, under flat and clean names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.files import pickles
from tost_plugins.files.atomic import replacing
from tost_plugins.files.nested import flatten
from tost_plugins.training.params import clean_name


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors or torch.save file under flat names, and the metadata, which only the first may have.

    Pickles load with `weights_only=True`: a file that is more than plain tensors and containers is an error.
    """
    if path.suffix == ".safetensors" or _looks_like_safetensors(path):
        try:
            with safe_open(str(path), framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
        except Exception as error:  # for headers that make no sense it raises many kinds
            raise TostError(
                f"{path}: expected a whole safetensors file, got a damaged one ({error}); copy or save it again"
            ) from None
    tensors = flatten(pickles.load(path), path)
    pickles.check_sizes(tensors.values(), path)
    return tensors, {}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file of copies: tied weights are one tensor under two names, which it would refuse."""
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with replacing(path) as temporary:
        save_file(copies, str(temporary))


def by_clean_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefixes of wrappers; raises TostError where two of them have the same name then."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if found.setdefault(clean_name(name), tensor) is not tensor:
            raise TostError(f"expected one tensor {clean_name(name)}, got {name} and another; remove one of them")
    return found


def comparable(tensor: Tensor) -> Tensor:
    """The same numbers in a type that torch can compare: not so floats of 8 bits and unsigned integers of 16 and more."""
    if tensor.is_floating_point() and tensor.element_size() == 1:
        return tensor.float()
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else tensor


def _looks_like_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"
