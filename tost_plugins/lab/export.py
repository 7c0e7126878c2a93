"""A checkpoint of any trainer -> the plain sparse network, without ghosts, masks and prefixes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from tost_plugins.errors import TostError, shown
from tost_plugins.files.tensors import by_clean_name, comparable, read_tensors, write_tensors
from tost_plugins.masks.mask import FORMAT
from tost_plugins.session import buffers
from tost_plugins.tweaks.soft_activation import RELU

_FILES = ("model.safetensors", "last.pt", "pytorch_model.bin")


def export(source: str | Path, out: str | Path, unfinished: bool = False) -> dict[str, Any]:
    """Write the plain network in `source` to `out` (safetensors) and return what it is: layers, sparsity, parameters.

    `source` is a run folder of `tost train`, a checkpoint folder (Hugging Face, Accelerate) or a file (Composer,
    torch.save, safetensors). Weights outside the mask become exactly 0. A checkpoint from a moment when ghosts or soft
    activations were still at work computes something else than the plain network: a TostError, unless `unfinished`.
    """
    path = find(Path(source))
    try:
        return _export(path, Path(out), unfinished)
    except TostError as error:
        raise error.at(f"export {path}") from None


def _export(path: Path, out: Path, unfinished: bool) -> dict[str, Any]:
    if path.resolve() == out.resolve():
        raise TostError("expected another file to write to, got the checkpoint itself; choose a new name")
    found, metadata = read_tensors(path)
    tensors = by_clean_name(found)
    if metadata.get("format") == FORMAT:
        raise TostError("expected a checkpoint, got a mask file, which holds no weights; see tost mask")
    live = [name for name, value in tensors.items() if _is_live(name, value)]
    if live and not unfinished:
        raise TostError(
            f"expected a checkpoint from after the ghosts have ended, got one with {len(live)} at work ({live[0]} = "
            f"{shown(tensors[live[0]].tolist())}); take a later checkpoint, or pass --unfinished to get the plain network "
            f"as it stands"
        )
    plain = {name: tensor for name, tensor in tensors.items() if not _is_ours(name)}
    masks = {name.removesuffix("_mask"): tensor for name, tensor in tensors.items() if name.endswith(".weight_mask")}
    for name, mask in masks.items():
        if name not in plain or plain[name].shape != mask.shape:
            raise TostError(
                f"expected a weight {name} beside its mask, got none that fits; the checkpoint is not whole"
            )
        # not masked_fill, which knows no floats of 8 bits
        plain[name] = torch.where(comparable(mask) != 0, comparable(plain[name]), 0).to(plain[name].dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_tensors(out, plain)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise TostError(f"expected tensors that safetensors can hold, got others ({error})") from None
    weights = {name: plain[name] for name in masks} or {n: t for n, t in plain.items() if t.ndim >= 2}
    size = sum(tensor.numel() for tensor in weights.values())
    kept = sum(int(comparable(tensor).count_nonzero()) for tensor in weights.values())
    return {"source": str(path), "out": str(out), "tensors": len(plain), "layers": len(weights),
            "sparsity": 1 - kept / size if size else 0.0}  # fmt: skip


def find(source: Path) -> Path:
    """The file with the weights: the source itself, or the newest one in a run's or a checkpoint's folder."""
    if os.path.isfile(source):
        return source
    numbered = (source / "checkpoints").glob("*-[0-9]*") if os.path.isdir(source) else ()
    saved = sorted(numbered, key=_number)  # checkpoint-500, step-500
    folders = [source, source / "checkpoints", *reversed(saved)]
    found = [folder / name for folder in folders for name in _FILES if os.path.isfile(folder / name)]
    if not found:
        raise TostError(f"export {source}: expected a checkpoint or a run's folder, got neither; check the path")
    return found[0]


def _number(path: Path) -> int:
    digits = path.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def _is_ours(name: str) -> bool:
    own = (buffers.MASK, buffers.SEEN, buffers.HIDDEN, buffers.CLOCK, buffers.CHANGED, "tost_beta")
    return ".ghost_skip." in f".{name}" or name.rsplit(".", 1)[-1] in own


def _is_live(name: str, value: Tensor) -> bool:
    if name.endswith("ghost_skip.alpha"):
        return bool((comparable(value) != 0).any())
    return name.rsplit(".", 1)[-1] == "tost_beta" and bool((comparable(value).abs() < RELU * 0.9).any())
