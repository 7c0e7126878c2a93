"""The card of a mask or a sparse network: what it is and how it was made, as JSON and as text beside its file."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from pydantic.dataclasses import is_pydantic_dataclass
from torch import Tensor

from tost_plugins.errors import TostError, one_line
from tost_plugins.files.atomic import read_json, write

VERSION = 1
#: What a card says of the mask itself, computed anew each time; all else is what its maker knew.
_COMPUTED = ("card", "of", "file", "kept", "size", "sparsity", "live", "effective_sparsity", "layers", "checksum")
_LARGEST = 1 << 26  # bytes


def told(method: Any, seed: int) -> dict[str, Any]:
    """What a card says of the method that a mask was found with: its name, its settings, the seed, and which weights the budget
    counts, where it can count others.

    Example:
        >>> from tost_plugins.masks import MASKS
        >>> found = told(MASKS["random"](sparsity=0.9), seed=3)
        >>> found["method"], found["settings"]["sparsity"], found["seed"], found["budget"]
        ('random', 0.9, 3, 'kept')
    """
    kind = type(method)
    settings = _adapter(kind).dump_python(method, mode="json") if is_pydantic_dataclass(kind) else {}
    settings.pop("kind", None)
    budget = {} if "budget" not in settings else {"budget": settings.pop("budget")}
    return {"method": str(method.kind), "settings": settings, "seed": seed, **budget}


def card(mask: Mapping[str, Tensor], about: Mapping[str, Any], file: str, of: str = "mask") -> dict[str, Any]:
    """The card of a mask, or `of` another thing that has its zeros: counts, sparsity, layers; and what is known `about` it.

    `about["live"]`, where it is known, has the number of live weights of each layer. What is not known is left out.
    """
    live = about.get("live") or {}
    layers: list[dict[str, Any]] = [
        {"layer": name, "shape": list(kept.shape), "kept": int(kept.sum()), "size": kept.numel()}
        for name, kept in mask.items()
    ]
    for row in layers if set(live) == set(mask) else ():
        row["live"] = int(live[row["layer"]])
    kept, size = sum(row["kept"] for row in layers), sum(row["size"] for row in layers)
    found: dict[str, Any] = {"card": VERSION, "of": of, "file": file}
    found |= {key: value for key, value in about.items() if key not in (*_COMPUTED, "versions")}
    found |= {"kept": kept, "size": size, "sparsity": _share(kept, size)}
    if layers and "live" in layers[0]:
        count = sum(row["live"] for row in layers)
        found |= {"live": count, "effective_sparsity": _share(count, size)}
    return {**found, "versions": about.get("versions") or versions(), "layers": layers, "checksum": checksum(mask)}


def text(found: Mapping[str, Any]) -> str:
    """A card as Markdown, a line for each thing that is known."""
    head = f"{found['kept']:,} of {found['size']:,} weights kept, sparsity {found['sparsity']:.4f}"
    if "live" in found:
        head += f"; {found['live']:,} of them live, effective sparsity {found['effective_sparsity']:.4f}"
    rows = [f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in found.items() if key not in _COMPUTED]
    lines = [
        f"# {one_line(found['file'])}",
        "",
        f"{len(found['layers'])} layers: {head}.",
        "",
        "| | |",
        "| --- | --- |",
    ]
    return "\n".join([*lines, *rows]) + "\n"


def write_card(path: Path, found: Mapping[str, Any]) -> None:
    """Write a card beside a file, as FILE.card.json and FILE.card.md."""
    write(_beside(path, "json"), json.dumps(found, indent=1, default=_plain))
    write(_beside(path, "md"), text(found))


def read_card(path: Path, mask: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the card beside a file knew of this mask; {} where there is none, or one of another mask."""
    file = _beside(path, "json")
    try:
        found = read_json(file) if file.is_file() and file.stat().st_size <= _LARGEST else {}
        if found.get("checksum") != checksum(mask):
            return {}
        about = {key: value for key, value in found.items() if key not in _COMPUTED}
        live = {row["layer"]: int(row["live"]) for row in found["layers"] if "live" in row}
        return about | ({"live": live} if set(live) == set(mask) else {})
    except (TostError, KeyError, TypeError, ValueError, AttributeError):
        return {}  # nobody needs a card to read a mask


def versions() -> dict[str, str]:
    """Of Python, torch and tost_plugins."""
    found = {"python": platform.python_version()}
    for name in ("tost_plugins", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def checksum(mask: Mapping[str, Tensor]) -> int:
    """Of all names, shapes and bits of a mask."""
    total = 0
    for name in sorted(mask):
        total = zlib.crc32(f"{name} {tuple(mask[name].shape)}".encode("utf-8", "surrogatepass"), total)
        total = zlib.crc32(np.packbits(mask[name].numpy().reshape(-1)).data, total)
    return total


@functools.cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _plain(value: Any) -> Any:
    """A number or an array of numpy or torch as Python has it, anything else as its text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _share(kept: int, size: int) -> float:
    return 1 - kept / size if size else 0.0


def _beside(path: Path, end: str) -> Path:
    return path.with_name(f"{path.name}.card.{end}")


def _cell(value: Any) -> str:
    """A value in one cell of a table."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{key} {_cell(each)}" for key, each in value.items() if each not in (None, [], {}))
    elif isinstance(value, list):
        value = ", ".join(map(_cell, value))
    return one_line(str(value)).replace("|", r"\|")
