"""The Hugging Face Trainer with TostCallback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from tost_plugins.adapters.transformers import TostCallback
from tost_plugins.lab import checkpoints
from tost_plugins.lab.data import Loader
from tost_plugins.lab.job import Job
from tost_plugins.session.session import Session

_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


class _Named(nn.Module):
    """Our networks take a tensor; the Trainer passes a batch's columns by name."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job, self.module = job, job.model  # this name is a wrapper's to every mask: weights keep theirs

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.job.forward(self.module, pixel_values)}


class _Columns:
    """The loader's batches as columns, from optimizer step `first` of `total` on; the Trainer calls `set_epoch`."""

    def __init__(self, loader: Loader, first: int, total: int) -> None:
        self.loader, self.batch_size, self.dataset = loader, loader.batch_size, loader.dataset
        self.epoch, self.start = divmod(first, len(loader))
        self.over = first >= total  # the Trainer takes a step before it looks whether it was to take any
        self.begun = False  # before the first epoch it is the session that looks at batches

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        start = self.start if self.loader.epoch == self.epoch else 0
        start = len(self) if self.over and self.begun else start
        for images, labels in self.loader.iterate(start):
            yield {"pixel_values": images, "labels": labels}

    def set_epoch(self, epoch: int) -> None:
        self.begun = True
        self.loader.set_epoch(epoch)


class _Trainer(Trainer):
    """The Trainer on a loader that is made already; `watch` is told the loss."""

    def __init__(self, columns: _Columns, watch: _Watch, **kwargs: Any) -> None:
        self.columns, self.watch = columns, watch
        super().__init__(**kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.watch.loss = loss.item()
        return loss

    def get_train_dataloader(self) -> Any:
        return self.columns


class _Watch(TrainerCallback):
    """Follows the run: evaluation, checkpoints, Ctrl-C."""

    def __init__(self, job: Job, tost: TostCallback) -> None:
        self.job, self.tost, self.loss = job, tost, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        job, lr = self.job, kwargs["lr_scheduler"].get_last_lr()[0]
        control.should_save = job.after_step(state.global_step, self.loss, job.model, self.tost.session, lr)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.job.saved(state.global_step)


def run(job: Job, resume: bool) -> Session:
    """Train, from the last checkpoint with `resume`."""
    saved = _saved(job) if resume else {}
    step = checkpoints.last(saved, job.model, _FILES)
    model = _Named(job)
    optimizer = job.optimizer(model.parameters())
    tost = TostCallback(job.recipe, mask=job.mask)
    watch = _Watch(job, tost)
    args = TrainingArguments(
        output_dir=str(job.checkpoints), max_steps=job.total_steps, max_grad_norm=0, seed=job.recipe.seed,
        per_device_train_batch_size=job.recipe.data.batch_size, use_cpu=job.device.type == "cpu",
        save_strategy="no", save_total_limit=1, logging_strategy="no", report_to=[], disable_tqdm=True,
        remove_unused_columns=False, ignore_data_skip=True,  # our loader starts in the middle of an epoch by itself
    )  # fmt: skip
    args._n_gpu = min(args.n_gpu, 1)  # one GPU, like the other trainers here; with several it takes DataParallel
    trainer = _Trainer(
        _Columns(job.loader, step, job.total_steps), watch, model=model, args=args, callbacks=[tost, watch],
        compute_loss_func=tost.criterion(F.cross_entropy), optimizers=(optimizer, job.scheduler(optimizer)),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if step:
        job.rewind_history(step)
    trainer.train(resume_from_checkpoint=str(saved[step]) if step else None)
    return tost.session


def _saved(job: Job) -> dict[int, Path]:
    """Step -> folder of the checkpoints that were not being written: the Trainer puts its own state there last."""
    states = filter(checkpoints.is_whole, job.checkpoints.glob("checkpoint-*/trainer_state.json"))
    return {int(path.parent.name.rpartition("-")[2]): path.parent for path in states}
