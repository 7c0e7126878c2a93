"""CIFAR-10 and CIFAR-100: parquet files, torchvision's folder, or a data set of the Hub."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from tost_plugins.lab.data.decode import bad_path, decode, vision
from tost_plugins.lab.data.images import Source, Split
from tost_plugins.recipe.recipe import DataSpec

_CLASS_NAMES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": tuple(str(number) for number in range(100)),  # where a file does not name them itself
}
_TORCHVISION = {"cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python")}


def cifar(spec: DataSpec) -> Source:
    """Whichever of the three lies at the path, or in the folder that TOST_DATA names."""
    given = spec.path or os.environ.get("TOST_DATA")
    if not given:
        remedy = f"give one, or set TOST_DATA to a folder that holds {spec.name}/"
        raise bad_path(f"a folder, parquet file or Hub id for {spec.name!r}", spec.path, remedy)
    path = Path(given).expanduser()
    if path.is_file():
        return _one_file(path, spec.name)
    if path.is_dir():
        return _cifar_folder(path, spec.name)
    if spec.path and re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        return _hub(given, spec.name)
    raise bad_path("a folder or file that exists, or a Hub id owner/name", given, "correct it")


def _cifar_folder(path: Path, name: str) -> Source:
    _, batches = _TORCHVISION[name]
    for folder in (path, path / name):
        train, test = (sorted(map(str, folder.glob(f"{part}*.parquet"))) for part in ("train", "test"))
        if train and test:
            return _tables(_parquet(train), _parquet(test), name)
        root = folder.parent if folder.name == batches else folder
        if (root / batches).is_dir():
            return _torchvision(root, name)
    expected = f"train.parquet and test.parquet, or {batches}/, there or in {name}/"
    raise bad_path(expected, str(path), "correct it")


def _torchvision(root: Path, name: str) -> Source:
    """torchvision's copy: pickles, of which torchvision opens only those with the published checksum."""
    maker, batches = _TORCHVISION[name]
    dataset = getattr(vision("torchvision.datasets"), maker)
    try:
        parts = [dataset(str(root), train=train) for train in (True, False)]
    except RuntimeError as cause:
        expected = f"torchvision's {maker}, all files with their published checksums"
        raise bad_path(expected, str(root / batches), "fetch it again") from cause
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    train, test = (Split(x, torch.tensor(part.targets)) for x, part in zip(images, parts, strict=True))
    return train, test, parts[0].classes


def _one_file(path: Path, name: str) -> Source:
    if path.suffix != ".parquet":
        raise bad_path("a .parquet file", str(path), "or give the folder it lies in")
    table = _parquet([str(path)])
    if len(table) < 6:
        raise bad_path("6 images or more, to cut a sixth off", len(table), "give a folder with test.parquet")
    cut = len(table) - len(table) // 6
    train, test, class_names = _tables(table.select(range(cut)), table.select(range(cut, len(table))), name)
    if train.labels.unique().tolist() != test.labels.unique().tolist():
        remedy = "shuffle its rows, or give a folder with train.parquet and test.parquet"
        raise bad_path("the same classes in a file's last sixth as before it", str(path), remedy)
    return train, test, class_names


def _hub(repository: str, name: str) -> Source:
    datasets = vision("datasets")
    try:
        found = datasets.load_dataset(repository)
        train, test = found["train"], found["test"]
    except Exception as cause:  # the Hub's client raises its own kinds, its HTTP library's, and OSError
        remedy = f"correct it ({type(cause).__name__}: {cause})"
        expected = "a path that exists, or a Hub data set with train and test"
        raise bad_path(expected, repository, remedy) from cause
    return _tables(train, test, name, files=True)


def _parquet(files: list[str]) -> Any:
    """The rows as one `datasets.Dataset`, held in memory: its copy on disk is gone when this returns."""
    datasets = vision("datasets")
    quiet = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(prefix="tost-") as cache:
            options = {"data_files": files, "cache_dir": cache, "keep_in_memory": True}
            return datasets.load_dataset("parquet", split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as cause:
        raise bad_path("parquet files", files, f"fetch them again ({cause.__cause__ or cause})") from cause
    finally:
        if not quiet:
            datasets.enable_progress_bars()


def _tables(train: Any, test: Any, name: str, files: bool = False) -> Source:
    """`files`: whether images may lie beside the tables, as the Hub's client leaves them; else they are inside."""
    plain = _CLASS_NAMES[name]
    class_names = getattr(train.features[_label_column(train, name)], "names", None) or plain
    if len(class_names) != len(plain):
        remedy = "is it another data set?"
        raise bad_path(f"{len(plain)} classes for {name!r}", len(class_names), remedy)
    return _read_table(train, name, files), _read_table(test, name, files), class_names


def _read_table(table: Any, name: str, files: bool) -> Split:
    labels = table.with_format("numpy")[_label_column(table, name)][:]
    image = _column(table, "img", "image")
    rows = table.cast_column(image, vision("datasets").Image(decode=False))[image][:]
    outside = next((row["path"] for row in rows if row["bytes"] is None and row["path"]), None)
    if outside and not files:
        raise bad_path("images inside the parquet file", f"the path {outside}", "save the table with their bytes")
    return Split(decode([(row["path"], row["bytes"]) for row in rows], None), torch.as_tensor(labels).long())


def _label_column(table: Any, name: str) -> str:
    return _column(table, *(("fine_label", "label") if name == "cifar100" else ("label", "fine_label")))


def _column(table: Any, *names: str) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise bad_path(f"a column {' or '.join(names)}", table.column_names, "rename it")
