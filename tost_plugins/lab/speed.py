"""`tost speed`: one sparse run three times side by side: dense, with the mask, and compact; what a step takes in each."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tost_plugins.errors import TostError
from tost_plugins.files.atomic import replacing, write
from tost_plugins.lab.job import Job
from tost_plugins.lab.progress import Listener, silent
from tost_plugins.lab.train import prepare
from tost_plugins.masks import run as find
from tost_plugins.masks.base import Moving
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.paths.connectivity import Connectivity, Paths
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.session.session import Session
from tost_plugins.training.task import Task

CHECKED = 5
NAMES = ("dense", "sparse", "compact")


@dataclass
class _Run:
    """One of the three, with its own network and optimizer."""

    job: Job
    session: Session | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    criterion: Any
    seconds: list[float] = field(default_factory=list)

    def step(self, images: torch.Tensor, labels: torch.Tensor, seed: int) -> None:
        torch.manual_seed(seed)  # dropout is the same in all three
        start = time.perf_counter()
        with torch.autocast(self.job.device.type, torch.bfloat16, enabled=self.job.recipe.precision == "bf16"):
            logits = self.job.model(images)
        loss = self.criterion(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.scheduler.step()


def speed(recipe: Recipe, out: str | Path, listen: Listener = silent) -> dict[str, Any]:
    """Train a recipe dense, sparse, and sparse and compact, in turns step by step, on the same batches; the two sparse ones on
    the live part of one mask.

    Returns for each the median seconds of a step and its test accuracy (percent), what the mask connects, and how far the
    compact network is from the sparse one after the first `CHECKED` steps in float64 (largest difference over a tensor's
    largest number): in float32 rounding alone leads any two runs apart in the end. Leaves `speed.json` and `speed.png` in
    `out`. Raises TostError for a mask that moves.
    """
    if isinstance(recipe.mask, Moving):
        raise TostError(
            f"tost speed: expected a mask that stays, got {recipe.mask.kind}; use random, snip, grasp or synflow"
        )
    out = Path(out)
    first = prepare(recipe, out)
    task = Task.of(first.model, recipe.mask.ignore, batches=first.loader, loss_fn=F.cross_entropy)
    mask = find(recipe.mask, task, recipe.seed)
    found = Paths(task).connectivity(mask)
    with ExitStack() as stack:
        runs = {name: stack.enter_context(_begun(recipe, out, found.live, name)) for name in NAMES}
        listen("run", {"name": recipe.name, "model": recipe.model, "data": recipe.data.name, "trainer": "torch",
                       "total": first.total_steps})  # fmt: skip
        for step, (images, labels) in enumerate(first.batches()):
            order = NAMES[step % 3 :] + NAMES[: step % 3]
            for name in order:
                runs[name].step(images, labels, step)
            listen("step", {"step": step + 1, "total": first.total_steps, "loss": 0.0})
    result = _result(recipe, runs, mask, found) | {"weights_differ": _difference(recipe, out, found.live)}
    out.mkdir(parents=True, exist_ok=True)
    write(out / "speed.json", json.dumps(result, indent=1))
    _figure(result, out / "speed.png")
    return result


@contextmanager
def _begun(recipe: Recipe, out: Path, mask: Mask, name: str, dtype: torch.dtype = torch.float32) -> Iterator[_Run]:
    job = prepare(recipe.model_copy(update={"trainer": "torch"}), out)
    model = job.model.train().to(dtype)
    optimizer = job.optimizer(model.parameters())
    with ExitStack() as stack:
        session, criterion = None, F.cross_entropy
        if name != "dense":
            session = Session(model, recipe.model_copy(update={"compact": name == "compact"}), mask).attach(optimizer)
            criterion = session.criterion(F.cross_entropy)
            images, labels = next(iter(job.batches()))
            first = [(images.to(dtype), labels)]
            stack.enter_context(session.drive(optimizer, first, F.cross_entropy, job.total_steps, job.steps_per_epoch))
            if name == "compact" and (why := [left for left in session.left_out if left.startswith("compact")]):
                raise TostError(
                    f"tost speed: expected a run that can be compact, got {why[0]}; use another network or mask"
                )
        yield _Run(job, session, optimizer, job.scheduler(optimizer), criterion)


def _result(recipe: Recipe, runs: dict[str, _Run], mask: Mask, found: Connectivity) -> dict[str, Any]:
    rows = []
    for name, run in runs.items():
        ratios = [own / dense for own, dense in zip(run.seconds, runs["dense"].seconds, strict=True)]
        rows.append({
            "network": name, "seconds_per_step": statistics.median(run.seconds), "to_dense": statistics.median(ratios),
            "test_accuracy": run.job.evaluate(run.job.model, run.job.data.test)["accuracy"],
        })  # fmt: skip
    dead = sum(row.dead for row in found.layers) / max(1, sum(row.channels for row in found.layers))
    return {
        "name": recipe.name, "model": recipe.model, "data": recipe.data.name, "mask": recipe.mask.kind,
        "steps": len(runs["dense"].seconds), "sparsity": mask.sparsity, "effective_sparsity": found.live.sparsity,
        "dead_channels": dead, "rows": rows,
    }  # fmt: skip


def _difference(recipe: Recipe, out: Path, mask: Mask) -> float:
    """How far the sparse and the compact network are apart after some steps in float64."""
    models = []
    for name in NAMES[1:]:
        with _begun(recipe, out, mask, name, torch.float64) as run:
            for step, (images, labels) in enumerate(itertools.islice(run.job.batches(), CHECKED)):
                run.step(images.double(), labels, step)
        models.append(run.job.model)
    return _apart(*models)


def _apart(one: nn.Module, two: nn.Module) -> float:
    """The largest difference between two networks' numbers, as a share of the largest number of its tensor."""
    shares = [0.0]
    other = two.state_dict()
    for name, value in one.state_dict().items():
        size = float(value.double().abs().max()) if value.numel() else 0.0
        if size:
            shares.append(float((value.double() - other[name].double()).abs().max()) / size)
    return max(shares)


def _figure(result: dict[str, Any], path: Path) -> None:
    """A bar for each network: how long a step takes beside the dense one's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axes = figure.subplots()
    rows = result["rows"][::-1]
    colours = {"dense": "#bbbbbb", "sparse": "#777777", "compact": "#0b6e99"}
    axes.barh([row["network"] for row in rows], [row["to_dense"] for row in rows],
              color=[colours[row["network"]] for row in rows])  # fmt: skip
    for i, row in enumerate(rows):
        axes.text(
            row["to_dense"], i, f"  {row['to_dense']:.2f}x, {row['test_accuracy']:.1f} %", va="center", fontsize=9
        )
    axes.set_xlim(0, 1.35 * max(row["to_dense"] for row in rows))
    axes.set_xlabel("time of a training step, dense = 1; beside it the test accuracy", fontsize=9)
    axes.set_title(f"{result['model']} on {result['data']}, {result['mask']} at {result['sparsity']:.1%}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
