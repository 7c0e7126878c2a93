"""The checkpoints of a run of `tost train`: the last whole one, and what is said of those that are not."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from tost_plugins.errors import TostError
from tost_plugins.files import pickles
from tost_plugins.files.containers import read
from tost_plugins.lab.export import find
from tost_plugins.session import buffers
from tost_plugins.training.log import say
from tost_plugins.training.params import clean_name

_PICKLES = (".pt", ".pth", ".bin", ".pkl")


def last(saved: Mapping[int, Path], model: nn.Module, files: Collection[str] = ()) -> int:
    """The step of the newest of the checkpoints (a file or a folder for each step) that is whole; 0 where there are none.

    `files` are what a folder must hold. One that is damaged is named in the log, and the one before it is taken. Raises
    TostError where none is whole, and for one of another network than `model`, which is not attached yet.
    """
    complaints = []
    for step in sorted((step for step, path in saved.items() if path.exists()), reverse=True):
        complaint = _damage(saved[step], files)
        if complaint is None:
            _check_harmless(saved[step])
            _check_fits(saved[step], model)
            for other in complaints:
                say(f"--resume: {other}; going on from {saved[step]} instead", logging.WARNING)
            return step
        complaints.append(complaint)
    if complaints:
        raise TostError(f"--resume: {complaints[0]}; put back a copy, or remove {saved[max(saved)]} to start anew")
    return 0


def _damage(checkpoint: Path, files: Collection[str]) -> str | None:
    """What is wrong with a checkpoint, if anything: expected, and got."""
    missing = sorted(name for name in files if not (checkpoint / name).is_file())
    if missing:
        return f"expected a whole checkpoint in {checkpoint}, got one without {missing[0]}"
    torn = next((path for path in _files(checkpoint) if not is_whole(path)), None)
    return None if torn is None else f"expected a whole checkpoint, got a damaged file {torn}"


def _files(checkpoint: Path) -> list[Path]:
    return [checkpoint] if checkpoint.is_file() else sorted(path for path in checkpoint.rglob("*") if path.is_file())


def is_whole(path: Path) -> bool:
    """Whether a file of a checkpoint can be read to its end; one of a kind that is not known here counts as whole."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt"):
                pass
        elif path.suffix in _PICKLES:  # what torch.save writes is a zip file
            with zipfile.ZipFile(path) as file:
                return file.testzip() is None
    except (ValueError, OSError, SafetensorError, zipfile.BadZipFile):
        return False
    return True


def _check_harmless(checkpoint: Path) -> None:
    """Composer and Accelerate run the code in a pickle, and the folder may come from somebody else: raise TostError for
    files that hold more than plain values."""
    for path in _files(checkpoint):
        if path.suffix in _PICKLES and path.name != "training_args.bin":  # which the Trainer never reads
            pickles.load(path)


def _check_fits(checkpoint: Path, model: nn.Module) -> None:
    """Raise TostError unless it is one of a sparse run of this very network."""
    path = find(checkpoint)
    saved = read(path)
    assert saved is not None  # `find` has seen it
    found = {clean_name(name): tuple(tensor.shape) for name, tensor in saved.tensors.items()}
    own = {clean_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    other = sorted(name for name, shape in own.items() if found.get(name) != shape)
    if other or buffers.CLOCK not in found:
        what = f"{found.get(other[0])} for {other[0]}, which has {own[other[0]]}" if other else "one without its clock"
        raise TostError(
            f"--resume {path}: expected a checkpoint of this run, got {what}; put back the run's own, or remove it to "
            f"start anew"
        )
