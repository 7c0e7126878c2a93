"""Which mask is best for the time it takes: accuracy over the measured time of a compact training step, and of a prediction."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tost_plugins.channels.removal import compact
from tost_plugins.lab.grid import Cell, Record
from tost_plugins.lab.report import Plot
from tost_plugins.lab.studies.base import Content, Row, Size, Study, cell, ended
from tost_plugins.masks.mask import Mask
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.session.session import Session

_METHODS: dict[str, Row] = {
    "random": {"kind": "random"},
    "magnitude": {"kind": "magnitude", "allocation": "erk"},
    "snip": {"kind": "snip", "batches": 2},
    "grasp": {"kind": "grasp"},
    "synflow": {"kind": "synflow"},
}
_SPARSITIES = {"smoke": (0.95,), "cpu": (0.9, 0.95, 0.98, 0.99), "paper": (0.9, 0.95, 0.98, 0.99)}
_ROUNDS = {"smoke": 2, "cpu": 7, "paper": 15}
_AT_ONCE = 32  # images of a prediction


def _cells(content: Content, size: Size, seeds: Sequence[int]) -> list[Cell]:
    made = []
    for seed in seeds:
        for sparsity in _SPARSITIES[size]:
            for name, method in _METHODS.items():
                for budget in ("kept", "live"):
                    labels = {"method": name, "budget": budget, "sparsity": sparsity}
                    mask = {**method, "sparsity": sparsity, "budget": budget}
                    changes = {"mask": mask, "compact": True}
                    made.append(cell(content, f"{name}-{budget}-{sparsity}", seed, labels, changes))
    return made


def _rows(records: Sequence[Record], size: Size) -> list[Row]:
    """Two for each run: its accuracy beside the time of a training step, and beside that of a prediction, both as shares of
    the dense network's; times are means over the seeds."""
    found = []
    for record in records:
        recipe = Recipe.from_dict(record["cell"]["recipe"])
        mask = Mask.load(record["folder"] / "mask.safetensors")
        for what, share in _times(record["folder"], recipe, mask, _ROUNDS[size]).items():
            accuracy = record["result"]["test_accuracy"]
            what = f"{what}, budget: {record['labels']['budget']}"  # ten lines on one axis are too many to tell apart
            found.append({**record["labels"], "what": what, "measured": share, "test_accuracy": accuracy})
    keys = ("method", "sparsity", "what")
    for row in found:
        row["time"] = statistics.mean(r["measured"] for r in found if all(r[key] == row[key] for key in keys))
    return found


def _times(folder: Path, recipe: Recipe, mask: Mask, rounds: int) -> dict[str, float]:
    """What a compact step and a prediction of the compact network take, dense = 1: medians over interleaved rounds."""
    job = ended(folder, recipe)
    images, labels = next(iter(job.batches()))
    trained, dense = job.model.train(), copy.deepcopy(job.model).train()
    small = compact(trained, mask, images[:2])
    session = Session(trained, {"mask": {"kind": "random", "sparsity": 0.5}, "compact": True}, mask).attach()
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9) for model in (dense, trained)]
    session.start(optimizers[1], [(images, labels)])

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    @torch.no_grad()
    def predict(model: nn.Module) -> None:
        was = model.training
        model.eval()(images[:_AT_ONCE])
        model.train(was)

    steps = _share(rounds, lambda: step(trained, optimizers[1]), lambda: step(dense, optimizers[0]))
    return {"a training step": steps, "a prediction": _share(rounds, lambda: predict(small), lambda: predict(dense))}


def _share(rounds: int, one: Callable[[], None], other: Callable[[], None]) -> float:
    shares = []
    for turn in range(rounds + 1):
        took: Mapping[Any, float] = {run: _seconds(run) for run in ((one, other) if turn % 2 else (other, one))}
        shares.append(took[one] / took[other])
    return statistics.median(shares[1:])  # the first one warms up


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


real_speed = Study(
    about="accuracy over the time of a compact training step, and of a prediction",
    paper="ours: no paper measures what a mask takes once its dead channels are left out.",
    plot=Plot("time", "test_accuracy", by="method", panel="what", xlabel="time, dense = 1", ylabel="test accuracy (%)"),
    cells=_cells, rows=_rows,
    base={"smoke": {"tweaks": []}, "cpu": {"tweaks": [], "precision": "fp32"}, "paper": {"tweaks": []}},
)  # fmt: skip
