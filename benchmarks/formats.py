"""Every kind of file and folder that sparse networks are kept in: made by the real programs, and read back.

    python benchmarks/formats.py            # prints the table of docs/formats.md; sparsimony is run where it is installed

Each is a network with a known mask. "exact" is `Mask.load` giving that mask and no other, `mask: {kind: file}` too, and `tost
export` writing a file that loads into the network with strict=True, with every tensor the same and removed weights 0.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import formats_made
import formats_trainers
import torch
from formats_made import Made, Row
from safetensors.torch import load_file

from tost_plugins import Mask, TostError
from tost_plugins.lab.export import export
from tost_plugins.masks.methods.file import File
from tost_plugins.training.params import prunable
from tost_plugins.training.task import Task

ROWS: list[Row] = [*formats_made.ROWS, *formats_trainers.ROWS]
EXACT = "exact"


class Outcome(NamedTuple):
    """What became of a file as a mask and as an export: "exact", a TostError, or what is wrong."""

    mask: str
    export: str


def missing(row: Row) -> list[str]:
    """The packages that a row needs and that are not here."""
    return [name for name in row.needs if importlib.util.find_spec(name) is None]


def outcome(made: Made, folder: Path) -> Outcome:
    """Read what was made, in every way that masks and networks are read."""
    return Outcome(_as_mask(made), _as_network(made, folder / "exported.safetensors"))


def _as_mask(made: Made) -> str:
    try:
        found = Mask.load(made.path)
        fitted = found.fit(made.mask, dict(made.net.state_dict()))
        given = File(path=str(made.path)).start(Task(made.net, prunable(made.net)), torch.Generator())
    except TostError as error:
        return _line(error, made)
    if not fitted == given == made.mask:
        return f"WRONG: sparsity {fitted.sparsity:.3f} for {made.mask.sparsity:.3f}"
    more = [name for name in found if name not in made.mask and not bool(found[name].all())]
    return f"WRONG: zeros for {', '.join(more)}" if more else EXACT


def _as_network(made: Made, target: Path) -> str:
    try:
        export(made.path, target)
    except TostError as error:
        return _line(error, made)
    net = made.loads or made.net
    wanted = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data.fill_(1)  # what is loaded replaces it
    try:
        net.load_state_dict(load_file(target), strict=True)
    except RuntimeError as error:
        return f"WRONG: {' '.join(str(error).split())[:200]}"
    there = net.state_dict()
    other = [name for name, tensor in wanted.items() if not torch.equal(there[name], tensor)]
    return f"WRONG: other numbers in {', '.join(other)}" if other else EXACT


def _line(error: TostError, made: Made) -> str:
    """A refusal, without the folder that it happened in."""
    text = str(error)
    for folder in (made.path.parent, made.path.parent.parent):
        text = text.replace(f"{folder}/", "")
    for front in ("export: ", f"export {made.path.name}: ", f"mask file {made.path.name}: ", f"{made.path.name}: "):
        text = text.removeprefix(front)
    return text.replace("|", "\\|")


def table() -> list[str]:
    """The rows of docs/formats.md."""
    lines = ["| format | made with | as a mask | `tost export` |", "| --- | --- | --- | --- |"]
    for row in ROWS:
        if missing(row):
            lines.append(f"| {row.format} | {row.made_with} | not run: no {', '.join(missing(row))} | |")
            continue
        with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folder = Path(name)
            (folder / "made").mkdir()
            found = outcome(row.make(folder / "made"), folder)
        export_ = "the same line" if found.export == found.mask != EXACT else found.export
        lines.append(f"| {row.format} | {row.made_with} | {found.mask} | {export_} |")
    return lines


def versions() -> str:
    """What it was made with."""
    names = [
        "torch",
        "numpy",
        "safetensors",
        "transformers",
        "accelerate",
        "mosaicml",
        "lightning",
        "timm",
        "sparsimony",
    ]
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    logging.getLogger("tost_plugins").setLevel(logging.ERROR)
    print("\n".join(["", versions(), "", *table()]))
