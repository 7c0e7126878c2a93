"""`tost superpose`: Sup-tickets, a run of a moving mask whose last part is spent on several cheap tickets that become one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from tost_plugins.errors import TostError, wrong
from tost_plugins.files import pickles
from tost_plugins.files.atomic import read_json, replacing, write, write_csv
from tost_plugins.files.tensors import by_clean_name, read_tensors, write_tensors
from tost_plugins.lab.job import Job
from tost_plugins.lab.progress import Listener, silent
from tost_plugins.lab.train import check_out, prepare, train
from tost_plugins.lottery.superpose import superpose as superposed
from tost_plugins.lottery.superpose import triangular
from tost_plugins.masks.base import Averaging
from tost_plugins.masks.connected import check, followed
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.methods.set import Set
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.session.session import Session
from tost_plugins.training import rng
from tost_plugins.training.clock import Clock, Time
from tost_plugins.training.task import Task

_NEVER = Time(10**12, "ba")  # so far away that the share that moves stays what it is


@dataclass(frozen=True)
class Cycles:
    """`count` cycles, 1 or more, take the `share` of a run's steps, above 0 to below 1, in equal parts. Each is opened by a
    move of `explore` of each layer's weights, above 0 to 1 (all); its learning rate goes from `low` times the recipe's up to
    `high` times, and down again."""

    count: int = 3
    share: float = 0.1
    explore: float = 0.5
    low: float = 0.01
    high: float = 0.05

    def __post_init__(self) -> None:
        if self.count < 1:
            raise wrong("cycles", "at least 1", self.count, "the paper has 3")
        if not 0 < self.share < 1:
            raise wrong("share", "a part of the run above 0 and below 1", self.share, "0.1 is the paper's")
        if not 0 < self.explore <= 1:
            raise wrong("explore", "a share of the weights above 0, up to 1", self.explore, "0.5 moves half of them")
        if not 0 <= self.low <= self.high:
            raise wrong(
                "low and high", "two shares of the learning rate, low first", (self.low, self.high), "exchange them"
            )


def superpose(
    recipe: Recipe, out: str | Path, cycles: Cycles | None = None, resume: bool = False, listen: Listener = silent
) -> list[dict[str, Any]]:
    """Train a recipe whose mask is `set` or one of its kind, and make one network of the tickets that its last steps give.

    The first part is a run of the recipe under its trainer, in `out`/run, to which the recipe's relative times refer; the
    cycles that follow are a plain loop without tweaks but label smoothing, on the batches that come next, and start without
    momentum. The tickets, networks at the end of each cycle, are superposed (`lottery.superpose`), pruned to the run's sparsity
    over all layers, and get statistics from one epoch of training data. Returns a row for the run, each ticket and the result:
    sparsity and test accuracy in percent; they are in `out`/superpose.csv, the result in model.safetensors and mask.safetensors.

    With `resume` the run goes on as any does, and a cycle that was stopped begins anew; the end is the same, bit for bit.
    Raises TostError for another mask, and for a part that is too short for its cycles; Stopped after Ctrl-C in the run.

    Paper: Yin et al., Superposing Many Tickets into One: A Performance Booster for Sparse Neural Network Training, UAI 2022.
    Differs from the paper: the cycles have an optimizer of their own, and a triangle of learning rates.
    """
    out, cycles = Path(out), cycles or Cycles()
    if not isinstance(recipe.mask, Set) or isinstance(
        recipe.mask, Averaging
    ):  # of which a cycle would begin without any
        raise TostError(
            f"tost superpose: expected a recipe whose mask explores (set, rigl, selfish), got {recipe.mask.kind!r}; write mask: "
            f"{{kind: set, sparsity: 0.9}}"
        )
    check_out(out, recipe, resume)
    job = prepare(recipe.model_copy(update={"trainer": "torch"}), out, listen=listen)
    length = round(job.total_steps * cycles.share) // cycles.count
    if length < 2:
        raise TostError(
            f"tost superpose: expected cycles of 2 steps or more, got {length} ({cycles.share:g} of {job.total_steps} steps in "
            f"{cycles.count} cycles); set a longer duration, fewer cycles or a larger share"
        )
    _keep_settings(out, recipe, cycles)
    first = job.total_steps - length * cycles.count
    result = train(recipe.model_copy(update={"duration": Time(first, "ba")}), out / "run", True, listen=listen)
    states, masks, rows = [], [], [_row("run", Mask.load(out / "run" / "mask.safetensors"), result["test_accuracy"])]
    for state, mask in _tickets(job, cycles, length, first):
        states.append(state)
        masks.append(mask)
        job.model.load_state_dict(state)
        rows.append(_row(f"ticket {len(rows)}", mask, job.evaluate(job.model, job.data.test)["accuracy"]))
    rows.append(_conclude(job, *superposed(states, masks, masks[-1].sparsity)))
    write_csv(out / "superpose.csv", rows)
    return rows


def _keep_settings(out: Path, recipe: Recipe, cycles: Cycles) -> None:
    path = out / "cycles.json"
    if path.exists() and read_json(path) != dataclasses.asdict(cycles):
        raise TostError(
            f"--resume: expected the cycles that {out} was started with, got others; see {path}, or choose another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    recipe.to_yaml(out / "recipe.yaml")
    write(path, json.dumps(dataclasses.asdict(cycles)))


def _tickets(job: Job, cycles: Cycles, length: int, first: int) -> Iterator[tuple[dict[str, Tensor], Mask]]:
    """Each cycle's network and mask; those that are on disk are taken from there."""
    job.model.load_state_dict(by_clean_name(read_tensors(job.out / "run" / "model.safetensors")[0]))
    mask, optimizer = Mask.load(job.out / "run" / "mask.safetensors"), job.optimizer(job.model.parameters())
    torch.manual_seed(job.recipe.seed)
    for number in range(cycles.count):
        path = job.out / f"ticket-{number + 1:02d}.pt"
        if path.exists():
            saved = pickles.load(path)
            job.model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            rng.restore(saved["rng"])
            mask = Mask(saved["mask"])
        else:
            mask = _cycle(job, cycles, length, first, number, mask, optimizer)
            content = {"model": job.model.state_dict(), "mask": dict(mask), "optimizer": optimizer.state_dict(),
                       "rng": rng.states()}  # fmt: skip
            with replacing(path) as temporary:
                torch.save(content, temporary)
        yield {name: value.clone() for name, value in job.model.state_dict().items()}, mask


def _cycle(job: Job, cycles: Cycles, length: int, first: int, number: int, mask: Mask, optimizer: Optimizer) -> Mask:
    """One cycle, opened by a large move of the mask; returns the mask that it ends with."""
    method = dataclasses.replace(job.recipe.mask, drop=cycles.explore, every=Time(length, "ba"), until=_NEVER)
    tweaks = tuple(tweak for tweak in job.recipe.tweaks if tweak.kind == "label_smoothing")
    recipe, done = (
        job.recipe.model_copy(update={"mask": method, "tweaks": tweaks, "watch": None}),
        first + number * length,
    )
    session = Session(job.model, recipe, mask).attach()
    loss_fn = session.criterion(F.cross_entropy)
    job.listen("run", {"name": f"{job.recipe.name}, ticket {number + 1} of {cycles.count}", "model": job.recipe.model,
                       "data": job.recipe.data.name, "trainer": "torch", "total": length})  # fmt: skip
    job.model.train()
    # the clock of the masks begins at a multiple of the cycle's length, where a move is due, another one for each cycle
    session.start(optimizer, job.loader, loss_fn=F.cross_entropy, clock=Clock((number + 1) * length))
    for step, (images, labels) in zip(range(length), job.batches(done), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = job.recipe.optimizer.lr * triangular(step, length - 1, cycles.low, cycles.high)
        loss = loss_fn(job.forward(job.model, images), labels)
        optimizer.zero_grad()
        loss.backward()
        session.before_step()
        optimizer.step()  # changes nothing where the mask has moved
        session.after_step()
        job.listen("step", {"step": step + 1, "total": length, "loss": loss.item()})
    session.finish()
    return session.mask


def _row(network: str, mask: Mask, accuracy: float) -> dict[str, Any]:
    return {"network": network, "sparsity": mask.sparsity, "kept_weights": mask.kept, "test_accuracy": accuracy}


def _conclude(job: Job, state: dict[str, Any], mask: Mask) -> dict[str, Any]:
    """The superposed network with statistics of its own, on disk; and what it is worth."""
    job.model.load_state_dict(state)
    found = check(mask, followed(Task.of(job.model, job.recipe.mask.ignore, batches=job.loader)))
    job.loader.set_epoch(job.epochs)
    update_bn(job.loader.iterate(0), job.model, job.device)
    mask.save(job.out / "mask.safetensors")
    write_tensors(job.out / "model.safetensors", job.model.state_dict())
    row = _row("superposed", mask, job.evaluate(job.model, job.data.test)["accuracy"])
    live = None if found is None else found.live.kept
    write(job.out / "result.json", json.dumps({**row, "live": live}, indent=1))
    return row
