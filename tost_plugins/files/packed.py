"""Packed files: of each sparse tensor a bit for every number and the numbers that are not 0, in one safetensors file."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from tost_plugins.errors import TostError, shown
from tost_plugins.files.atomic import replacing
from tost_plugins.files.tensors import comparable, read_tensors

#: The key of a packed file's metadata; its value is JSON: "version", "checksum", the "shapes" of what
#: is packed, the "sizes" of modules that are smaller than in the usual network.
FORMAT = "tost_packed"
VERSION = 1

_BITS = "bits:"  # in front of a tensor's name: where it is not 0; under the name itself are the numbers there, in order


class Packed(NamedTuple):
    """What a packed file holds: whole tensors, and of the modules that are smaller than in the usual network the sizes there
    and here."""

    tensors: dict[str, Tensor]
    sizes: dict[str, dict[str, tuple[int, int]]]


def save_packed(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    module_sizes: Mapping[str, Mapping[str, tuple[int, int]]] = MappingProxyType({}),
    pack: bool = True,
) -> None:
    """Write tensors to a packed file; each that becomes smaller so is packed, the others are written as they are.

    Reading them back gives the same bits, but for the sign of a zero. `module_sizes` are those of a compact network, see
    `sizes.changed`. Without `pack` all tensors are written as they are, for every reader of safetensors.
    """
    path = Path(path)
    if not isinstance(tensors, Mapping):
        raise TostError(
            f"packed file {path}: expected a state dict, got {type(tensors).__name__}; pass model.state_dict()"
        )
    content: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        rows = _rows(tensor)
        kept = comparable(tensor).reshape(-1) != 0  # a removed weight may be -0.0
        if pack and (tensor.numel() + 7) // 8 + int(kept.sum()) * tensor.element_size() < rows.numel():
            shapes[name] = list(tensor.shape)
            content[_BITS + name] = torch.from_numpy(np.packbits(kept.numpy()))
            tensor = rows[kept].reshape(-1).view(tensor.dtype)
        content[name] = tensor
    if len(content) < len(tensors) + len(shapes):
        raise TostError(f"packed file {path}: expected names without {_BITS!r} in front, got others; rename them")
    sizes_of = {name: dict(given) for name, given in module_sizes.items()}
    about = json.dumps({"version": VERSION, "checksum": checksum(content), "shapes": shapes, "sizes": sizes_of})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(save(content, metadata={FORMAT: about}))


def read_packed(path: str | Path) -> Packed:
    """What a packed file holds; raises TostError where it is damaged, of a later version, or another kind of file."""
    if not isinstance(path, str | PathLike) or not os.path.isfile(path):
        raise TostError(f"packed file {shown(path)}: expected an existing file, got none; check the path")
    return unpacked(Path(path), *read_tensors(Path(path)))


def unpacked(path: Path, content: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Packed:
    """The same of what has been read from a file already."""
    if FORMAT not in metadata:
        raise TostError(
            f"packed file {path}: expected a file of tost export --packed or --compact, got another one; load it with "
            f"model.load_state_dict"
        )
    try:
        about = json.loads(metadata[FORMAT])
        if isinstance(about["version"], int) and about["version"] > VERSION:
            raise TostError(
                f"packed file {path}: expected a version up to {VERSION}, got {shown(about['version'])}; it was written by a "
                f"later tost_plugins: pip install --upgrade tost_plugins"
            )
        if type(about["version"]) is not int or about["version"] < 1:
            raise ValueError("in its version")
        if about["checksum"] != checksum(content):
            raise ValueError("other numbers than were written")
        packed = {name: _unpacked(name, shape, content) for name, shape in about["shapes"].items()}
        plain = {name: tensor for name, tensor in content.items() if not name.startswith(_BITS)}
        if len(plain) + len(packed) != len(content):
            raise ValueError("bits of no tensor")
        return Packed({name: packed.get(name, tensor) for name, tensor in plain.items()}, _sizes(about["sizes"]))
    except TostError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, RecursionError, OverflowError) as error:
        raise TostError(
            f"packed file {path}: expected numbers that fit the shapes it names, got a mismatch ({error}); export it again"
        ) from None


def checksum(content: Mapping[str, Tensor]) -> int:
    """Of all names and numbers in a file."""
    total = 0
    for name in sorted(content):
        total = zlib.crc32(_rows(content[name].contiguous()).numpy().data, zlib.crc32(name.encode(), total))
    return total


def _rows(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, a row for each number."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
        return tensor.reshape(-1).view(torch.uint8).reshape(-1, 2 * tensor.element_size())
    return tensor.reshape(-1).view(torch.uint8).reshape(-1, tensor.element_size())


def _unpacked(name: str, shape: Any, content: Mapping[str, Tensor]) -> Tensor:
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"in {name}")
    size, bits, values = math.prod(shape), content[_BITS + name], content[name]
    if bits.dtype != torch.uint8 or bits.shape != ((size + 7) // 8,) or values.ndim != 1 or values.is_complex():
        raise ValueError(f"in {name}")
    kept = torch.from_numpy(np.unpackbits(bits.numpy())).bool()
    if bool(kept[size:].any()) or int(kept.sum()) != len(values):
        raise ValueError(f"in {name}")
    rows = torch.zeros(size, values.element_size(), dtype=torch.uint8)
    rows[kept[:size]] = _rows(values.contiguous())
    return rows.reshape(-1).view(values.dtype).reshape(shape)


def _sizes(given: Any) -> dict[str, dict[str, tuple[int, int]]]:
    found = {name: {key: tuple(pair) for key, pair in values.items()} for name, values in given.items()}
    pairs = [pair for values in found.values() for pair in values.values()]
    if not all(len(pair) == 2 and all(type(size) is int for size in pair) for pair in pairs):
        raise ValueError("in the sizes of modules")
    return found
