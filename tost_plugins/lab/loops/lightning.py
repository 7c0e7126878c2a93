"""The Lightning Trainer with TostLightning."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from tost_plugins.adapters.lightning import TostLightning
from tost_plugins.lab import checkpoints
from tost_plugins.lab.job import Job
from tost_plugins.session.session import Session
from tost_plugins.training import rng


class _Network(LightningModule):
    """The network, its loss, and the recipe's optimizer and learning rate."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job, self.module = job, job.model  # this name is a wrapper's to every mask: weights keep theirs

    def forward(self, images: Tensor) -> Tensor:
        return self.job.forward(self.module, images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = self.job.optimizer(self.parameters())
        return [optimizer], [{"scheduler": self.job.scheduler(optimizer), "interval": "step"}]


class _Rest:
    """The loader's batches from the Trainer's step on; it finds its place by itself, so it has no state to be saved."""

    def __init__(self, job: Job) -> None:
        self.loader = job.loader
        self.trainer: Trainer

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, start = divmod(self.trainer.global_step, len(self))
        self.loader.set_epoch(epoch)
        yield from self.loader.iterate(start)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _Watch(Callback):
    """Follows the run: evaluation, checkpoints, random states, Ctrl-C."""

    def __init__(self, job: Job, tost: TostLightning) -> None:
        self.job, self.tost = job, tost
        self.random: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.random:
            rng.restore(self.random)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        job, step = self.job, trainer.global_step
        lr = trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0]
        if job.after_step(step, outputs["loss"].item(), job.model, self.tost.session, lr):
            job.checkpoints.mkdir(exist_ok=True)
            trainer.save_checkpoint(job.checkpoints / "writing.pt")
            (job.checkpoints / "writing.pt").replace(job.checkpoints / "last.pt")
            job.saved(step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = rng.states()  # of which Lightning keeps none

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.random = checkpoint["rng"]
        self.job.rewind_history(checkpoint["global_step"])


def run(job: Job, resume: bool) -> Session:
    """Train, from the last checkpoint with `resume`."""
    torch.manual_seed(job.recipe.seed)  # like the other trainers, which seed themselves: dropout is the same in all
    path = job.checkpoints / "last.pt"
    resume = resume and bool(checkpoints.last({1: path}, job.model))
    tost = TostLightning(job.recipe, mask=job.mask, criterion=lambda outputs, batch: F.cross_entropy(outputs, batch[1]))
    batches = _Rest(job)
    with _quiet():
        batches.trainer = Trainer(
            accelerator="gpu" if job.device.type == "cuda" else "cpu", devices=1, max_epochs=-1, max_steps=job.total_steps,
            callbacks=[tost, _Watch(job, tost)], logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=job.out,
        )  # fmt: skip
        batches.trainer.fit(_Network(job), batches, ckpt_path=path if resume else None)
    return tost.session


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's lines on devices, and on what it would log and check in other runs."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
