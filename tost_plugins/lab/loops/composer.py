"""The Composer Trainer with TostAlgorithm."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from composer import Callback, Logger, State, Trainer
from composer.models import ComposerClassifier
from torch import Tensor

from tost_plugins.adapters.composer import TostAlgorithm
from tost_plugins.lab import checkpoints
from tost_plugins.lab.job import Job
from tost_plugins.session.session import Session


class _Watch(Callback):
    """Follows the run: epochs of the loader, evaluation, checkpoints, Ctrl-C."""

    def __init__(self, job: Job, algorithm: TostAlgorithm) -> None:
        self.job, self.algorithm = job, algorithm
        self.trainer: Trainer

    def epoch_start(self, state: State, logger: Logger) -> None:
        self.job.loader.set_epoch(int(state.timestamp.epoch))

    fit_start = epoch_start

    def batch_end(self, state: State, logger: Logger) -> None:
        job, step = self.job, int(state.timestamp.batch)
        lr = state.schedulers[0].get_last_lr()[0]
        loss = float(state.total_loss_dict["loss/train/total"])
        self.due = job.after_step(step, loss, job.model, self.algorithm.session, lr)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if self.due:
            folder = self.job.checkpoints
            folder.mkdir(exist_ok=True)
            self.trainer.save_checkpoint(str(folder / "writing.pt"))
            (folder / "writing.pt").replace(folder / "last.pt")
            self.job.saved(int(state.timestamp.batch))


class _Classifier(ComposerClassifier):
    """Composer knows bf16 on GPUs only: the forward pass casts by itself, the same in every trainer."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.model, num_classes=job.data.classes, loss_fn=F.cross_entropy)
        self.job = job

    def forward(self, batch: Any) -> Tensor:
        return self.job.forward(self.module, batch[0])


def run(job: Job, resume: bool) -> Session:
    """Train, from the last checkpoint with `resume`."""
    path = job.checkpoints / "last.pt"
    resume = resume and bool(checkpoints.last({1: path}, job.model))
    model = _Classifier(job)
    optimizer = job.optimizer(model.parameters())
    algorithm = TostAlgorithm(job.recipe, mask=job.mask)
    watch = _Watch(job, algorithm)
    watch.trainer = Trainer(
        model=model, train_dataloader=job.loader, max_duration=f"{job.total_steps}ba", optimizers=optimizer,
        schedulers=job.scheduler(optimizer), step_schedulers_every_batch=True, algorithms=[algorithm], callbacks=[watch],
        load_path=str(path) if resume else None, device="gpu" if job.device.type == "cuda" else "cpu", precision="fp32",
        seed=job.recipe.seed, progress_bar=False,
    )  # fmt: skip
    if resume:
        job.rewind_history(int(watch.trainer.state.timestamp.batch))
    if int(watch.trainer.state.timestamp.batch) < job.total_steps:  # else the last step's checkpoint has been loaded
        watch.trainer.fit()
    watch.trainer.close()
    return algorithm.session
