"""`tost train` from start to end, against a training loop written by hand for the same network and data."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from interleave import Ratio, Row, timed
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tost_plugins import Recipe
from tost_plugins.lab import data, models
from tost_plugins.lab.train import train

TITLE = "tost train against a loop written by hand"
ABOUT = """
Whole runs, from reading the images to the network on disk: a static random mask of sparsity 0.9, SGD with momentum and a cosine,
random crops, an evaluation after every epoch and one on the test images at the end. The loop by hand trains the dense network
with the same data, precision and number of steps, and saves it; `tost train` also writes a checkpoint after every epoch. The time
of a run is that of its images, so the ratio is that of images per second.
"""

RATIOS = [
    Ratio("images per second, tost train to the loop by hand", "by hand", "tost train", least=0.95),
    Ratio("the loop by hand again", "by hand", "by hand again"),
]


def measure(small: bool) -> Iterator[Row]:
    """The rows of all cases."""
    with tempfile.TemporaryDirectory() as folder:
        images = pictures(Path(folder) / "images", 20 if small else 100)
        spec = {"model": "cifar/resnet8", "data": {"name": "digits"}, "duration": "1ep" if small else "5ep"}
        yield from _runs("1,437 digits of 8 px", spec, 2 if small else 15, Path(folder))
        data = {"name": "folder", "path": str(images), "image_size": 32, "batch_size": 64}
        spec = {"model": "cifar/resnet8" if small else "cifar/resnet20", "data": data, "duration": "2ep"}
        yield from _runs(f"{200 if small else 1000} images of 32 px", spec, 2 if small else 15, Path(folder))


def _runs(case: str, spec: dict[str, Any], count: int, folder: Path) -> Iterator[Row]:
    mask = {"kind": "random", "sparsity": 0.9, "allocation": "erk", "on_collapse": "keep_one"}
    recipe = Recipe.from_dict({"mask": mask, **spec})
    case = f"{recipe.model.rpartition('/')[2]}, {case}, {recipe.duration}"

    def ours() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            train(recipe, out)

    def by_hand() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            loop(recipe, Path(out) / "model.safetensors")

    contenders: dict[str, Callable[[], None]] = {"tost train": ours, "by hand": by_hand, "by hand again": by_hand}
    yield from timed(case, contenders, count, warm_up=1)


def loop(recipe: Recipe, out: Path) -> None:
    """What a good user would write: no library of ours but for the network and for reading the files."""
    found = data.load(recipe.data)
    torch.manual_seed(0)
    model = models.build(recipe.model, found.classes, found.train.images.shape[1])
    spec, size = recipe.optimizer, recipe.data.batch_size
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (found.mean, found.std))
    cast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=recipe.precision == "bf16")

    def prepared(images: Tensor) -> Tensor:
        return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    def accuracy(images: Tensor, labels: Tensor) -> float:
        model.eval()
        with torch.no_grad(), cast():
            right = sum(int((model(prepared(x)).argmax(1) == y).sum())
                        for x, y in zip(images.split(500), labels.split(500), strict=True))  # fmt: skip
        model.train()
        return right / len(images)

    optimizer = torch.optim.SGD(model.parameters(), lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)
    images, labels, augment = found.train.images, found.train.labels, found.augment
    epochs, steps = int(recipe.duration.value), len(images) // size + (len(images) % size > 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / epochs / steps)) / 2
    )
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(size)[:steps]:
            x = images[batch]
            if augment is not None:
                x = _crops(x, augment.padding, augment.flip)
            with cast():
                outputs = model(prepared(x)).float()
            loss = F.cross_entropy(outputs, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        held_out = found.validation if len(found.validation) else found.test
        accuracy(held_out.images, held_out.labels)
    accuracy(found.test.images, found.test.labels)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, str(out))


def _crops(images: Tensor, padding: int, flip: bool) -> Tensor:
    """A crop of each padded image, mirrored in one of two cases."""
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, count, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if flip:
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    which = torch.arange(count)[:, None, None]
    return padded.movedim(1, -1)[which, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def pictures(root: Path, per_class: int) -> Path:
    """Random pictures of ten classes, as files."""
    numbers = np.random.default_rng(0)
    for part, count in (("train", per_class), ("test", per_class // 5)):
        for label in range(10):
            folder = root / part / str(label)
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(numbers.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root
