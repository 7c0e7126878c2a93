"""Files and folders that are whole whenever they are there: written under a temporary name, then renamed."""

from __future__ import annotations

import shutil
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Write a text file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder; a target that is there already stays."""
    if target.exists():
        return
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    temporary.replace(target)
