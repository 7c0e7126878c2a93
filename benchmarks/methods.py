"""Which mask is best, and does ToST help it? Static and moving masks and tickets, each with and without the tweaks.

    python benchmarks/methods.py --out runs/methods --jobs 2        # TOST_DATA names the folder that holds cifar10/
    python benchmarks/methods.py --protocol cpu --out runs/methods_cpu --jobs 2
    python benchmarks/methods.py --protocol cpu --out runs/methods_cpu --finished      # the table of what is there

One cell is one run of a method, sparsity, seed and variant; finished cells are not run again, a stopped one goes on. Seeds
come one after another, so that a stopped grid has compared like with like. Writes `methods.csv` (a row per cell) and prints
the table: test accuracy in percent, mean (standard deviation, number of seeds), what ToST adds and how far a method is from the
random mask that stands still, mean (standard error) over pairs of one seed, and the weights that are kept and live.

A ticket's rounds are trained without tweaks and rewound to the initial weights; "with ToST" trains the last mask. One that
rewinds the learning rate alone has the tweaks in every round: its last one goes on with the weights of those before.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tost_plugins import Mask, Recipe
from tost_plugins.lab import grid
from tost_plugins.lab.grid import Cell, Record
from tost_plugins.lab.report import write_csv
from tost_plugins.lab.reproduce.protocols import PROTOCOLS
from tost_plugins.lab.studies.base import FROM_PARENT
from tost_plugins.lab.studies.settings import tweaks
from tost_plugins.lab.superpose import Cycles

METHODS: dict[str, dict[str, Any]] = {
    "random, static": {"kind": "random"},
    "set": {"kind": "set"},
    "rigl": {"kind": "rigl"},
    "snfs": {"kind": "snfs"},
    "dnw": {"kind": "dnw"},
    "dnw, frozen after 1 epoch": {"kind": "dnw", "freeze": "1ep"},
    "top_kast": {"kind": "top_kast", "decay": 2e-4},
    "ac_dc": {"kind": "ac_dc"},
    "gradual": {"kind": "gradual"},
    "edge_popup": {"kind": "edge_popup", "allocation": "erk"},
    "lottery ticket": {"kind": "lottery_ticket", "prune": 0.632},
    "lottery ticket, learning rate rewound": {"kind": "lottery_ticket", "prune": 0.632, "rewind": "learning_rate"},
    "sup-tickets over set": {"kind": "set"},
    "dnw, uniform": {"kind": "dnw", "allocation": "uniform"},
    "dnw, uniform, frozen after 1 epoch": {"kind": "dnw", "allocation": "uniform", "freeze": "1ep"},
    "gradual, uniform": {"kind": "gradual", "allocation": "uniform"},
}
USUAL = list(METHODS)[:-3]
#: What a method changes beside its mask: Top-KAST's weight decay is the mask's.
BESIDE: dict[str, dict[str, Any]] = {"top_kast": {"optimizer": {"weight_decay": 0.0}}}
CYCLES = {"sup-tickets over set": Cycles()}
VARIANTS = ("plain", "tost")
BASELINE = "random, static"
#: A run of fewer than a thousand steps has its updates every 25 of them: the usual 100 would be a handful.
SHORT = {kind: {"every": "25ba"} for kind in ("set", "rigl", "gradual")}


def recipe(method: str, sparsity: float, variant: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The recipe of a cell."""
    if args.protocol == "cpu":  # that of `tost reproduce`
        how = PROTOCOLS["cpu"]
        base, usual, spec = dict(how.changes), how.tweaks, {"on_collapse": "keep_one", **METHODS[method]}
    else:  # a rescaled initialisation of 30 iterations takes a sixth of the time of the published 180
        data = {"limit": 10_000, "validation": 500, "batch_size": 64}
        base, usual = {"model": "cifar/resnet20", "precision": "bf16", "duration": "4ep", "data": data}, tweaks(30)
        spec = {**SHORT.get(METHODS[method]["kind"], {}), **METHODS[method]}
    base["data"] = {"name": "cifar10", **base["data"], **({"limit": args.limit} if args.limit else {})}
    base |= {"duration": f"{args.epochs}ep"} if args.epochs else {}
    base |= {"model": args.model} if args.model else {}
    name = f"{method}, {100 * sparsity:g} % ({variant}, seed {seed})"
    tost = {"mask": {"sparsity": sparsity, **spec}, "tweaks": usual if variant == "tost" else []}
    return {"name": name, "seed": seed, **base, **BESIDE.get(method, {}), **tost}


def cell(method: str, sparsity: float, variant: str, seed: int, args: argparse.Namespace) -> Cell:
    """One cell of the grid."""
    labels = {"method": method, "sparsity": sparsity, "training": variant, "seed": seed}
    content, parent = recipe(method, sparsity, variant, seed, args), None
    name = f"{method.replace(', ', '-').replace(' ', '_')}-{100 * sparsity:g}-{variant}-seed{seed}"
    if method == "lottery ticket" and variant == "tost":
        content["mask"], parent = FROM_PARENT, name.replace("tost", "plain")
    return Cell(name, Recipe.from_dict(content), labels, parent, cycles=CYCLES.get(method))


def rows_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each finished cell: how accurate it is, and how many weights it keeps, and how many of them are live."""
    return [
        {
            **record["labels"],
            "test_accuracy": record["result"]["test_accuracy"],
            "kept": Mask.load(record["folder"] / "mask.safetensors").kept,
            "live": record["result"]["live"],
        }
        for record in records
    ]


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines to print: a line for each method and sparsity, of the seeds that are there."""
    lines = ["| sparsity | mask | plain | with ToST | ToST adds | less random | kept | live |", "| --- " * 8 + "|"]
    places = list(dict.fromkeys((row["sparsity"], row["method"]) for row in rows))
    for sparsity, method in sorted(places, key=lambda place: place[0]):
        found = [row for row in rows if (row["sparsity"], row["method"]) == (sparsity, method)]
        plain, tost = (_seeds(rows, sparsity, method, variant) for variant in VARIANTS)
        random = _seeds(rows, sparsity, BASELINE, "plain")
        words = [
            _spread(list(plain.values())),
            _spread(list(tost.values())),
            _pairs(tost, plain),
            "-" if method == BASELINE else _pairs(plain, random),
        ]
        words += [_mean([row[key] for row in found if row[key] is not None]) for key in ("kept", "live")]
        lines.append("| " + " | ".join([f"{100 * sparsity:g} %", method, *words]) + " |")
    return lines


def _seeds(rows: Sequence[dict[str, Any]], *which: Any) -> dict[int, float]:
    """The accuracy of each seed of a sparsity, a method and a variant."""
    return {
        row["seed"]: row["test_accuracy"] for row in rows if (row["sparsity"], row["method"], row["training"]) == which
    }


def _pairs(some: dict[int, float], others: dict[int, float]) -> str:
    """How far the one is above the other in runs of one seed."""
    both = [some[seed] - others[seed] for seed in some if seed in others]
    error = f" ({statistics.stdev(both) / math.sqrt(len(both)):.2f})" if len(both) > 1 else ""
    return f"{statistics.mean(both):+.2f}{error}" if both else "-"


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f} ({statistics.stdev(values) if len(values) > 1 else 0:.2f}, {len(values)})"


def _mean(values: list[int]) -> str:
    return f"{statistics.mean(values):,.0f}" if values else "-"


def parser() -> argparse.ArgumentParser:
    """What may be asked for."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("runs/methods"))
    made.add_argument(
        "--protocol", choices=("628-steps", "cpu"), default="628-steps", help="628 steps, or those of tost reproduce"
    )
    made.add_argument("--model", help="in place of the protocol's cifar/resnet20")
    made.add_argument("--sparsities", type=float, nargs="*", help="0.95; with --protocol cpu 0.95 0.98")
    made.add_argument("--limit", type=int, help="training images: 10,000; with --protocol cpu 20,000")
    made.add_argument("--epochs", type=int, help="4; with --protocol cpu 12")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--jobs", type=int, default=2)
    made.add_argument("--methods", nargs="*", default=USUAL, choices=list(METHODS))
    made.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    made.add_argument("--finished", action="store_true", help="run nothing: the table of what is there")
    return made


def main() -> None:
    """Run the grid, seed by seed, and print what has come out."""
    args = parser().parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    levels = args.sparsities or ([0.95, 0.98] if args.protocol == "cpu" else [0.95])
    places = [(m, s) for s in levels for m in args.methods]
    cells = [cell(m, s, v, seed, args) for seed in range(args.seeds) for m, s in places for v in args.variants]
    records = grid.finished(cells, args.out) if args.finished else grid.run(cells, args.out, args.jobs)
    rows = rows_of(records)
    if rows:
        write_csv(args.out / "methods.csv", rows)
    print(f"{len(records)} of {len(cells)} cells", *table(rows), sep="\n")


if __name__ == "__main__":
    main()
