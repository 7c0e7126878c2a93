"""Folders of torch.distributed.checkpoint: the parts of each tensor put together again, and no code in its index run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.files import pickles
from tost_plugins.files.records import Record, read_records

INDEX = ".metadata"


def read_distributed(folder: Path) -> dict[str, Any]:
    """What was saved, as the nested dicts that it was, with tensors alone: those of the model, the optimizers and others.

    Its index is a pickle, which torch's own reader would run; here it is read as records. Raises TostError where it is
    damaged, where a part of a tensor is missing, and for parts that are compressed.
    """
    try:
        index = read_records((folder / INDEX).read_bytes()).state
        wanted = {name: tuple(about.state["size"].args[0]) for name, about in index["state_dict_metadata"].items()
                  if about.name == "TensorStorageMetadata"}  # fmt: skip
        parts: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {name: [] for name in wanted}
        left = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        for key, place in index["storage_data"].items():
            if key.state["fqn"] in parts:
                part = _part(folder, place)
                left -= part.numel() * part.element_size()
                if left < 0:
                    raise ValueError("parts that stand for more than the folder holds")
                parts[key.state["fqn"]].append((_offset(key, wanted[key.state["fqn"]]), part))
        whole = {name: _whole(name, shape, parts[name]) for name, shape in wanted.items()}
        return _nested(whole, index.get("planner_data") or {})
    except TostError:
        raise
    except Exception as error:  # a stranger's index can be wrong in many ways
        raise TostError(
            f"{folder}: expected a whole folder of torch.distributed.checkpoint, got a damaged one "
            f"({type(error).__name__}: {error}); copy or save it again"
        ) from None


def _offset(key: Record, shape: tuple[int, ...]) -> tuple[int, ...]:
    offset = key.state.get("offset")
    return (0,) * len(shape) if offset is None else tuple(offset.args[0])


def _part(folder: Path, place: Record) -> Tensor:
    """One part of a tensor: a file of torch.save, within a file of the folder."""
    name, start, length = (place.state[key] for key in ("relative_path", "offset", "length"))
    if place.state.get("transform_descriptors"):
        raise TostError(
            f"{folder}: expected parts as torch.save has them, got compressed ones; save it without extensions"
        )
    if PurePath(name).name != name or not 0 <= start <= start + length <= (folder / name).stat().st_size:
        raise ValueError(f"in {name}")
    with (folder / name).open("rb") as file:
        file.seek(start)
        part = pickles.load(folder / name, file.read(length))
    pickles.check_sizes([part], folder / name)  # dense ones
    return part


def _whole(name: str, shape: tuple[int, ...], parts: list[tuple[tuple[int, ...], Tensor]]) -> Tensor:
    """A tensor of all its parts, each number of which is in exactly one."""
    if len(parts) == 1 and tuple(parts[0][1].shape) == shape:
        return parts[0][1]
    if not parts or sum(part.numel() for _, part in parts) != math.prod(shape):
        raise ValueError(f"parts of {name} are missing")
    whole, there = torch.empty(shape, dtype=parts[0][1].dtype), torch.zeros(shape, dtype=torch.bool)
    for offset, part in parts:
        place = tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))
        whole[place], there[place] = part, True
    if not bool(there.all()):
        raise ValueError(f"parts of {name} overlap")
    return whole


def _nested(tensors: dict[str, Tensor], paths: dict[str, Any]) -> dict[str, Any]:
    """The tensors in the nested dicts that they were saved from."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        inner = found
        *outer, last = _path(name, paths)
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = tensor
    return found


def _path(name: str, paths: dict[str, Any]) -> Iterator[str]:
    yield from (str(key) for key in paths[name]) if paths.get(name) else (name,)
