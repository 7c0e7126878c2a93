"""The plain PyTorch loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tost_plugins.files import pickles
from tost_plugins.files.atomic import replacing
from tost_plugins.lab import checkpoints
from tost_plugins.lab.job import Job
from tost_plugins.session.session import Session
from tost_plugins.training import rng


def run(job: Job, resume: bool) -> Session:
    """Train, from the last checkpoint with `resume`."""
    torch.manual_seed(job.recipe.seed)  # like the other trainers, which seed themselves: dropout is the same in all
    model, path = job.model, job.checkpoints / "last.pt"
    resume = resume and bool(checkpoints.last({1: path}, model))
    session = Session(model, job.recipe, job.mask).attach()
    optimizer = job.optimizer(model.parameters())
    scheduler = job.scheduler(optimizer)
    step = 0
    if resume:
        saved = pickles.load(path)
        for part, state in ((model, "model"), (optimizer, "optimizer"), (scheduler, "scheduler"), (session, "session")):
            part.load_state_dict(saved[state])
        rng.restore(saved["rng"])
        step = saved["step"]
        job.rewind_history(step)

    def save() -> None:
        job.checkpoints.mkdir(exist_ok=True)
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "rng": rng.states(),
                   "scheduler": scheduler.state_dict(), "session": session.state_dict()}  # fmt: skip
        with replacing(path) as temporary:
            torch.save(content, temporary)

    loss_fn = session.criterion(F.cross_entropy)
    model.train()
    with session.drive(optimizer, job.loader, F.cross_entropy, job.total_steps, job.steps_per_epoch):
        for images, labels in job.batches(step):
            loss = loss_fn(job.forward(model, images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            if job.after_step(step, loss.item(), model, session, scheduler.get_last_lr()[0]):
                save()
                job.saved(step)
    return session
