"""Files of torch.save from strangers: plain tensors and values only, and no more memory than the file is long."""

from __future__ import annotations

import argparse
import datetime
import io
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from tost_plugins.errors import TostError


def _number(dtype: np.dtype, content: bytes) -> Any:
    """One of numpy's numbers, such as the best accuracy so far."""
    if dtype.kind not in "biuf" or len(content) != dtype.itemsize:
        raise pickle.UnpicklingError(f"no number: {dtype}")
    return np.frombuffer(content, dtype)[0].item()


_DTYPES = (
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
)
_ARRAY = np.array(0).__reduce__()[0]
#: What checkpoints hold beside tensors: plain values, no code. Composer's have random states, times and versions; those of
#: torchvision, timm and many scripts the arguments of the command and numbers of numpy, whose module had another name once.
_HARMLESS: list[Any] = [
    np.ndarray, np.dtype, *(type(np.dtype(name)) for name in _DTYPES),
    *((_ARRAY, f"{core}.multiarray._reconstruct") for core in ("numpy._core", "numpy.core")),
    *((_number, f"{core}.multiarray.scalar") for core in ("numpy._core", "numpy.core")),
    *((PurePosixPath, f"pathlib{where}.PosixPath") for where in ("", "._local")),
    *((PureWindowsPath, f"pathlib{where}.WindowsPath") for where in ("", "._local")),
    argparse.Namespace, datetime.timedelta, TorchVersion,
]  # fmt: skip

_NESTING = 100_000  # entries in a tuple, with all that is in it: the random state of Python has 625
_SLACK = 1 << 26  # bytes that tensors may have beyond what the file holds: views that were saved as such
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE", "NEWOBJ"}
_KNOWN = _TUPLES | {
    "GLOBAL", "BUILD", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "MARK", "NONE", "NEWFALSE", "NEWTRUE", "EMPTY_TUPLE",
    "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING",
    "BINPERSID", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "LONG1", "PROTO", "STOP",
    "FRAME", "MEMOIZE", "SHORT_BINUNICODE", "STACK_GLOBAL",  # of later protocols, which torch refuses and `records` reads
}  # fmt: skip


def load(path: Path, content: bytes | None = None) -> Any:
    """The content of a file of torch.save, on the CPU; where it is a zip file its tensors are read as they are needed.
    `content` is that of such a file when it lies within `path`, as in archives.

    Raises TostError for a file that is torn, that holds anything else than plain values, or that would take far more
    memory or time than its length stands for.
    """
    try:
        stream: IO[bytes] = path.open("rb") if content is None else io.BytesIO(content)
        with stream:
            zipped = zipfile.is_zipfile(stream)
            stream.seek(0)
            _check_zip(stream) if zipped else _check_legacy(stream)
        source = path if content is None else io.BytesIO(content)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=zipped and content is None)
    except pickle.UnpicklingError:
        raise TostError(
            f"{path}: expected plain tensors, got a pickle with other objects, which could run code; "
            f"save it again as torch.save(model.state_dict(), path)"
        ) from None
    except Exception as error:  # torch.load raises many kinds for torn files
        raise TostError(
            f"{path}: expected a safetensors or torch.save file, got something unreadable "
            f"({error if isinstance(error, Suspect) else type(error).__name__}); copy or save it again"
        ) from None


def check_sizes(tensors: Iterable[Tensor], path: Path) -> None:
    """Raise TostError for tensors that stand for far more numbers than the file holds, as views of one number can."""
    found = [tensor for tensor in tensors if not tensor.is_meta]
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in found)
    if len(found) < len(list(tensors)) or any(tensor.layout != torch.strided for tensor in found):
        raise TostError(f"{path}: expected dense tensors, got sparse or empty ones; save them with to_dense()")
    if claimed > 10 * path.stat().st_size + _SLACK:
        raise TostError(
            f"{path}: expected tensors that the file holds in full, got views that stand for {claimed:,} bytes; "
            f"save them with contiguous()"
        )


class Suspect(Exception):
    """A file that torch.save would never have written."""


def _check_zip(stream: IO[bytes]) -> None:
    length = stream.seek(0, io.SEEK_END)
    with zipfile.ZipFile(stream) as file:
        entries = file.infolist()
        if sum(entry.file_size for entry in entries) > length:
            raise Suspect("compressed, or with parts that overlap")
        for entry in entries:
            if entry.filename.endswith("/byteorder") and file.read(entry) != sys.byteorder.encode():
                raise Suspect("from a machine with another byte order")
            if entry.filename.endswith("data.pkl"):
                with file.open(entry) as inner:
                    check_pickle(inner)


def _check_legacy(stream: IO[bytes]) -> None:
    """Before torch 1.6: five pickles (magic number, version, machine, content, storages) and the numbers behind them."""
    length = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    for _ in range(5):
        if stream.tell() < length:
            check_pickle(stream)


def check_pickle(stream: IO[bytes], strict: bool = False) -> None:
    """Raise for what a reader would do without end: hash tuples of tuples of tuples, or take memory by a number.

    Follows the stack with a size for each thing on it; what torch's reader refuses anyway is left to it, unless `strict`.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    for op, argument, _ in pickletools.genops(stream):
        if op.name not in _KNOWN:
            if strict:
                raise Suspect(f"with {op.name.lower()}")
            return  # an UnpicklingError to come
        if op.name == "GLOBAL" and str(argument).endswith(" bytearray"):
            raise Suspect("it takes memory by a number")
        if op.name == "MARK":
            marks.append(len(stack))
            continue
        if op.name == "MEMOIZE" or op.name.endswith("BINPUT"):
            place: Any = len(memo) if op.name == "MEMOIZE" else argument
            if strict and place > len(memo) + _NESTING:
                raise Suspect("it takes memory by a number")
            memo[place] = stack[-1]
            continue
        start = len(stack) - len(op.stack_before)
        if pickletools.markobject in op.stack_before:
            start = marks.pop() - op.stack_before.index(pickletools.markobject)
        size = (
            1 + sum(stack[start:]) if op.name in _TUPLES else memo.get(argument, 1) if op.name.endswith("BINGET") else 1
        )
        if size > _NESTING:
            raise Suspect("nested without end")
        stack[start:] = [size] * len(op.stack_after)
