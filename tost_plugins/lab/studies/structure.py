"""Studies of trained structures: retrained from new weights, and pruned further."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from tost_plugins.lab.grid import Cell, Record
from tost_plugins.lab.report import Plot
from tost_plugins.lab.studies.base import FROM_PARENT, Content, Row, Size, Study, accuracies, cell, ended
from tost_plugins.lab.studies.robustness import robustness as measure
from tost_plugins.lab.studies.settings import CURVES, GELDER, STRUCTURES
from tost_plugins.lab.studies.watching import methods
from tost_plugins.recipe.recipe import Recipe

_SPARSITIES = {"smoke": (0.9,), "cpu": (0.8, 0.95), "paper": (0.8, 0.9, 0.95, 0.98)}
_PRUNE = {"smoke": 0.7, "cpu": 0.632, "paper": 0.2}  # a round of lottery tickets
_DRAWS = {"smoke": 1, "cpu": 1, "paper": 3}  # of new weights for each structure


def _reinit(content: Content, size: Size, seeds: Sequence[int]) -> list[Cell]:
    made: list[Cell] = []
    for seed, sparsity in itertools.product(seeds, _SPARSITIES[size]):
        masks = methods({**content, "mask": {"sparsity": sparsity}}, size)
        for name, mask in {
            "lottery ticket": _ticket(sparsity, size),
            "dnw": masks["dnw"],
            "rigl": masks["rigl"],
        }.items():
            labels = {"method": name, "sparsity": sparsity}
            made += _again(content, size, seed, f"{name}-{sparsity}", labels, mask)
    return made


def _ticket(sparsity: float, size: Size) -> Row:
    return {"kind": "lottery_ticket", "sparsity": sparsity, "prune": _PRUNE[size], "on_collapse": "keep_one"}


def _again(content: Content, size: Size, seed: int, name: str, labels: Row, mask: Row) -> list[Cell]:
    """A structure as it was found, and trained again: with its own first weights and with others, and beside random ones."""
    parent = cell(content, name, seed, {**labels, "start": "as it was found"}, {"mask": mask})
    made, own = [parent], {**content, "mask": FROM_PARENT}
    for start, rest in {
        "its own first weights": {},
        "its own first signs": {"constant_sign": True},
        "random structure, its own first weights": {"shuffle": True},
    }.items():
        made.append(cell(own, f"{name}-{start}", seed, {**labels, "start": start}, parent=parent.name, **rest))
    for draw, (start, rest) in itertools.product(
        range(1, 1 + _DRAWS[size]), {"new weights": {}, "random structure, new weights": {"shuffle": True}}.items()
    ):
        new = {"seed": content.get("seed", 0) + 1000 * draw}  # beside the seed of the run, which is added to it
        where = {**labels, "start": start}
        made.append(cell({**own, **new}, f"{name}-{start}-{draw}", seed, where, parent=parent.name, **rest))
    return made


_SHARES = {
    "smoke": (0.0, 0.3, 0.6, 0.9),
    "cpu": (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8),
    "paper": tuple(n / 20 for n in range(20)),
}
_LOOK: dict[str, Row] = {
    "smoke": {"draws": 2, "images": 360, "batches": 2},
    "cpu": {"draws": 10, "images": 500, "batches": 5},
    "paper": {"draws": 10, "images": 10000, "batches": 100},
}


def _robustness(content: Content, size: Size, seeds: Sequence[int]) -> list[Cell]:
    found = methods(content, size) | {"lottery ticket": _ticket(content["mask"]["sparsity"], size)}
    options = {"shares": list(_SHARES[size]), **_LOOK[size]}
    return [
        cell(content, name, seed, {"method": name}, {"mask": mask}, measure=prune_and_test, options=options)
        for seed in seeds
        for name, mask in found.items()
    ]


def prune_and_test(
    folder: Path, recipe: Recipe, shares: Sequence[float], draws: int, images: int, batches: int
) -> list[Row]:
    """What `study.robustness` finds for the network of a finished run, on the first `images` test images, with norms
    re-estimated over `batches` of the training data."""
    job = ended(folder, recipe)
    some = job.data.test.take(torch.arange(min(images, len(job.data.test))))

    def accuracy(model: nn.Module) -> float:
        return job.evaluate(model, some)["accuracy"]

    ignore = recipe.mask.ignore
    return measure(job.model, accuracy, shares, list(itertools.islice(job.loader, batches)), draws, recipe.seed, ignore)


def _pruned(records: Sequence[Record], size: Size) -> list[Row]:
    how = {"magnitude": "smallest first", "random": "at random"}
    return [
        {**record["labels"], **row, "treatment": f"{how[row['how']]}, norms {row['norms']}"}
        for record in records
        for row in record["rows"]
    ]


_BASE = STRUCTURES | {
    "cpu": {"tweaks": [], "model": "cifar/resnet8"},  # many runs: each method's, and those that follow from it
    "paper": STRUCTURES["paper"] | {"mask": {"kind": "random", "sparsity": 0.9}},
}
reinit = Study(
    about="structures of lottery tickets, DNW and RigL trained again from new weights, against random structures",
    paper=f"{GELDER}, figure 1 (ResNet-18, CIFAR-10): accuracy over sparsity{CURVES}",
    plot=Plot("sparsity", "test_accuracy", by="start", panel="method", xlabel="sparsity", ylabel="test accuracy (%)"),
    cells=_reinit, rows=accuracies, base=_BASE,
)  # fmt: skip
robustness = Study(
    about="trained networks pruned further without retraining, by magnitude and at random, norms kept or re-estimated",
    paper=f"{GELDER}, figure 2 (ResNet-18, CIFAR-10): accuracy over the share pruned{CURVES}",
    plot=Plot("share", "accuracy", by="method", panel="treatment", xlabel="share of the remaining weights pruned",
              ylabel="accuracy (%)"),
    cells=_robustness, rows=_pruned, base=_BASE,
)  # fmt: skip
