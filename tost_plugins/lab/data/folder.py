"""A folder of images, with a folder for each class."""

from __future__ import annotations

from pathlib import Path

import torch

from tost_plugins.lab.data.decode import Image, bad_path, decode
from tost_plugins.lab.data.images import Source, Split
from tost_plugins.recipe.recipe import DataSpec

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


def folder(spec: DataSpec) -> Source:
    """Its train/ and test/ or val/, or else a fifth of it to test on."""
    root = Path(spec.path or "").expanduser()
    if not spec.path or not root.is_dir():
        raise bad_path("a folder of images", spec.path, "give one that holds a folder per class")
    size = spec.image_size or 32
    if not (root / "train").is_dir():
        return _cut_folder(root, size)
    held = next((root / part for part in ("test", "val") if (root / part).is_dir()), None)
    if held is None:
        raise bad_path("test/ or val/ beside train/", str(root), "add one")
    train, test = _class_files(root / "train"), _class_files(held)
    for name in sorted(train.keys() ^ test.keys()):
        lacking = held if name in train else root / "train"
        raise bad_path(f"the same classes in train/ and {held.name}/", name, f"add it to {lacking}")
    return _read_folder(train, size), _read_folder(test, size), list(train)


def _cut_folder(root: Path, size: int) -> Source:
    files = _class_files(root)
    for name, found in files.items():
        if len(found) < 2:
            expected = "2 images or more per class, one each to train and to test on"
            raise bad_path(expected, str(root / name), "add some")
    whole = _read_folder(files, size)
    return *whole.cut(max(len(files), round(len(whole) / 5))), list(files)  # one image of every class at least


def _class_files(root: Path) -> dict[str, list[str]]:
    """Class name -> its image files; both in alphabetical order, hidden folders left out."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = {folder.name: sorted(map(str, filter(_is_image, folder.rglob("*")))) for folder in folders}
    if len(files) < 2:
        raise bad_path(f"2 class folders or more in {root}", list(files), "add them")
    for name, found in files.items():
        if not found:
            raise bad_path(f"images ({', '.join(sorted(_SUFFIXES))})", str(root / name), "add some")
    return files


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")


def _read_folder(files: dict[str, list[str]], size: int) -> Split:
    paths: list[Image] = [(path, None) for found in files.values() for path in found]
    labels = torch.tensor([number for number, found in enumerate(files.values()) for _ in found])
    return Split(decode(paths, size), labels)
