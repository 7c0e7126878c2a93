"""Where labelled images come from: `load` reads a data set that a recipe names into memory. A new one is a file and a row.

sklearn, datasets, PIL and torchvision are imported only by the source that needs them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tost_plugins.errors import unknown, wrong
from tost_plugins.lab.data.cifar import cifar
from tost_plugins.lab.data.digits import digits
from tost_plugins.lab.data.folder import folder
from tost_plugins.lab.data.images import Augment, Data, Source, Split
from tost_plugins.recipe.recipe import DataSpec

_SOURCES: dict[str, Callable[[DataSpec], Source]] = {
    "digits": digits, "cifar10": cifar, "cifar100": cifar, "folder": folder,
}  # fmt: skip


def load(spec: DataSpec) -> Data:
    """The data set that `spec` names, decoded into memory.

    `name` and `path`:

    * `digits`: the 1797 handwritten digits of scikit-learn, 8x8 grey, 1437 of them to train on; takes no
      path. `image_size` (None: 8) repeats pixels.
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
    if spec.image_size is not None and spec.image_size < 1:
        raise wrong("data.image_size", "1 pixel or more", spec.image_size, "32 is usual")
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
    rest, held_out = train.cut(validation)
    return rest if limit is None else rest.take(torch.arange(limit)), held_out


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
