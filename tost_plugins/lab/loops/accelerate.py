"""The same loop with Accelerate and TostHook."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from tost_plugins.adapters.accelerate import TostHook
from tost_plugins.lab import checkpoints
from tost_plugins.lab.job import Job
from tost_plugins.session.session import Session

_FILES = ("model.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl")


def run(job: Job, resume: bool) -> Session:
    """Train, from the last checkpoint with `resume`."""
    torch.manual_seed(job.recipe.seed)  # like the other trainers, which seed themselves: dropout is the same in all
    saved = _saved(job) if resume else {}
    step = checkpoints.last(saved, job.model, _FILES)
    accelerator = Accelerator(cpu=job.device.type == "cpu")
    tost = TostHook(job.recipe, accelerator, mask=job.mask)
    bare = tost.attach(job.model)
    raw = job.optimizer(bare.parameters())
    model, optimizer, scheduler = accelerator.prepare(bare, raw, job.scheduler(raw))
    if step:
        accelerator.load_state(str(saved[step]))
        job.rewind_history(step)

    def save() -> None:
        fresh, old = job.checkpoints / "writing", _saved(job)
        shutil.rmtree(fresh, ignore_errors=True)
        accelerator.save_state(str(fresh))
        shutil.rmtree(old.pop(step, fresh / "none"), ignore_errors=True)  # a damaged one that was passed over
        fresh.replace(job.checkpoints / f"step-{step}")
        for folder in old.values():
            shutil.rmtree(folder)

    tost.start(optimizer, job.loader, job.total_steps, job.steps_per_epoch, F.cross_entropy)
    loss_fn = tost.criterion(F.cross_entropy)
    model.train()
    for images, labels in job.batches(step):
        loss = loss_fn(job.forward(model, images), labels)
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        if job.after_step(step, loss.item(), model, tost.session, scheduler.get_last_lr()[0]):
            save()
            job.saved(step)
    tost.finish()
    return tost.session


def _saved(job: Job) -> dict[int, Path]:
    """Step -> folder of the checkpoints that are complete."""
    return {int(path.name.removeprefix("step-")): path for path in job.checkpoints.glob("step-*")}
