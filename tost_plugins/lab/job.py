"""One run of `tost train`, and what every trainer's loop needs of it: optimizer, batches, history, the next checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tost_plugins.files.atomic import copy_folder, read_json, write
from tost_plugins.lab import data
from tost_plugins.lab.progress import Listener, silent
from tost_plugins.masks.mask import Mask
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.session.session import Session
from tost_plugins.training.clock import Clock


class Stopped(Exception):
    """Ctrl-C was pressed and a checkpoint has been written: `--resume` goes on from it."""


@dataclass
class Job:
    """One run, and what every trainer's loop needs of it."""

    recipe: Recipe
    out: Path
    data: data.Data
    model: nn.Module
    loader: data.Loader
    total_steps: int
    device: torch.device
    mask: Mask | None = None
    listen: Listener = silent
    stop: bool = False
    keep_at: int = 0  # the step whose checkpoint stays in out/early, for a lottery ticket to rewind to; 0 for none
    history: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, float]] = field(default_factory=list)  # alpha and beta, about 200 points
    _losses: list[float] = field(default_factory=list)
    _stopping: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training images."""
        return len(self.loader)

    @property
    def epochs(self) -> int:
        """Passes that are begun; the last may end in its middle."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    @property
    def checkpoints(self) -> Path:
        """The folder of the trainer's own checkpoints."""
        return self.out / "checkpoints"

    def forward(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """The logits, float32, computed in the recipe's precision; weights and gradients are float32 in either."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            return model(images).float()

    def optimizer(self, params: Any) -> Optimizer:
        """The recipe's optimizer."""
        spec = self.recipe.optimizer
        if spec.kind == "adamw":
            return torch.optim.AdamW(params, lr=spec.lr, weight_decay=spec.weight_decay)
        return torch.optim.SGD(
            params, lr=spec.lr, momentum=spec.momentum, nesterov=spec.nesterov, weight_decay=spec.weight_decay
        )

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """The recipe's learning rate, stepped once per optimizer step."""
        spec, clock = self.recipe.schedule, Clock(0, self.total_steps, self.steps_per_epoch)
        drops, warmup = [time.steps(clock) for time in spec.at], spec.warmup.steps(clock)

        def factor(step: int) -> float:
            rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
            if spec.kind == "steps":
                return rise * spec.factor ** sum(step >= drop for drop in drops)
            if spec.kind == "cosine":
                done = max(0, step - warmup) / max(1, self.total_steps - warmup)
                return rise * (1 + math.cos(math.pi * min(1.0, done))) / 2
            return rise

        return LambdaLR(optimizer, factor)

    def batches(self, step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the whole run from optimizer step `step` on, on the device."""
        while step < self.total_steps:
            epoch, start = divmod(step, self.steps_per_epoch)
            self.loader.set_epoch(epoch)
            for images, labels in self.loader.iterate(start):
                if step == self.total_steps:
                    return
                yield images.to(self.device), labels.to(self.device)
                step += 1

    def after_step(self, step: int, loss: float, model: nn.Module, session: Session, lr: float) -> bool:
        """Count a step; at the end of an epoch evaluate and write it down. True when a checkpoint is due, and then `saved`."""
        if self.keep_at and step == self.keep_at + 1:  # the last checkpoint is that step's, and whole by now
            copy_folder(self.checkpoints, self.out / "early")
        if (step - 1) % self.steps_per_epoch == 0:
            self._losses = []
        self._losses.append(loss)
        self.listen("step", {"step": step, "total": self.total_steps, "loss": loss})
        ends = step % self.steps_per_epoch == 0 or step == self.total_steps
        if step % max(1, self.total_steps // 200) == 0:
            strengths = {key: value for key, value in session.metrics().items() if key.count("/") == 2}
            self.curves.append({"epoch": step / self.steps_per_epoch, **strengths})
        if ends:
            held_out = self.data.validation if len(self.data.validation) else self.data.test
            row = {"epoch": step / self.steps_per_epoch, "step": step, "lr": lr}
            row |= {"train_loss": sum(self._losses) / len(self._losses), **self.evaluate(model, held_out)}
            row |= session.metrics()
            if session.moving is not None:
                row["densities"] = {layer["layer"]: layer["density"] for layer in session.report().rows}
            self.history.append(row)
            self._write_history()
            self.listen("epoch", row)
        due = ends or self.stop or step == self.keep_at
        if due:
            progress = {"step": step, "losses": self._losses, "curves": self.curves}
            write(self.out / "progress.json", json.dumps(progress))
        self._stopping = due and self.stop  # a later Ctrl-C is for the next step, which saves before it stops
        return due

    def saved(self, step: int) -> None:
        """The checkpoint that was due is written: raises Stopped where Ctrl-C has asked for it, unless the run is over."""
        if self._stopping and step < self.total_steps:
            raise Stopped(f"stopped at step {step} of {self.total_steps}")

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: data.Split) -> dict[str, float]:
        """Accuracy (percent) and loss (hard labels) on a split, in eval mode; the model's mode comes back."""
        was, right, loss = model.training, 0, 0.0
        model.eval()
        loader = data.Loader(split, 500, seed=0, shuffle=False, augment=None, mean=self.data.mean, std=self.data.std)
        for images, labels in loader:
            logits, labels = self.forward(model, images.to(self.device)), labels.to(self.device)
            right += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        model.train(was)
        return {"accuracy": 100 * right / len(split), "loss": loss / len(split)}

    def rewind_history(self, step: int) -> None:
        """Read back what a stopped run wrote down up to `step`."""
        path = self.out / "progress.json"
        found = read_json(path) if path.exists() else {"step": 0, "losses": [], "curves": []}
        first = found["step"] - len(found["losses"])  # it may be of a later step, whose checkpoint was being written
        self._losses = found["losses"][: max(0, step - first)]
        self.curves = [row for row in found["curves"] if row["epoch"] <= step / self.steps_per_epoch]
        path = self.out / "history.jsonl"
        rows = read_json(path) if path.exists() else []
        self.history = [row for row in rows if row["step"] <= step]
        self._write_history()

    def _write_history(self) -> None:
        write(self.out / "history.jsonl", "".join(json.dumps(row) + "\n" for row in self.history))
