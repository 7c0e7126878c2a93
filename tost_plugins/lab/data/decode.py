"""What the sources share: images decoded into memory, the packages for it, and the error about a path."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from tost_plugins.errors import TostError, wrong
from tost_plugins.training.optional import package

Image = tuple[str | None, bytes | None]  # a path, or the content of a file


def bad_path(expected: str, got: object, remedy: str) -> TostError:
    """The error of a source that finds nothing that fits."""
    return wrong("data.path", expected, got, remedy)


def vision(name: str) -> Any:
    """A package that only some sources need."""
    return package(name, "data", "tost_plugins[vision]")


def decode(sources: list[Image], size: int | None) -> Tensor:
    """RGB images uint8 `(N, 3, H, W)` from bytes or else paths; resized to a square unless size is None."""
    if not sources:
        raise bad_path("images", 0, "is the file complete?")
    pixels: numpy.ndarray | None = None
    for number, (path, content) in enumerate(sources):
        where = path or f"image {number}"
        image = _decode_one(path if content is None else io.BytesIO(content), where, size)
        if pixels is None:
            _check_room(len(sources), image.shape)
            pixels = numpy.empty((len(sources), *image.shape), numpy.uint8)
        if image.shape != pixels.shape[1:]:
            expected = f"all images {pixels.shape[1:]} like the first"
            raise bad_path(expected, image.shape, f"resize {where}")
        pixels[number] = image
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _check_room(count: int, shape: Sequence[int]) -> None:
    """Raise TostError before more memory is taken than this machine has: a small file may hold a huge flat image."""
    need, have = count * math.prod(shape), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        expected = f"images that fit into this machine's {have / 2**30:.0f} GiB"
        raise bad_path(expected, f"{need / 2**30:,.0f} GiB", "take fewer, or smaller ones")


def _decode_one(source: Any, where: str, size: int | None) -> numpy.ndarray:
    pil = vision("PIL.Image")
    try:
        with pil.open(source) as opened:
            image = opened if opened.mode == "RGB" else opened.convert("RGB")
            if size is not None:
                image = image.resize((size, size), pil.Resampling.BILINEAR)
            return numpy.asarray(image)
    except Exception as cause:  # each format's reader raises its own kinds for damaged files
        raise bad_path("an image that can be read", where, "remove or replace it") from cause
