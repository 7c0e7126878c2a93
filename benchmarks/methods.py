"""Which mask is best, and does ToST help it? Static and moving masks and lottery tickets, each with and without the tweaks.

    python benchmarks/methods.py --out runs/methods --jobs 2        # TOST_DATA names the folder that holds cifar10/

One cell is one run of a method, seed and variant; finished cells are not run again, a stopped one goes on. Writes
`methods.csv` (a row per cell) and prints the table: mean and standard deviation of the test accuracy over the seeds.
A ticket's rounds are trained without tweaks and rewound to the initial weights; "with ToST" trains the last mask.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

from tost_plugins import Recipe
from tost_plugins.lab import grid
from tost_plugins.lab.grid import Cell
from tost_plugins.lab.report import write_csv
from tost_plugins.lab.studies.base import accuracies

EVERY = {"every": "25ba"}  # a short run has fewer than a thousand steps: RigL's 100 would be a handful of updates
METHODS: dict[str, dict[str, Any]] = {
    "random, static": {"kind": "random"},
    "set": {"kind": "set", **EVERY},
    "rigl": {"kind": "rigl", **EVERY},
    "dnw": {"kind": "dnw"},
    "dnw, frozen after 1 epoch": {"kind": "dnw", "freeze": "1ep"},
    "gradual": {"kind": "gradual", **EVERY},
    "dnw, uniform": {"kind": "dnw", "allocation": "uniform"},
    "dnw, uniform, frozen after 1 epoch": {"kind": "dnw", "allocation": "uniform", "freeze": "1ep"},
    "gradual, uniform": {"kind": "gradual", "allocation": "uniform", **EVERY},
    "lottery ticket": {"kind": "lottery_ticket", "prune": 0.632},
}
VARIANTS = ("plain", "tost")
#: All four; a rescaled initialisation of 30 iterations takes a sixth of the time of the published 180.
TWEAKS: list[dict[str, Any]] = [
    {"kind": "ghost_skip", "until": "0.1dur"},
    {"kind": "soft_activation", "until": "0.1dur"},
    {"kind": "rescaled_init", "iterations": 30, "learning_rate": 0.02},
    {"kind": "label_smoothing", "alpha": 0.05},
]


def recipe(method: str, variant: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The recipe of a cell."""
    tweaks = TWEAKS if variant == "tost" else []
    return {
        "name": f"{method} ({variant}, seed {seed})", "seed": seed, "model": args.model, "precision": "bf16",
        "mask": {"sparsity": args.sparsity, **METHODS[method]}, "tweaks": tweaks,
        "data": {"name": "cifar10", "limit": args.limit, "validation": 500, "batch_size": 64}, "duration": f"{args.epochs}ep",
    }  # fmt: skip


def cell(method: str, variant: str, seed: int, args: argparse.Namespace) -> Cell:
    """One cell of the grid."""
    labels, content = {"method": method, "training": variant, "seed": seed}, recipe(method, variant, seed, args)
    name, parent = f"{method.replace(', ', '-').replace(' ', '_')}-{variant}-seed{seed}", None
    if content["mask"]["kind"] == "lottery_ticket" and variant == "tost":
        content["mask"], parent = {"kind": "file", "path": "structure.safetensors"}, name.replace("tost", "plain")
    return Cell(name, Recipe.from_dict(content), labels, parent)


def main() -> None:
    """Run the grid, seed by seed, so that a stopped grid has compared like with like."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--model", default="cifar/resnet20")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--limit", type=int, default=10000, help="training images")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cells = [cell(m, v, s, args) for v in args.variants for s in range(args.seeds) for m in args.methods]
    records = grid.run(cells, args.out, args.jobs)
    write_csv(args.out / "methods.csv", accuracies(records, "cpu"))
    found = {tuple(record["labels"].values()): record["result"]["test_accuracy"] for record in records}
    print(f"{'method':36s}" + "".join(f"{variant:>16s}" for variant in args.variants))
    for method in args.methods:
        columns = [[found[method, variant, seed] for seed in range(args.seeds)] for variant in args.variants]
        shown = [f"{statistics.mean(c):.2f} ({statistics.stdev(c) if len(c) > 1 else 0:.2f})" for c in columns]
        print(f"{method:36s}" + "".join(f"{text:>16s}" for text in shown))


if __name__ == "__main__":
    main()
