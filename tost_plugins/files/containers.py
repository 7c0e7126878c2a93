"""Whatever people keep weights and masks in, as tensors by name: a table of containers, each recognised by what it holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.files.arrays import is_exported, is_numpy, is_script, read_exported, read_numpy, read_script
from tost_plugins.files.distributed import read_distributed
from tost_plugins.files.folders import is_distributed, is_index, locate, shards
from tost_plugins.files.nested import flatten
from tost_plugins.files.tensors import read_tensors


class Contents(NamedTuple):
    """Tensors by the names that they have where they lie, the metadata of a safetensors file, and where that is."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    path: Path


class Container(NamedTuple):
    """One kind: what made it, whether a path is one, and how its tensors are read."""

    name: str
    holds: Callable[[Path], bool]
    read: Callable[[Path], dict[str, Tensor]]


def _shards(index: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in shards(index):
        found |= read_tensors(path)[0]
    return found


#: In this order; what none of them is, is a file of safetensors or torch.save.
CONTAINERS = (
    Container("torch.distributed.checkpoint", is_distributed, lambda path: flatten(read_distributed(path), path)),
    Container("shards with an index", is_index, _shards),
    Container("np.savez", is_numpy, read_numpy),
    Container("torch.export.save", is_exported, read_exported),
    Container("torch.jit.save", is_script, read_script),
)

#: What is named and not read, by the ends of names, and what to do instead.
NAMED = {
    ".npy": "one array of NumPy, which has no name; np.savez(path, **{name: mask})",
    ".onnx": "an ONNX file, whose weights have no names that are sure; use the checkpoint that it was made of",
    ".h5": "a file of HDF5; save the weights with torch.save or np.savez",
    ".keras": "a file of Keras; save the weights with np.savez",
    ".gguf": "a file of GGUF, whose weights are quantized; use the checkpoint that it was made of",
    ".tflite": "a file of TensorFlow Lite; save the weights with np.savez",
    ".msgpack": "a file of Flax; save the weights with safetensors or np.savez",
    ".pdparams": "a file of Paddle; save the weights with np.savez",
    ".mlmodel": "a file of Core ML; use the checkpoint that it was made of",
    ".engine": "a file of TensorRT; use the checkpoint that it was made of",
    **dict.fromkeys((".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z"), "a packed file; unpack it, and pass what was in it"),
}
PEFT = "those that PEFT adds to a network; merge_and_unload() there, then save the network"


def read(source: str | Path, first: Sequence[str] = ()) -> Contents | None:
    """The tensors in a file or a folder of any kind; None where there is none.

    `first` are names of files to look for in a folder before others. Nothing in a file is run. Raises TostError for what is
    torn, is a part of something, has more than tensors in it, would take far more memory than it is long, or is not read.
    """
    try:
        path = locate(Path(source), first)
        return None if path is None else _read(path)
    except OSError as error:
        raise TostError(
            f"{source}: expected what can be read, got {error.strerror or error}; check its permissions"
        ) from None


def _read(path: Path) -> Contents:
    said = NAMED.get(path.suffix)
    if path.name.startswith("adapter_model."):
        said = PEFT
    if said is not None:
        raise TostError(f"{path}: expected tensors with names, got {said}")
    for container in CONTAINERS:
        if container.holds(path):
            return Contents(container.read(path), {}, path)
    return Contents(*read_tensors(path), path)
