"""`tost mask inspect`: what a mask connects in the network that it is for, as rows and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tost_plugins.errors import TostError
from tost_plugins.lab import models
from tost_plugins.lab.report import save_figure
from tost_plugins.lab.train import prepare
from tost_plugins.masks.mask import Mask, density
from tost_plugins.masks.paths.connectivity import Connectivity, Paths
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.training.params import prunable
from tost_plugins.training.task import Task

_LIVE, _DEAD = "#0b6e99", "#e6a117"


def of_recipe(mask: Mask, recipe: Recipe) -> Connectivity:
    """What the mask connects in a recipe's network, on its data."""
    job = prepare(recipe, Path())
    task = Task.of(job.model, recipe.mask.ignore, batches=job.loader)
    return Paths(task).connectivity(mask.fit(task.params, dict(job.model.named_parameters())))


def of_model(mask: Mask, name: str, side: int) -> Connectivity:
    """What the mask connects in a network that a recipe can name, with as many classes and input channels as the mask says;
    on images of this side."""
    shapes = [kept.shape for kept in mask.values()]
    if len(shapes[0]) != 4 or len(shapes[-1]) < 2:
        raise TostError(
            f"--model: expected a mask of a network for images, got a first layer of shape {tuple(shapes[0])}; "
            f"leave --model away"
        )
    channels = shapes[0][1]
    model = models.build(name, shapes[-1][0], channels)
    params = {key: param for key, param in prunable(model).items() if key in mask}
    fitted = mask.fit(params or prunable(model))
    return Paths(Task(model, params, [torch.ones(2, channels, side, side)])).connectivity(fitted)


def layer_rows(mask: Mask, found: Connectivity | None) -> list[dict[str, Any]]:
    """A row for each layer; with what is live and dead where that is known."""
    rows: list[dict[str, Any]] = [
        {
            "layer": name,
            "shape": "x".join(map(str, keep.shape)),
            "kept": int(keep.sum()),
            "density": f"{density(keep):.4f}",
        }
        for name, keep in mask.items()
    ]
    for row, paths in zip(rows, found.layers if found else (), strict=False):
        row |= {"live": paths.live, "channels": paths.channels, "constant": paths.constant, "unread": paths.unread,
                "dead_channels": paths.dead}  # fmt: skip
    return rows


def picture(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Two bars for each layer, in the network's order: of its kept weights and of its channels, what is live and what is dead."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 1.6 + 0.2 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    parts = (
        (left, "share of the kept weights", [(row["live"], row["kept"]) for row in rows]),
        (
            right,
            "share of the output channels",
            [(row["channels"] - row["dead_channels"], row["channels"]) for row in rows],
        ),
    )
    for axes, label, pairs in parts:
        live = [good / both if both else 0.0 for good, both in pairs]
        dead = [1 - share if both else 0.0 for share, (_, both) in zip(live, pairs, strict=True)]
        axes.barh(places, live, color=_LIVE, label="live", height=0.75)
        axes.barh(
            places, dead, left=live, color=_DEAD, label="dead", height=0.75, hatch="///", edgecolor="white", linewidth=0
        )
        for place, (good, both) in zip(places, pairs, strict=True):
            axes.text(1.02, place, f"{good:,} of {both:,}" if both else "none", va="center", fontsize=7)
        axes.set(xlim=(0, 1.32), xticks=[0, 0.5, 1], xlabel=label)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_yticks(places, [row["layer"].removesuffix(".weight") for row in rows], fontsize=7)
    left.set_ylim(len(rows) - 0.4, -0.6)
    figure.suptitle(title, fontsize=10)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    save_figure(figure, path)
