"""The same training step in Composer's Trainer, Hugging Face's Trainer and a loop with Accelerate."""

from __future__ import annotations

import copy
import functools
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from interleave import Ratio, Row, timed
from step import LIMITS, RECIPES
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from tost_plugins.lab import models

TITLE = "A training step under the three trainers"
ABOUT = """
Every round is a short run of each contender, in a trainer and with a network made for it, by the adapter that users would take.
The time is that between two batches which the trainer asks for, so that all is in it that the trainer does in a step; the first
two steps of a run do not count.
"""

NAMES = ("untouched again", "static", "all tweaks", "after the ghosts")
RATIOS = [Ratio(name, name, "untouched", most=LIMITS.get(name)) for name in NAMES]
_WARM = 2  # steps of a run that do not count


class Ticking(IterableDataset):
    """The same batch again and again, and when it was asked for."""

    def __init__(self, batch: Any, count: int) -> None:
        self.batch, self.count, self.ticks = batch, count, []

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        self.ticks = []
        for _ in range(self.count):
            self.ticks.append(time.perf_counter())
            yield self.batch

    @property
    def seconds(self) -> float:
        """Of a step."""
        return (self.ticks[-1] - self.ticks[_WARM]) / (len(self.ticks) - 1 - _WARM)


def measure(small: bool) -> Iterator[Row]:
    """The rows of all trainers."""
    logging.getLogger("tost_plugins").setLevel(logging.WARNING)  # runs are made by the hundred
    warnings.simplefilter("ignore")
    model, batch, size, count = ("cifar/resnet8", 8, 16, 2) if small else ("torchvision/resnet18", 64, 32, 15)
    torch.manual_seed(0)
    network = models.build(model, 10).train()
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    for trainer, fit in TRAINERS.items():
        case = f"{trainer}: {model.rpartition('/')[2]}, {batch} images of {size} px"
        contenders = {
            name: functools.partial(_run, fit, name, network, images, labels) for name in ("untouched", *NAMES)
        }
        yield from timed(case, contenders, count, warm_up=1)


def _run(fit: Callable[..., None], name: str, network: nn.Module, images: Tensor, labels: Tensor) -> float:
    model = copy.deepcopy(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    ticking = Ticking((images, labels), _WARM + 5)
    fit(RECIPES.get(name), model, optimizer, ticking)
    return ticking.seconds


def _composer(
    recipe: dict[str, Any] | None, model: nn.Module, optimizer: torch.optim.Optimizer, ticking: Ticking
) -> None:
    from composer import Trainer
    from composer.models import ComposerClassifier

    from tost_plugins import TostAlgorithm

    trainer = Trainer(
        model=ComposerClassifier(model, num_classes=10, loss_fn=lambda outputs, labels: F.cross_entropy(outputs, labels)),
        train_dataloader=DataLoader(ticking, batch_size=None),
        max_duration=f"{len(ticking)}ba",
        optimizers=optimizer,
        algorithms=[] if recipe is None else [TostAlgorithm(recipe)],
        device="cpu",
        device_train_microbatch_size=len(ticking.batch[1]),
        precision="fp32",
        progress_bar=False,
    )  # fmt: skip
    trainer.fit()
    trainer.close()


class _Named(nn.Module):
    """The Trainer passes a batch's columns by name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.module(pixel_values)}


def _transformers(
    recipe: dict[str, Any] | None, model: nn.Module, optimizer: torch.optim.Optimizer, ticking: Ticking
) -> None:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from tost_plugins import TostCallback

    images, labels = ticking.batch
    ticking.batch = {"pixel_values": images, "labels": labels}
    tost = None if recipe is None else TostCallback(recipe)

    def loss_fn(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels)

    class Given(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(ticking, batch_size=None)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=len(ticking), max_grad_norm=0, save_strategy="no", logging_strategy="no",
            report_to=[], disable_tqdm=True, remove_unused_columns=False, use_cpu=True,
        )  # fmt: skip
        trainer = Given(
            model=_Named(model), args=arguments, callbacks=[] if tost is None else [tost], optimizers=(optimizer, None),
            compute_loss_func=loss_fn if tost is None else tost.criterion(F.cross_entropy),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def _accelerate(
    recipe: dict[str, Any] | None, model: nn.Module, optimizer: torch.optim.Optimizer, ticking: Ticking
) -> None:
    from accelerate import Accelerator

    from tost_plugins import TostHook

    accelerator = Accelerator(cpu=True)
    tost = None if recipe is None else TostHook(recipe, accelerator)
    if tost is not None:
        tost.attach(model, optimizer)
    network, stepper, loader = accelerator.prepare(model, optimizer, DataLoader(ticking, batch_size=None))
    loss_fn: Any = F.cross_entropy
    if tost is not None:
        tost.start(stepper, loader, total_steps=len(ticking))
        loss_fn = tost.criterion(loss_fn)
    for images, labels in loader:
        loss = loss_fn(network(images), labels)
        stepper.zero_grad()
        accelerator.backward(loss)
        stepper.step()
    if tost is not None:
        tost.finish()


TRAINERS: dict[str, Callable[..., None]] = {
    "Composer": _composer,
    "Hugging Face Trainer": _transformers,
    "Accelerate": _accelerate,
}
