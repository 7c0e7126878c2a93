"""Labelled images in memory, and seeded batches of them (`Loader`).

Images are held as one uint8 tensor per split, so that a batch is an index, a crop and a multiply-add.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tost_plugins.errors import wrong
from tost_plugins.training.seeds import generator

SPLIT_SEED = 20220722  # which images are held out: a constant, so that every run holds out the same ones


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 `(N, C, H, W)` in 0..255 and their labels int64 `(N,)`; `len(split)` is N, which may be 0.

    Raises TostError for any other type or shape.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4:
            got = f"{images.dtype} {tuple(images.shape)}"
            raise wrong("Split", "images as uint8 (N, C, H, W)", got, "convert and stack them")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise wrong("Split", f"labels as int64 ({len(images)},)", got, "give one class number per image")

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Tensor) -> Split:
        """The images at these positions, in this order."""
        return Split(self.images[indices], self.labels[indices])

    def cut(self, count: int) -> tuple[Split, Split]:
        """All but `count` images, and those: the same ones in every run, each part in a random order, of which every
        beginning is balanced over the classes.

        The first K of K classes are one image of each. The first images of a folder would all be of one class
        otherwise.
        """
        shuffled = torch.randperm(len(self), generator=torch.Generator().manual_seed(SPLIT_SEED))
        share = torch.empty(len(self), dtype=torch.float64)  # how much of an image's class comes before it
        for label in self.labels.unique():
            members = (self.labels[shuffled] == label).nonzero().squeeze(1)
            share[members] = torch.arange(len(members), dtype=torch.float64) / len(members)
        order = shuffled[torch.sort(share, stable=True).indices]
        return self.take(order[count:]), self.take(order[:count])

    def to(self, device: torch.device | str) -> Split:
        """The same images and labels on a device, which then makes the batches."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Augment:
    """A random crop of the zero-padded image and, with `flip`, a mirror image in one of two cases.

    `padding` is in pixels on each side; 0 leaves every image in place.
    """

    padding: int
    flip: bool

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random int64 `(count, 3)`: row and column of the crop in 0..2*padding, and 1 for mirrored."""
        corner = torch.randint(0, 2 * self.padding + 1, (count, 2), generator=generator)
        mirrored = torch.randint(0, 2 if self.flip else 1, (count, 1), generator=generator)
        return torch.cat([corner, mirrored], dim=1)

    def apply(self, images: Tensor, choices: Tensor) -> Tensor:
        """The crops `(N, C, H, W)` that `choices` name; a row `(padding, padding, 0)` is the image itself."""
        count, channels, height, width = images.shape
        padded = F.pad(images, (self.padding,) * 4)
        top, left, mirrored = choices[:, :1], choices[:, 1:2], choices[:, 2:]
        columns = torch.arange(width, device=images.device).expand(count, width)
        columns = left + torch.where(mirrored == 1, columns.flip(1), columns)
        rows = top + torch.arange(height, device=images.device)
        # One gather crops and mirrors at once: half the time of a crop and then torch.where over the pixels.
        flat = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).view(count, 1, -1)
        return padded.flatten(2).gather(2, flat.expand(-1, channels, -1)).view(images.shape)


@dataclass(frozen=True, eq=False)
class Data:
    """A data set, ready for `Loader`.

    `mean` and `std` are per channel on the 0..1 scale, over the training split. `augment` is None where the
    recipe turns it off. `validation` is empty unless the recipe asks for it.
    """

    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment | None

    @property
    def classes(self) -> int:
        """Number of classes; labels are 0..classes-1."""
        return len(self.class_names)

    def to(self, device: torch.device | str) -> Data:
        """The same data with all splits on a device."""
        splits = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **splits)


#: What a source returns: the training split, the test split and the class names.
Source = tuple[Split, Split, Sequence[str]]


class Loader:
    """Batches of a split, the same ones whenever the seed and the epoch are the same.

    Iterating yields `(images, labels)`: float32 `(N, C, H, W)`, normalised by `mean` and `std` (0..1 scale,
    one value per channel), and int64 `(N,)`. It can be iterated any number of times and changes nothing: the
    order depends on `(seed, epoch)` alone, the augmentation of batch i on `(seed, epoch, i)` alone, and the
    global random state is neither read nor moved. Only `set_epoch` moves to another epoch. All is drawn on the CPU,
    the same for every device; the batches are made on that of the split.

    `batch_size` counts the images of all ranks together: rank r of `world` gets `batch[r::world]` of the very
    batches that a single rank would get whole. Without shuffling, a short last batch may be empty on the last
    ranks.

    The last batch may be short. It is left out if `drop_last` is set and, when shuffling, also if some rank
    would get fewer than 2 images of it, which batch norm cannot train on; every epoch then leaves out other
    images. The only batch of a small split is never left out for that.

    Raises TostError for an empty split, a batch size or a split below `world`, `drop_last` with a batch
    larger than the split, a rank outside 0..world-1, and another number of means or stds than channels.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        augment: Augment | None,
        mean: Sequence[float],
        std: Sequence[float],
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.dataset, self.batch_size, self.drop_last = split, batch_size, drop_last
        self.seed, self.epoch, self.shuffle, self.augment = seed, 0, shuffle, augment
        self.rank, self.world = rank, world
        self._check(len(mean), len(std))
        # (x / 255 - mean) / std as one multiply-add
        inverse = 1 / torch.tensor(std, dtype=torch.float64).view(1, -1, 1, 1)
        device = split.images.device
        self._scale = (inverse / 255).float().to(device)
        self._shift = (-torch.tensor(mean, dtype=torch.float64).view(1, -1, 1, 1) * inverse).float().to(device)

    def __len__(self) -> int:
        """Number of batches in an epoch, the same on every rank."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        dropped = self.drop_last or (self.shuffle and whole > 0 and rest < 2 * self.world)
        return whole + (rest > 0 and not dropped)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.iterate()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that iterators made from now on go through."""
        self.epoch = epoch

    def iterate(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The epoch from batch `start` on, without preparing those before: what a resumed run continues with.

        Raises TostError for a start outside 0..len(self).
        """
        if not 0 <= start <= len(self):
            raise wrong("Loader", f"a start in 0..{len(self)}", start, "choose the epoch with set_epoch")
        return self._batches(self.epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.dataset))
        if self.shuffle:
            order = torch.randperm(len(order), generator=generator(self.seed, epoch))
        mine, device = slice(self.rank, None, self.world), self.dataset.images.device
        for number in range(start, len(self)):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            here = batch[mine].to(device)
            images = self.dataset.images[here]
            if self.augment is not None:
                # Drawn for the images of all ranks, so that any number of ranks together see the same.
                choices = self.augment.draw(len(batch), generator(self.seed, epoch, number))
                images = self.augment.apply(images, choices[mine].to(device))
            images = images.float().contiguous(memory_format=torch.channels_last)  # convolutions are faster so
            yield images.mul_(self._scale).add_(self._shift), self.dataset.labels[here]

    def _check(self, means: int, stds: int) -> None:
        count, channels = len(self.dataset), self.dataset.images.shape[1]
        if count == 0:
            raise wrong("Loader", "a split with images", 0, "load more, or hold out some for it")
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise wrong("Loader", "a rank in 0..world-1", (self.rank, self.world), "ranks count from 0")
        if min(self.batch_size, count) < self.world:
            expected = f"a batch size and a split of {self.world} or more, one image per rank"
            raise wrong("Loader", expected, (self.batch_size, count), "use larger ones")
        if self.drop_last and self.batch_size > count:
            expected = f"a batch size of at most {count}, the whole split, with drop_last"
            raise wrong("Loader", expected, self.batch_size, "lower it, or keep the last batch")
        if (means, stds) != (channels, channels):
            expected = f"{channels} means and stds, one per channel"
            raise wrong("Loader", expected, (means, stds), "take them from the same Data")
