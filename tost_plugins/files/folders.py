"""Folders with a network's weights: which of their files it is, shards put together, and a shard alone refused."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from tost_plugins.errors import TostError
from tost_plugins.files.atomic import read_json
from tost_plugins.files.distributed import INDEX
from tost_plugins.training.params import some

#: What trainers call the whole network's weights, the first that is there; an index stands for its shards.
NAMES = (
    "model.safetensors", "model.safetensors.index.json", "last.pt", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json", "pytorch_model_fsdp_0",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".npz", ".pt2", ".index.json")
_NOT_WEIGHTS = re.compile(
    r"(?:optimizer|scheduler|scaler|random_states|rng_state|training_args|sampler|custom_checkpoint)"
)
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<end>\.\w+)$")
#: Folders that are named and not read, by what lies in them, and what to do instead.
NAMED = {
    "zero_to_fp32.py": "a folder of DeepSpeed; python zero_to_fp32.py . OUT in it, then pass what that writes",
    "*/mp_rank_*_model_states.pt": "a folder of DeepSpeed; pass mp_rank_00_model_states.pt in the folder that `latest` names",
    "saved_model.pb": "a folder of TensorFlow; save the weights with np.savez",
    "_CHECKPOINT_METADATA": "a folder of Orbax; save the weights with safetensors or np.savez",
    "openvino_model.xml": "a folder of OpenVINO; use the checkpoint that it was made of",
}
_SEVERAL = re.compile(r"^(?:model|pytorch_model)_\d+\.\w+$")


def locate(source: Path, first: Sequence[str] = ()) -> Path | None:
    """The file with a network's weights, an index of its shards, or a folder of torch.distributed.checkpoint: the source itself,
    or what lies in this folder, its `checkpoints`, or the newest of its numbered ones. `first` are names to look for before
    others. None where there is nothing; raises TostError where there are several, a shard alone, or what is only named.
    """
    if os.path.isfile(source):
        _check_whole(source)
        return source
    if not os.path.isdir(source):
        return None
    numbered = [path for place in (source, source / "checkpoints") for path in place.glob("*-[0-9]*") if path.is_dir()]
    folders = [source, source / "checkpoints", *sorted(numbered, key=_number, reverse=True)]  # checkpoint-500, step-500
    for look in (lambda folder: _named(folder, (*first, *NAMES)), _check_read, _only):
        for folder in folders:
            found = look(folder)
            if found is not None:
                return found
    return None


def shards(index: Path) -> list[Path]:
    """The files that an index of shards names, in order; raises TostError where one is missing, or lies elsewhere."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise TostError(
            f"{index}: expected an index with a weight_map, got none; pass the file or folder with the weights"
        )
    names = sorted(set(places.values()))
    missing = [name for name in names if PurePath(name).name != name or not os.path.isfile(index.parent / name)]
    if missing:
        raise TostError(
            f"{index}: expected all of its {len(names)} shards beside it, got none of {some(missing)}; copy them too"
        )
    return [index.parent / name for name in names]


def is_index(path: Path) -> bool:
    """Whether a file says in which shards the tensors of a network are."""
    return path.name.endswith(".index.json")


def is_distributed(path: Path) -> bool:
    """Whether a folder is one of torch.distributed.checkpoint."""
    return path.is_dir() and (path / INDEX).is_file()


def _named(folder: Path, names: Sequence[str]) -> Path | None:
    _check_one_index(folder)
    if is_distributed(folder):
        return folder
    found = next(
        (folder / name for name in names if os.path.isfile(folder / name) or is_distributed(folder / name)), None
    )
    if found == folder / "last.pt" and os.path.isfile(folder / "best.pt"):  # of another program than ours
        raise TostError(f"{folder}: expected one checkpoint, got several (best.pt, last.pt); pass one of them")
    others = sorted(path.name for path in folder.glob("*model_*") if _SEVERAL.match(path.name)) if found else []
    if found is not None and others and found.name in NAMES:
        raise TostError(
            f"{folder}: expected one network, got {found.name} and {some(others)}; pass the file of one of them"
        )
    return found


def _check_read(folder: Path) -> None:
    """Raise TostError for a folder of which we know what it is, and which is not read."""
    said = next((said for names, said in NAMED.items() if any(folder.glob(names))), None)
    if said is not None:
        raise TostError(f"{folder}: expected a checkpoint, got {said}")


def _only(folder: Path) -> Path | None:
    """The one file in a folder that may hold weights, or the one folder of torch.distributed.checkpoint."""
    found = {path.resolve(): path for path in _candidates(folder)}  # Composer links to the latest
    for path in found:
        if not path.is_dir():
            _check_whole(path)
    if len(found) > 1:
        names = some(sorted(path.name for path in found.values()))
        raise TostError(f"{folder}: expected one checkpoint, got several ({names}); pass one of them")
    return next(iter(found.values()), None)


def _check_one_index(folder: Path) -> None:
    """Raise TostError where each rank has written an index of its own, as later versions of torch can."""
    found = [] if (folder / INDEX).exists() else [path.name for path in folder.glob(f"__*{INDEX}")]
    if found:
        raise TostError(
            f"{folder}: expected a folder of torch.distributed.checkpoint with one index, got {some(sorted(found), 3)}, one for "
            f"each rank; save it with use_collectives=True"
        )


def _candidates(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if is_distributed(path):
            yield path
        elif path.is_file() and path.name.endswith(_WEIGHTS) and not _NOT_WEIGHTS.match(path.name):
            indexed = _SHARD.match(path.name) and _indexes(path)  # then the index stands for it
            yield from () if indexed else (path,)


def _check_whole(path: Path) -> None:
    """Raise TostError for a file that is a part of a checkpoint."""
    if path.suffix == ".distcp" or path.name == INDEX:
        raise TostError(
            f"{path}: expected a whole checkpoint, got a part of one of torch.distributed.checkpoint; pass its folder"
        )
    others = [other.name for index in _indexes(path) for other in shards(index) if other.name != path.name]
    match = _SHARD.match(path.name)
    if match and not others:
        numbers = range(1, min(int(match["count"]), 100) + 1)
        others = [f"{match['stem']}-{number:0{len(match['number'])}d}-of-{match['count']}{match['end']}"
                  for number in numbers if number != int(match["number"])]  # fmt: skip
    if others:
        raise TostError(
            f"{path}: expected a whole checkpoint, got one of several shards (others: {some(others, 3)}); {_remedy(path)}"
        )


def _remedy(shard: Path) -> str:
    found = next(iter(_indexes(shard)), None)
    return f"pass their folder, or {found.name}" if found else "pass the folder of all of them with their .index.json"


def _indexes(shard: Path) -> list[Path]:
    """The indexes beside a file that name it."""
    found = []
    for path in sorted(shard.parent.glob(f"*{shard.suffix}.index.json")):
        places = read_json(path).get("weight_map")
        if isinstance(places, dict) and shard.name in list(places.values()):
            found.append(path)
    return found


def _number(path: Path) -> int:
    digits = path.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1
