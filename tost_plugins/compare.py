"""`tost compare`: the same masks and seeds, with and without the tweaks."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from tost_plugins.errors import TostError
from tost_plugins.masks.base import Moving
from tost_plugins.masks.mask import Mask
from tost_plugins.recipe import Recipe
from tost_plugins.train import Listener, train

VARIANTS = ("plain", "tost")


def compare(
    recipe: Recipe, out: str | Path, seeds: int = 3, resume: bool = False, listen: Listener | None = None
) -> dict[str, Any]:
    """Train a recipe on `seeds` seeds (recipe.seed, +1, ...) with its tweaks and without, on equal masks and data.

    A mask that moves starts as the same one, and goes its own way in each.
    Returns `rows` (one per seed: plain, tost, difference, in points of test accuracy), their `mean` and `std` (over
    seeds; 0 for one seed), and all `runs`. Finished runs in `out` are not run again with `resume`.
    """
    if not recipe.tweaks:
        raise TostError("tost compare: expected a recipe with tweaks, got none; add some, or use tost train")
    if seeds < 1:
        raise TostError(f"--seeds: expected at least 1, got {seeds}; 3 or more say something about the spread")
    out, rows, runs = Path(out), [], []
    for seed in range(recipe.seed, recipe.seed + seeds):
        pair = {}
        for variant in VARIANTS:
            changes: dict[str, Any] = {"seed": seed} | ({"tweaks": ()} if variant == "plain" else {})
            changes["name"] = f"{recipe.name} ({variant}, seed {seed})"
            folder = out / f"{variant}-seed{seed}"
            pair[variant] = train(
                recipe.model_copy(update=changes), folder, resume and (folder / "recipe.yaml").exists(), listen=listen
            )
            runs.append({"variant": variant, **pair[variant]})
        found = [Mask.load(out / f"{variant}-seed{seed}/mask.safetensors") for variant in VARIANTS]
        if found[0] != found[1] and not isinstance(recipe.mask, Moving):  # one that moves follows the training
            raise TostError(
                f"seed {seed}: expected the same mask with and without tweaks, got two; report this as a bug"
            )
        plain, tost = (pair[variant]["test_accuracy"] for variant in VARIANTS)
        rows.append({"seed": seed, "plain": plain, "tost": tost, "difference": tost - plain})
    columns = {key: [row[key] for row in rows] for key in ("plain", "tost", "difference")}
    return {
        "recipe": recipe.to_dict(),
        "rows": rows,
        "mean": {key: statistics.mean(values) for key, values in columns.items()},
        "std": {key: statistics.stdev(values) if seeds > 1 else 0.0 for key, values in columns.items()},
        "runs": runs,
    }
