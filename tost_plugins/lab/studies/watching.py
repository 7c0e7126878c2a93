"""Studies that watch their runs: in-degrees, emergence, activation sparsity and curvature along the training."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from tost_plugins.lab.data import Loader
from tost_plugins.lab.grid import Cell, Record
from tost_plugins.lab.report import Plot
from tost_plugins.lab.studies.base import Content, Row, Size, Study, alone, cell, ended, on_one_mask, watched
from tost_plugins.lab.studies.settings import CURVES, GELDER, NEVER, STRUCTURES, TOST
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.session.watch.activations import activation_sparsity as zeros
from tost_plugins.training.clock import Clock

_METHODS: dict[str, Row] = {
    "random, static": {"kind": "random"},
    "set": {"kind": "set"},
    "rigl": {"kind": "rigl"},
    "dnw": {"kind": "dnw", "allocation": "erk"},
    "gradual": {"kind": "gradual", "allocation": "erk"},
}
_EVERY: dict[str, Row] = {"smoke": {"every": "2ba"}, "cpu": {"every": "25ba"}, "paper": {}}  # updates of a short run


def methods(content: Content, size: Size) -> dict[str, Row]:
    """Name -> mask of the methods that are compared, at the recipe's sparsity; the shorter the run, the more updates."""
    every = {name: _EVERY[size] if name in ("set", "rigl", "gradual") else {} for name in _METHODS}
    all_of_them = {"sparsity": content["mask"]["sparsity"], "on_collapse": "keep_one"}
    return {name: {**method, **every[name], **all_of_them} for name, method in _METHODS.items()}


def _watch(measure: str, size: Size, **every: str) -> Row:
    """The recipe's `watch`: one measure, at times of each size's own."""
    return {"measures": [measure], "every": every[size]}


def _structures(measure: str, moving_only: bool = False):
    def cells(content: Content, size: Size, seeds: Sequence[int]) -> list[Cell]:
        watch = _watch(measure, size, smoke="2ba", cpu="0.05dur", paper="1ep")
        return [
            cell(content, name, seed, {"method": name}, {"mask": mask, "watch": watch})
            for seed in seeds
            for name, mask in methods(content, size).items()
            if not (moving_only and name.startswith("random"))
        ]

    return cells


def _connections(records: Sequence[Record], size: Size) -> list[Row]:
    """For each look: the spread of the in-degrees (1 is a random mask's), averaged over the layers that are neither dense
    nor empty, and the share of dead units in percent; the tables by layer stay in each run's folder `watch`."""
    rows = []
    for record in records:
        looks: dict[float, list[Row]] = {}
        for row in watched(record, "in_degree"):
            looks.setdefault(row["epoch"], []).append(row)
        for epoch, layers in looks.items():
            units, spreads = sum(row["units"] for row in layers), [row["spread"] for row in layers if "spread" in row]
            dead, by_chance = (100 * sum(row[key] for row in layers) / units for key in ("dead", "binomial_dead"))
            when = {**record["labels"], "epoch": epoch}
            rows.append({**when, "quantity": "dead units (%)", "value": dead, "binomial": by_chance})
            if spreads:  # gradual pruning starts dense: nothing to spread yet
                value = statistics.mean(spreads)
                rows.append(
                    {**when, "quantity": "spread of in-degrees over the binomial's", "value": value, "binomial": 1.0}
                )
    return rows


def _overlaps(records: Sequence[Record], size: Size) -> list[Row]:
    return [
        {**record["labels"], "epoch": row["epoch"], "quantity": f"overlap with the {which} mask", "value": row[key],
         "random": row["random"]}
        for record in records
        for row in watched(record, "emergence")
        for which, key in (("final", "with_final"), ("previous", "with_previous"))
        if key in row
    ]  # fmt: skip


def _activations(content: Content, size: Size, seeds: Sequence[int]) -> list[Cell]:
    def soft(**changes: object) -> Row:
        return {"tweaks": [{"kind": "soft_activation", "until": NEVER, **changes}]}

    variants = {"ReLU": {"tweaks": []}, "Swish": soft(shape="swish"), "Mish": soft(shape="mish"),
                "PSwish, beta 1 to 10": soft(shape="pswish", until="1dur", beta=[1, 10])}  # fmt: skip
    watch = _watch("activation_sparsity", size, smoke="1ba", cpu="0.05dur", paper="1ep")
    return on_one_mask({**content, "watch": watch}, seeds, variants, measure=zeros_on_test_images)


def zeros_on_test_images(folder: Path, recipe: Recipe) -> list[Row]:
    """The zeros in each layer of a finished run, on the test images, with the activation of its last step; zeros along
    the training, on a training batch, are in the folder's `watch`."""
    job = ended(folder, recipe)
    for tweak in recipe.tweaks:
        tweak.attach(job.model, recipe.seed)
        tweak.advance(job.model, Clock(job.total_steps - 1, job.total_steps, job.steps_per_epoch))
    test = Loader(job.data.test, 500, seed=0, shuffle=False, augment=None, mean=job.data.mean, std=job.data.std)
    return zeros(job.model, test, forward=lambda model, batch: job.forward(model, batch[0]))


def _by_layer(records: Sequence[Record], size: Size) -> list[Row]:
    return [
        {**record["labels"], "number": number, **row}
        for record in records
        if record["labels"]
        for number, row in enumerate(record["rows"], start=1)
    ]


def _curvature(content: Content, size: Size, seeds: Sequence[int]) -> list[Cell]:
    watch = _watch("curvature", size, smoke="1ep", cpu="0.25dur", paper="0.05dur")
    variants = {**alone(content, ("soft_activation",)), "all tweaks": {}}
    return on_one_mask({**content, "watch": watch}, seeds, variants)


def _eigenvalues(records: Sequence[Record], size: Size) -> list[Row]:
    return [row for record in records if record["labels"] for row in watched(record, "curvature")]


in_degree = Study(
    about="in-degrees of every unit along the training, against a random mask's binomial; dead units",
    paper=f"{GELDER}, figure 3 (ResNet-18, CIFAR-10){CURVES}",
    plot=Plot("epoch", "value", by="method", panel="quantity", xlabel="epoch", chance="binomial", least=1),
    cells=_structures("in_degree"), rows=_connections, base=STRUCTURES,
)  # fmt: skip
emergence = Study(
    about="when a mask that moves becomes the one it ends as",
    paper=f"{GELDER}, figure 3 (ResNet-18, CIFAR-10){CURVES}",
    plot=Plot("epoch", "value", by="method", panel="quantity", xlabel="epoch", ylabel="intersection over union"),
    cells=_structures("emergence", moving_only=True), rows=_overlaps, base=STRUCTURES,
)  # fmt: skip
activation_sparsity = Study(
    about="the share of zero activations in each layer, for ReLU, Swish, Mish and PSwish",
    paper=f"{TOST}, table 1 (ResNet-18, CIFAR-100, 90 %): ReLU 27 to 58 %, Swish 0.2 to 0.3 %, Mish 0.9 to 1.1 %.",
    plot=Plot("number", "zeros", by="training", xlabel="activation layer, from input to output", ylabel="zeros (%)"),
    cells=_activations, rows=_by_layer,
)  # fmt: skip
curvature = Study(
    about="the top eigenvalue of the loss Hessian along the training",
    paper=f"{TOST}, figure 2{CURVES}",
    plot=Plot("epoch", "eigenvalue", by="training", panel="space", xlabel="epoch", ylabel="top Hessian eigenvalue",
              log=True),
    cells=_curvature, rows=_eigenvalues,
)  # fmt: skip
