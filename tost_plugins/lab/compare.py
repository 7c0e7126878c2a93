"""`tost compare`: the same masks and seeds, with and without the tweaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tost_plugins.errors import TostError
from tost_plugins.lab import grid
from tost_plugins.lab.progress import Listener, silent
from tost_plugins.lab.report import mean_std
from tost_plugins.masks.base import Moving
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.methods.lottery_ticket import LotteryTicket, single_run
from tost_plugins.recipe.recipe import Recipe

VARIANTS = ("plain", "tost")


def compare(
    recipe: Recipe,
    out: str | Path,
    seeds: int = 3,
    resume: bool = False,
    listen: Listener = silent,
    jobs: int | grid.Cluster = 1,
) -> dict[str, Any]:
    """Train a recipe on `seeds` seeds (recipe.seed, +1, ...) with its tweaks and without, on equal masks and data.

    A mask that moves starts as the same one, and goes its own way in each.
    Returns `rows` (one per seed: plain, tost, difference, in points of test accuracy), their `mean` and `std` (over
    seeds; 0 for one seed), and all `runs`. Finished runs in `out` are not run again with `resume`; `jobs` run side by
    side, or as many as a cluster has room for.
    """
    if not recipe.tweaks:
        raise TostError("tost compare: expected a recipe with tweaks, got none; add some, or use tost train")
    if isinstance(recipe.mask, LotteryTicket):  # whose rounds would find a mask with the tweaks, and another without
        raise single_run().at("mask lottery_ticket")
    records = grid.run(cells(recipe, seeds), out, jobs, resume, listen)
    runs = [{"variant": record["labels"]["variant"], **record["result"]} for record in records]
    rows = []
    for first, second in zip(records[::2], records[1::2], strict=True):
        masks = [Mask.load(record["folder"] / "mask.safetensors") for record in (first, second)]
        seed, plain, tost = (first["labels"]["seed"], *(r["result"]["test_accuracy"] for r in (first, second)))
        if masks[0] != masks[1] and not isinstance(recipe.mask, Moving):  # one that moves follows the training
            raise TostError(
                f"seed {seed}: expected the same mask with and without tweaks, got two; report this as a bug"
            )
        rows.append({"seed": seed, "plain": plain, "tost": tost, "difference": tost - plain})
    spread = {key: mean_std([row[key] for row in rows]) for key in ("plain", "tost", "difference")}
    return {
        "recipe": recipe.to_dict(),
        "rows": rows,
        "mean": {key: mean for key, (mean, _) in spread.items()},
        "std": {key: std for key, (_, std) in spread.items()},
        "runs": runs,
    }


def cells(recipe: Recipe, seeds: int) -> list[grid.Cell]:
    """For each seed the run without tweaks, then the one with them."""
    made = []
    for seed in grid.seed_range(seeds, recipe.seed):
        for variant in VARIANTS:
            changes: dict[str, Any] = {"seed": seed} | ({"tweaks": ()} if variant == "plain" else {})
            changes["name"] = f"{recipe.name} ({variant}, seed {seed})"
            labels = {"variant": variant, "seed": seed}
            made.append(grid.Cell(f"{variant}-seed{seed}", recipe.model_copy(update=changes), labels))
    return made
