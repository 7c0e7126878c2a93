"""Tensors in archives of other programs: NumPy's `.npz`, torch.export's `.pt2` and TorchScript, none of which is run."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.files import pickles
from tost_plugins.files.records import Record, read_records

_RATIO, _SLACK = 100, 1 << 26  # how far an archive may be compressed: times, and bytes beyond that
#: The numbers of types in torch.export's files.
_TYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 10: torch.complex64, 11: torch.complex128, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


def archive(path: Path) -> list[str]:
    """The names of what lies in a zip file; [] for another kind of file."""
    if not zipfile.is_zipfile(path):
        return []
    try:
        with zipfile.ZipFile(path) as file:
            return file.namelist()
    except Exception:  # torn: whoever reads it says so
        return []


def is_numpy(path: Path) -> bool:
    """Whether a file is one of `np.savez`."""
    names = archive(path)
    return bool(names) and all(name.endswith(".npy") for name in names)


def is_exported(path: Path) -> bool:
    """Whether a file is one of `torch.export.save`, of torch 2.7 or of later ones."""
    return any(name == "serialized_exported_program.json" or name.endswith("/archive_format") for name in archive(path))


def is_script(path: Path) -> bool:
    """Whether a file is one of `torch.jit.save`."""
    names = archive(path)
    return any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names)


def read_numpy(path: Path) -> dict[str, Tensor]:
    """The arrays of a file of `np.savez`, by the names that they were given; raises TostError where they have none."""
    found = _reading(path, "np.savez", _arrays)
    if all(name == f"arr_{number}" for number, name in enumerate(found)):
        raise TostError(
            f"{path}: expected arrays with names, got {', '.join(found)}; np.savez(path, **{{name: array}})"
        )
    return found


def read_exported(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a file of `torch.export.save`, by the names that they have in the network."""
    return _reading(path, "torch.export.save", _weights)


def read_script(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a file of `torch.jit.save`, by the names that they have in the network.

    Raises TostError for one whose weights have no names any more (`torch.jit.freeze`).
    """
    found = _reading(path, "torch.jit.save", _attributes)
    if not found:
        raise TostError(
            f"{path}: expected a TorchScript file with weights, got one without names for them, as torch.jit.freeze leaves it; "
            f"save the network before it is frozen"
        )
    return found


def _reading(path: Path, made_with: str, read: Any) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as file:
            if sum(entry.file_size for entry in file.infolist()) > _RATIO * path.stat().st_size + _SLACK:
                raise pickles.Suspect("compressed too far")
            found = read(file, path)
        pickles.check_sizes(found.values(), path)
        return found
    except TostError:
        raise
    except Exception as error:  # a torn archive raises many kinds
        raise TostError(
            f"{path}: expected a whole file of {made_with}, got a damaged one ({type(error).__name__}: {error}); save it again"
        ) from None


def _arrays(file: zipfile.ZipFile, path: Path) -> dict[str, Tensor]:
    found = {}
    for entry in file.infolist():
        with file.open(entry) as stream:
            version = np.lib.format.read_magic(stream)
            head = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, columns_first, kind = head(stream)
            content = stream.read()
        name = entry.filename.removesuffix(".npy")
        if kind.hasobject:
            raise TostError(
                f"{path}: expected arrays of numbers, got one of Python objects ({name}), which would run code when read; save "
                f"what is in it singly: np.savez(path, **{{name: array}})"
            )
        if kind.kind not in "biufc":
            raise TostError(
                f"{path}: expected arrays of numbers, got {kind} in {name}; save the masks or weights alone: "
                f"np.savez(path, **{{name: array}})"
            )
        if len(content) != math.prod(shape) * kind.itemsize:
            raise ValueError(f"in {entry.filename}")
        array = np.frombuffer(content, kind).reshape(shape, order="F" if columns_first else "C")
        native = np.array(array, dtype=kind.newbyteorder("="), order="C")
        found[name] = torch.from_numpy(native)
    return found


def _weights(file: zipfile.ZipFile, path: Path) -> dict[str, Tensor]:
    names = {name.partition("/")[2] or name: name for name in file.namelist()}
    if "serialized_state_dict.pt" in names:  # torch 2.7
        content = pickles.load(path, file.read(names["serialized_state_dict.pt"]))
        return {name: tensor.detach() for name, tensor in content.items() if isinstance(tensor, Tensor)}
    about = json.loads(file.read(names["data/weights/model_weights_config.json"]))["config"]
    return {name: _weight(file, path, names, name, each) for name, each in about.items()}


def _weight(file: zipfile.ZipFile, path: Path, names: dict[str, str], name: str, about: dict[str, Any]) -> Tensor:
    content = file.read(names[f"data/weights/{about['path_name']}"])
    if about["use_pickle"]:
        return pickles.load(path, content).detach()
    meta = about["tensor_meta"]
    shape, strides = ([side["as_int"] for side in meta[key]] for key in ("sizes", "strides"))
    if meta["dtype"] not in _TYPES:
        raise ValueError(f"a type that is not known in {name}")
    return _laid_out(content, _TYPES[meta["dtype"]], meta["storage_offset"]["as_int"], shape, strides)


def _attributes(file: zipfile.ZipFile, path: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript file, whose pickle has one record for each module, with its attributes."""
    root = next(name for name in file.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")).partition("/")[
        0
    ]

    def stored(pid: Any) -> tuple[bytes, torch.dtype]:
        _, kind, key, *_ = pid
        return file.read(f"{root}/data/{key}"), _STORAGES[kind.name]

    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    left = [("", read_records(file.read(f"{root}/data.pkl"), stored))]
    while left:
        prefix, module = left.pop()
        if id(module) in seen or not isinstance(module.state, dict):
            continue
        seen.add(id(module))
        for key, value in module.state.items():
            if isinstance(value, Record) and value.module.startswith("__torch__"):
                left.append((f"{prefix}{key}.", value))
            elif isinstance(value, Record) and value.name.startswith("_rebuild"):
                found[f"{prefix}{key}"] = _rebuilt(value)
    return found


def _rebuilt(tensor: Record) -> Tensor:
    if tensor.name == "_rebuild_parameter":
        return _rebuilt(tensor.args[0])
    if tensor.name != "_rebuild_tensor_v2":
        raise ValueError(f"a tensor of another kind, {tensor.name}")
    (content, kind), offset, shape, strides = tensor.args[:4]
    return _laid_out(content, kind, offset, shape, strides)


def _laid_out(content: bytes, kind: torch.dtype, offset: int, shape: Any, strides: Any) -> Tensor:
    """A tensor of these bytes; torch refuses what lies outside of them."""
    if math.prod(shape) == 0:
        return torch.empty(tuple(shape), dtype=kind)
    flat = torch.frombuffer(bytearray(content), dtype=kind)
    if math.prod(shape) > flat.numel():
        raise ValueError("a view of fewer numbers than it stands for")
    return torch.as_strided(flat, tuple(shape), tuple(strides), offset).clone()
