"""Files and folders that are whole whenever they are there: written under a temporary name, then renamed."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tost_plugins.errors import TostError
from tost_plugins.training.log import say


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write a file to; it becomes `path` on leaving, and is gone after an error.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "some.txt"
        >>> with replacing(path) as temporary:
        ...     _ = temporary.write_text("all of it")
        >>> path.read_text(), temporary.exists()
        ('all of it', False)
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


#: Names end so where another kind of file is meant than another one of these, and what makes ours of that kind.
_ENDS = {
    **dict.fromkeys((".npz", ".npy"), "np.savez(path, **mask) writes one of its arrays"),
    **dict.fromkeys((".safetensors", ".ckpt", ".pkl", ".tar", ".h5", ".json", ".csv", ".yaml", ".yml", ".txt"), ""),
    ".onnx": "tost export --onnx writes one", ".pt2": "tost export --pt2 writes one",
}  # fmt: skip
_TORCHS = (".pt", ".pth", ".bin")


def check_end(path: Path, own: str, tell: bool = True) -> None:
    """Raise TostError where a name is a folder's, or ends as files of another kind do than that of `own`, which is to be written;
    one line, unless `tell` is False, where safetensors get a name of torch.save's, as masks were often called.

    Example:
        >>> check_end(Path("mask.safetensors"), ".safetensors"), check_end(Path("mask"), ".safetensors")
        (None, None)
    """
    if path.is_dir():
        raise TostError(f"{path}: expected a file to write, got a folder; give it a name, such as {path / f'new{own}'}")
    if own == ".safetensors" and path.suffix in _TORCHS:
        if tell:
            say(f"{path}: is written as {own}, whatever its name: Mask.load and tost read it, torch.load does not")
    elif path.suffix != own and path.suffix in (*_ENDS, *_TORCHS):
        hint = f" ({hint})" if (hint := _ENDS.get(path.suffix)) else ""
        raise TostError(
            f"{path}: expected a name for a {own} file, got one that ends in {path.suffix}{hint}; write {path.stem}{own}"
        )


def write(path: Path, text: str) -> None:
    """Write a text file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per row, with a header of all their keys; the folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: Path) -> Any:
    """The dict that a JSON file holds, or for .jsonl the list of those of its lines; raises TostError where it is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("not keys and values")
        return rows if path.suffix == ".jsonl" else rows[0]
    except (ValueError, RecursionError) as error:
        raise TostError(
            f"{path}: expected whole JSON, got something unreadable ({error}); put back a copy, or remove the file"
        ) from None


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder; a target that is there already stays."""
    if target.exists():
        return
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    temporary.replace(target)
