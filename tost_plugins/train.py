"""`tost train`: from a recipe to a finished sparse network on disk, under any of the four trainers."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tost_plugins import data, masks, models, ranks, sources
from tost_plugins.clock import Clock
from tost_plugins.errors import TostError
from tost_plugins.files import copy_folder, read_json, replacing, write, write_csv
from tost_plugins.masks.mask import Mask
from tost_plugins.optional import package
from tost_plugins.params import prunable, some
from tost_plugins.recipe import Recipe, read
from tost_plugins.session import Session
from tost_plugins.task import Task

#: What a run reports while it goes on: ("run", {...}), ("step", {...}) and ("epoch", {...}).
Listener = Callable[[str, dict[str, Any]], None]
_PACKAGES = ("tost_plugins", "torch", "torchvision", "mosaicml", "transformers", "accelerate", "datasets", "timm")


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
    listen: Listener = lambda event, values: None
    stop: bool = False
    keep_at: int = 0  # the step whose checkpoint stays in out/early, for a lottery ticket to rewind to; 0 for none
    history: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, float]] = field(default_factory=list)  # alpha and beta, about 200 points
    _losses: list[float] = field(default_factory=list)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader)

    @property
    def epochs(self) -> int:
        return math.ceil(self.total_steps / self.steps_per_epoch)

    @property
    def checkpoints(self) -> Path:
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
        """Count a step; at the end of an epoch evaluate and write it down. True when a checkpoint is due."""
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
        return due

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


def train(
    recipe: Recipe,
    out: str | Path,
    resume: bool = False,
    mask: Mask | None = None,
    listen: Listener | None = None,
    keep_at: int = 0,
    initial: Callable[[nn.Module, Mask | None], None] | None = None,
) -> dict[str, Any]:
    """Train as the recipe says and leave everything in `out`: recipe, versions, history, mask, the plain network.

    Returns what `result.json` holds: test accuracy in percent, sparsity, parameter counts, the rows of the history.
    `mask` is used instead of the recipe's; `keep_at` is a step whose checkpoint stays in `out`/early; `initial(model,
    mask)` may change the initial weights. A stopped run goes on with `resume`, a finished one is returned as it is.
    Raises TostError for anything in the recipe that does not work out, Stopped after Ctrl-C.
    """
    out = Path(out)
    check_out(out, recipe, resume)
    if (out / "result.json").exists():
        return read_json(out / "result.json")
    job = prepare(_watched(recipe, out), out, mask, listen)
    job.keep_at = keep_at
    if initial is not None:
        initial(job.model, mask)
    out.mkdir(parents=True, exist_ok=True)
    recipe.to_yaml(out / "recipe.yaml")
    write(out / "environment.json", json.dumps(environment(), indent=1))
    described = {"name": recipe.name, "model": recipe.model, "data": recipe.data.name, "trainer": recipe.trainer}
    job.listen("run", {**described, "total": job.total_steps})
    run = package(f"tost_plugins.loops.{recipe.trainer}", "trainer", f"tost_plugins[{recipe.trainer}]").run
    with _stoppable(job):
        session: Session = run(job, resume)
    return _conclude(job, session)


def prepare(recipe: Recipe, out: Path, mask: Mask | None = None, listen: Listener | None = None) -> Job:
    """Data, model (seeded) and loader of a run; nothing is written yet."""
    if ranks.world() > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TostError("tost train: expected one process, got several; for several, use an adapter in your own script")
    loaded = sources.load(recipe.data)
    torch.manual_seed(recipe.seed)
    channels = loaded.train.images.shape[1]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.build(recipe.model, loaded.classes, channels).to(device)
    if recipe.trainer == "torch":  # the others move batches themselves
        loaded = loaded.to(device)
    loader = data.Loader(
        loaded.train, recipe.data.batch_size, seed=recipe.seed, shuffle=True, augment=loaded.augment,
        mean=loaded.mean, std=loaded.std,
    )  # fmt: skip
    total = recipe.duration.steps(Clock(steps_per_epoch=len(loader)))
    if total < 1:
        raise TostError(f"duration: expected at least one optimizer step, got {str(recipe.duration)!r}; make it longer")
    return Job(recipe, out, loaded, model, loader, total, device, mask, listen or (lambda event, values: None))


def _watched(recipe: Recipe, out: Path) -> Recipe:
    """The recipe with a place for what is watched, `watch` in the run's folder unless it names another one in there: a
    recipe may come from somebody else, and writes nowhere else."""
    if recipe.watch is None:
        return recipe
    place = Path(recipe.watch.out) if recipe.watch.out is not None else out / "watch"
    if not place.resolve().is_relative_to(out.resolve()):
        raise TostError(f"watch.out: expected a folder within the run's, {out}, got {str(place)!r}; leave `out` away")
    return recipe.model_copy(update={"watch": recipe.watch.model_copy(update={"out": str(place)})})


def find_mask(recipe: Recipe) -> Mask:
    """The mask that training this recipe would start with, found in the same way, without training."""
    job = prepare(recipe, Path())
    ignore = recipe.mask.ignore
    return masks.run(recipe.mask, Task.of(job.model, ignore, batches=job.loader, loss_fn=F.cross_entropy), recipe.seed)


def environment() -> dict[str, str]:
    """Versions of what a result depends on, and the machine's kind."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_out(out: Path, recipe: Recipe, resume: bool) -> None:
    """Raise TostError unless the folder is new, or holds a run of this very recipe that is to be resumed."""
    if not (out / "recipe.yaml").exists():
        return
    if not resume:
        raise TostError(
            f"--out {out}: expected a new folder, got one that holds a run; add --resume to go on with it, "
            f"or choose another folder"
        )
    before, now = (dict(_leaves(spec.to_dict())) for spec in (Recipe.from_dict(read(out / "recipe.yaml")), recipe))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in ("name", "source")]
    if keys:
        differ = some([f"{key} {now.get(key)!r}, there {before.get(key)!r}" for key in keys])
        reason = "; no trainer reads another's checkpoints" if "trainer" in keys else ""
        raise TostError(
            f"--resume: expected the recipe that {out} was started with, got another one ({differ}){reason}; "
            f"use {out / 'recipe.yaml'}, or choose another folder"
        )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values in a recipe by their dotted keys, as `--set` has them."""
    if not isinstance(value, (dict, list)) or not value:
        yield key, value
        return
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(inner, f"{key}.{name}" if key else str(name))


def _conclude(job: Job, session: Session) -> dict[str, Any]:
    """Check the promises, then save the network and what it is worth."""
    weights = prunable(job.model, job.recipe.mask.ignore)
    mask = session.mask
    for name, keep in mask.items():
        if bool((weights[name].detach().cpu()[~keep] != 0).any()):
            raise TostError(f"{name}: expected zeros outside the mask, got others; please report this as a bug")
    mask.save(job.out / "mask.safetensors")
    if session.moving is not None:
        write_csv(job.out / "movement.csv", _movement(job.history))
    state = {name: value.detach().cpu().contiguous() for name, value in job.model.state_dict().items()}
    with replacing(job.out / "model.safetensors") as temporary:
        save_file(state, str(temporary))
    report = session.report()
    result = {
        "name": job.recipe.name,
        "model": job.recipe.model,
        "trainer": job.recipe.trainer,
        "mask": job.recipe.mask.kind,
        "tweaks": [tweak.kind for tweak in session.tweaks],
        "left_out": session.left_out,
        "seed": job.recipe.seed,
        "test_accuracy": job.evaluate(job.model, job.data.test)["accuracy"],
        "sparsity": report.sparsity,
        "active_parameters": report.active_parameters,
        "total_parameters": report.total_parameters,
        "history": job.history,
        "curves": job.curves,
    }
    write(job.out / "result.json", json.dumps(result, indent=1))
    return result


def _movement(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How a mask has moved, a row per epoch: entries changed at the last update, the share ever kept, densities."""
    keys = ("tost/sparsity", "tost/mask/changed", "tost/mask/explored")
    return [
        {"epoch": row["epoch"], **{key.rpartition("/")[2]: row[key] for key in keys}, **row["densities"]}
        for row in history
    ]


@contextmanager
def _stoppable(job: Job) -> Iterator[None]:
    """The first Ctrl-C asks the loop to write a checkpoint and stop; a second one is the usual KeyboardInterrupt."""

    def ask(signum: int, frame: Any) -> None:
        job.stop = True
        signal.signal(signal.SIGINT, before)

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: Ctrl-C is not ours to catch
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
