"""Class-balanced samples, collected from whatever batches there are."""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.training import ranks
from tost_plugins.training.batches import joined, pick, size_of
from tost_plugins.training.calling import labels_of, scores_of
from tost_plugins.training.log import say
from tost_plugins.training.task import Task

# How many times the samples that are wanted are looked at before a class counts as rare.
_LOOK = 100


def balanced(task: Task, per_class: int, method: str = "grasp") -> list[Any]:
    """Up to `per_class` samples of each class over all ranks, as batches no larger than the loader's first
    one.

    The first samples of each class that the batches give are taken, on each of R ranks ceil(per_class / R).
    A class that has fewer gives what it has, and a warning says so. Raises TostError without batches, and
    where the labels are not one whole number per sample.
    """
    first = task.take(1, method)[0]
    with torch.no_grad():
        classes = scores_of(task.outputs(task.weights(), first, labels=False), method).shape[-1]
    parts, taken = _collect(task, math.ceil(per_class / ranks.world()), classes, method)
    if not parts:
        raise TostError(f"{method}: expected samples with a class, got none; check the labels")
    short = classes - sum(count * ranks.world() >= per_class for count in taken.values())
    if short > 0:
        say(
            f"{method}: {short} of {classes} classes have fewer than {per_class} samples in the batches",
            logging.WARNING,
        )
    whole = joined(parts)
    size = size_of(whole)
    pieces = torch.arange(size).tensor_split(math.ceil(size / size_of(first)))
    return [pick(whole, piece.tolist()) for piece in pieces]


def _collect(task: Task, quota: int, classes: int, method: str) -> tuple[list[Any], Counter[int]]:
    parts: list[Any] = []
    taken: Counter[int] = Counter()
    seen = 0
    for batch in () if task.batches is None else task.batches:
        index = []
        for i, label in enumerate(_classes(task, batch, method)):
            if label >= 0 and taken[label] < quota:
                taken[label] += 1
                index.append(i)
        parts += [pick(batch, index)] if index else []
        seen += size_of(batch)
        full = sum(count >= quota for count in taken.values())
        if full >= classes or seen >= _LOOK * quota * classes:
            break
    return parts, taken


def _classes(task: Task, batch: Any, method: str) -> list[int]:
    labels = labels_of(batch, task.model)
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        got = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise TostError(
            f"{method}: expected labels that are one whole number per sample, got {got}; "
            f"use a mask method that needs no classes, such as snip"
        )
    if len(labels) != size_of(batch):
        raise TostError(
            f"{method}: expected one label for each of {size_of(batch)} samples, got {len(labels)} labels; use a mask method "
            f"that needs no classes, such as snip"
        )
    return labels.tolist()
