"""Where labelled images come from: `load` reads a data set that a recipe names into memory.

sklearn, datasets, PIL and torchvision are imported only by the source that needs them.
"""

from __future__ import annotations

import io
import math
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from tost_plugins.errors import TostError, unknown, wrong
from tost_plugins.lab.data import Augment, Data, Split
from tost_plugins.training.optional import package

SPLIT_SEED = 20220722  # which images are held out: a constant, so that every run holds out the same ones


class Spec(Protocol):
    """What `load` reads of a recipe's `data:` section; `load` says what each means."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str | None: ...
    @property
    def limit(self) -> int | None: ...
    @property
    def validation(self) -> int: ...
    @property
    def augment(self) -> bool: ...
    @property
    def image_size(self) -> int | None: ...


def load(spec: Spec) -> Data:
    """The data set that `spec` names, decoded into memory.

    `name` and `path`:

    * `digits`: the 1797 handwritten digits of scikit-learn, 8x8 grey, 1437 of them to train on; takes no
      path.
    * `cifar10`, `cifar100`: `path` is a folder with `train*.parquet` and `test*.parquet`, or torchvision's
      folder, or a folder that holds either under the data set's name; or one parquet file, whose last sixth
      becomes the test split; or, where no such path exists here, a Hub id such as `uoft-cs/cifar10`. Without
      a path: the folder that the environment variable TOST_DATA names. Parquet columns are `img` or `image`,
      `label` or `fine_label`. `image_size` (None: the 32 of the data set) averages the pixels of smaller images:
      at 16 a network trains four times as fast.
    * `folder`: `path/train/CLASS/*.png` with `path/test` or else `path/val` beside it, or `path/CLASS/*.png`,
      of which a fifth becomes the test split. Images become RGB, resized to a square of `image_size` (None:
      32) pixels.

    `validation` training images (0: none) are held out, and `limit` of the others (None: all) are trained on:
    the same images in every run, balanced over the classes. `augment` crops with a padding of an eighth of
    the width, and mirrors, except digits: a mirrored digit is another digit.

    Raises TostError for an unknown name, a path where nothing fits, a package that is not installed, an image
    that cannot be read, labels that do not fit the classes, and numbers that the data cannot satisfy.
    """
    if spec.name not in _SOURCES:
        raise unknown("data.name", "data set", spec.name, _SOURCES)
    if spec.image_size is not None and (spec.name == "digits" or spec.image_size < 1):
        expected = "nothing for 'digits', 1 pixel or more for the others"
        remedy = "digits have one size" if spec.name == "digits" else "32 is usual"
        raise wrong("data.image_size", expected, spec.image_size, remedy)
    train, test, class_names = _SOURCES[spec.name](spec)
    if spec.image_size is not None and spec.name != "folder":  # which has resized each image as it came
        train, test = (_resized(split, spec.image_size) for split in (train, test))
    for split in (train, test):
        _check_labels(split, len(class_names))
    train, validation = _hold_out(train, spec.validation, spec.limit)
    mean, std = _mean_std(train.images)
    padding = max(1, train.images.shape[-1] // 8)
    augment = Augment(padding, flip=spec.name != "digits") if spec.augment else None
    return Data(train, validation, test, tuple(class_names), mean, std, augment)


def _resized(split: Split, size: int) -> Split:
    """Squares of `size` pixels: averages of those there were, or these again where the images grow."""
    parts = split.images.split(4096)  # float32 takes four times the room
    images = [F.interpolate(part.float(), (size, size), mode="area").round().to(torch.uint8) for part in parts]
    return Split(torch.cat(images), split.labels)


def _hold_out(train: Split, validation: int, limit: int | None) -> tuple[Split, Split]:
    """What is left to train on, and the validation split."""
    count = len(train)
    if not 0 <= validation < count:
        raise wrong("data.validation", f"0..{count - 1} of {count} training images", validation, "lower it")
    left = count - validation
    if limit is not None and not 1 <= limit <= left:
        expected = f"1..{left} training images ({validation} are held out for validation)"
        raise wrong("data.limit", expected, limit, "change it, or leave it out")
    order = _spread(train.labels)
    end = validation + (left if limit is None else limit)
    return train.take(order[validation:end]), train.take(order[:validation])


def _spread(labels: Tensor) -> Tensor:
    """A fixed random order, int64 `(N,)`, of which every beginning is balanced over the classes.

    The first K of K classes are one image of each. The first images of a folder would all be of one class
    otherwise.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    share = torch.empty(len(labels), dtype=torch.float64)  # how much of an image's class comes before it
    for label in labels.unique():
        members = (labels[shuffled] == label).nonzero().squeeze(1)
        share[members] = torch.arange(len(members), dtype=torch.float64) / len(members)
    return shuffled[torch.sort(share, stable=True).indices]


def _mean_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel, on the 0..1 scale; exact, by counting the 256 values. A flat channel has std 1."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(mean.item())
        stds.append((share * (values - mean).square()).sum().sqrt().item())
    return tuple(means), tuple(std if std > 1e-6 else 1.0 for std in stds)


def _check_labels(split: Split, classes: int) -> None:
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= classes:
        raise wrong("data", f"labels in 0..{classes - 1}", f"{low}..{high}", "is it another data set?")


def _bad_path(expected: str, got: object, remedy: str) -> TostError:
    return wrong("data.path", expected, got, remedy)


def _package(name: str) -> Any:
    return package(name, "data", "tost_plugins[vision]")


# The sources, down to the end: each takes the spec and returns the training split, the test split and the
# class names. Only they import packages outside the core.

_Source = tuple[Split, Split, Sequence[str]]
_Image = tuple[str | None, bytes | None]  # a path, or the content of a file

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}
_CLASS_NAMES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": tuple(str(number) for number in range(100)),  # where a file does not name them itself
}
_TORCHVISION = {"cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python")}


def _digits(spec: Spec) -> _Source:
    if spec.path is not None:
        raise _bad_path("nothing for 'digits'", spec.path, "remove it")
    digits = _package("sklearn.datasets").load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    whole = Split(images, torch.from_numpy(digits.target).long())
    order = _spread(whole.labels)
    return whole.take(order[360:]), whole.take(order[:360]), [str(name) for name in digits.target_names]


def _cifar(spec: Spec) -> _Source:
    given = spec.path or os.environ.get("TOST_DATA")
    if not given:
        remedy = f"give one, or set TOST_DATA to a folder that holds {spec.name}/"
        raise _bad_path(f"a folder, parquet file or Hub id for {spec.name!r}", spec.path, remedy)
    path = Path(given).expanduser()
    if path.is_file():
        return _one_file(path, spec.name)
    if path.is_dir():
        return _cifar_folder(path, spec.name)
    if spec.path and re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        return _hub(given, spec.name)
    raise _bad_path("a folder or file that exists, or a Hub id owner/name", given, "correct it")


def _cifar_folder(path: Path, name: str) -> _Source:
    _, batches = _TORCHVISION[name]
    for folder in (path, path / name):
        train, test = (sorted(map(str, folder.glob(f"{part}*.parquet"))) for part in ("train", "test"))
        if train and test:
            return _tables(_parquet(train), _parquet(test), name)
        root = folder.parent if folder.name == batches else folder
        if (root / batches).is_dir():
            return _torchvision(root, name)
    expected = f"train.parquet and test.parquet, or {batches}/, there or in {name}/"
    raise _bad_path(expected, str(path), "correct it")


def _torchvision(root: Path, name: str) -> _Source:
    """torchvision's copy: pickles, of which torchvision opens only those with the published checksum."""
    maker, batches = _TORCHVISION[name]
    dataset = getattr(_package("torchvision.datasets"), maker)
    try:
        parts = [dataset(str(root), train=train) for train in (True, False)]
    except RuntimeError as cause:
        expected = f"torchvision's {maker}, all files with their published checksums"
        raise _bad_path(expected, str(root / batches), "fetch it again") from cause
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    train, test = (Split(x, torch.tensor(part.targets)) for x, part in zip(images, parts, strict=True))
    return train, test, parts[0].classes


def _one_file(path: Path, name: str) -> _Source:
    if path.suffix != ".parquet":
        raise _bad_path("a .parquet file", str(path), "or give the folder it lies in")
    table = _parquet([str(path)])
    if len(table) < 6:
        raise _bad_path("6 images or more, to cut a sixth off", len(table), "give a folder with test.parquet")
    cut = len(table) - len(table) // 6
    train, test, class_names = _tables(table.select(range(cut)), table.select(range(cut, len(table))), name)
    if train.labels.unique().tolist() != test.labels.unique().tolist():
        remedy = "shuffle its rows, or give a folder with train.parquet and test.parquet"
        raise _bad_path("the same classes in a file's last sixth as before it", str(path), remedy)
    return train, test, class_names


def _hub(repository: str, name: str) -> _Source:
    datasets = _package("datasets")
    try:
        found = datasets.load_dataset(repository)
        train, test = found["train"], found["test"]
    except Exception as cause:  # the Hub's client raises its own kinds, its HTTP library's, and OSError
        remedy = f"correct it ({type(cause).__name__}: {cause})"
        expected = "a path that exists, or a Hub data set with train and test"
        raise _bad_path(expected, repository, remedy) from cause
    return _tables(train, test, name, files=True)


def _parquet(files: list[str]) -> Any:
    """The rows as one `datasets.Dataset`, held in memory: its copy on disk is gone when this returns."""
    datasets = _package("datasets")
    quiet = datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory(prefix="tost-") as cache:
            options = {"data_files": files, "cache_dir": cache, "keep_in_memory": True}
            return datasets.load_dataset("parquet", split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as cause:
        raise _bad_path("parquet files", files, f"fetch them again ({cause.__cause__ or cause})") from cause
    finally:
        if not quiet:
            datasets.enable_progress_bars()


def _tables(train: Any, test: Any, name: str, files: bool = False) -> _Source:
    """`files`: whether images may lie beside the tables, as the Hub's client leaves them; else they are inside."""
    plain = _CLASS_NAMES[name]
    class_names = getattr(train.features[_label_column(train, name)], "names", None) or plain
    if len(class_names) != len(plain):
        remedy = "is it another data set?"
        raise _bad_path(f"{len(plain)} classes for {name!r}", len(class_names), remedy)
    return _read_table(train, name, files), _read_table(test, name, files), class_names


def _read_table(table: Any, name: str, files: bool) -> Split:
    labels = table.with_format("numpy")[_label_column(table, name)][:]
    image = _column(table, "img", "image")
    rows = table.cast_column(image, _package("datasets").Image(decode=False))[image][:]
    outside = next((row["path"] for row in rows if row["bytes"] is None and row["path"]), None)
    if outside and not files:
        raise _bad_path("images inside the parquet file", f"the path {outside}", "save the table with their bytes")
    return Split(_decode([(row["path"], row["bytes"]) for row in rows], None), torch.as_tensor(labels).long())


def _label_column(table: Any, name: str) -> str:
    return _column(table, *(("fine_label", "label") if name == "cifar100" else ("label", "fine_label")))


def _column(table: Any, *names: str) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise _bad_path(f"a column {' or '.join(names)}", table.column_names, "rename it")


def _decode(sources: list[_Image], size: int | None) -> Tensor:
    """RGB images uint8 `(N, 3, H, W)` from bytes or else paths; resized to a square unless size is None."""
    if not sources:
        raise _bad_path("images", 0, "is the file complete?")
    pixels: numpy.ndarray | None = None
    for number, (path, content) in enumerate(sources):
        where = path or f"image {number}"
        image = _decode_one(path if content is None else io.BytesIO(content), where, size)
        if pixels is None:
            _check_room(len(sources), image.shape)
            pixels = numpy.empty((len(sources), *image.shape), numpy.uint8)
        if image.shape != pixels.shape[1:]:
            expected = f"all images {pixels.shape[1:]} like the first"
            raise _bad_path(expected, image.shape, f"resize {where}")
        pixels[number] = image
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _check_room(count: int, shape: Sequence[int]) -> None:
    """Raise TostError before more memory is taken than this machine has: a small file may hold a huge flat image."""
    need, have = count * math.prod(shape), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        expected = f"images that fit into this machine's {have / 2**30:.0f} GiB"
        raise _bad_path(expected, f"{need / 2**30:,.0f} GiB", "take fewer, or smaller ones")


def _decode_one(source: Any, where: str, size: int | None) -> numpy.ndarray:
    pil = _package("PIL.Image")
    try:
        with pil.open(source) as opened:
            image = opened if opened.mode == "RGB" else opened.convert("RGB")
            if size is not None:
                image = image.resize((size, size), pil.Resampling.BILINEAR)
            return numpy.asarray(image)
    except Exception as cause:  # each format's reader raises its own kinds for damaged files
        raise _bad_path("an image that can be read", where, "remove or replace it") from cause


def _folder(spec: Spec) -> _Source:
    root = Path(spec.path or "").expanduser()
    if not spec.path or not root.is_dir():
        raise _bad_path("a folder of images", spec.path, "give one that holds a folder per class")
    size = spec.image_size or 32
    if not (root / "train").is_dir():
        return _cut_folder(root, size)
    held = next((root / part for part in ("test", "val") if (root / part).is_dir()), None)
    if held is None:
        raise _bad_path("test/ or val/ beside train/", str(root), "add one")
    train, test = _class_files(root / "train"), _class_files(held)
    for name in sorted(train.keys() ^ test.keys()):
        lacking = held if name in train else root / "train"
        raise _bad_path(f"the same classes in train/ and {held.name}/", name, f"add it to {lacking}")
    return _read_folder(train, size), _read_folder(test, size), list(train)


def _cut_folder(root: Path, size: int) -> _Source:
    files = _class_files(root)
    for name, found in files.items():
        if len(found) < 2:
            expected = "2 images or more per class, one each to train and to test on"
            raise _bad_path(expected, str(root / name), "add some")
    whole = _read_folder(files, size)
    order = _spread(whole.labels)
    cut = max(len(files), round(len(whole) / 5))  # the order begins with one image of every class
    return whole.take(order[cut:]), whole.take(order[:cut]), list(files)


def _class_files(root: Path) -> dict[str, list[str]]:
    """Class name -> its image files; both in alphabetical order, hidden folders left out."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = {folder.name: sorted(map(str, filter(_is_image, folder.rglob("*")))) for folder in folders}
    if len(files) < 2:
        raise _bad_path(f"2 class folders or more in {root}", list(files), "add them")
    for name, found in files.items():
        if not found:
            raise _bad_path(f"images ({', '.join(sorted(_SUFFIXES))})", str(root / name), "add some")
    return files


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")


def _read_folder(files: dict[str, list[str]], size: int) -> Split:
    paths: list[_Image] = [(path, None) for found in files.values() for path in found]
    labels = torch.tensor([number for number, found in enumerate(files.values()) for _ in found])
    return Split(_decode(paths, size), labels)


_SOURCES = {"digits": _digits, "cifar10": _cifar, "cifar100": _cifar, "folder": _folder}
