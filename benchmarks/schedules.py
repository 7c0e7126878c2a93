"""When should each ghost end? Trains a grid of tweak settings on the same masks and seeds; reads validation data only.

    python benchmarks/schedules.py --out runs/schedules --limit 10000 --epochs 4 --seeds 2 --jobs 2

Finished cells are not run again. Writes `schedules.csv` (one row per cell) and prints mean and spread per setting.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SKIP, SOFT, SMOOTH = "ghost_skip", "soft_activation", "label_smoothing"


def skip(until: float, **rest: Any) -> dict[str, Any]:
    return {"kind": SKIP, "until": f"{until}dur", **rest}


def soft(until: float, end: float = 10, **rest: Any) -> dict[str, Any]:
    return {"kind": SOFT, "until": f"{until}dur", "beta": [1, end], **rest}


def smooth(alpha: float = 0.1) -> dict[str, Any]:
    return {"kind": SMOOTH, "alpha": alpha}


def init(iterations: int = 20, **rest: Any) -> dict[str, Any]:
    return {"kind": "rescaled_init", "iterations": iterations, **rest}


GEOMETRIC = {"schedule": "geometric"}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "plain": [],
    "skip 0.1": [skip(0.1)],
    "skip 0.15": [skip(0.15)],
    "skip 0.2": [skip(0.2)],
    "skip 0.3": [skip(0.3)],
    "soft 0.5 to 10": [soft(0.5)],
    "soft 0.75 to 10": [soft(0.75)],
    "soft 0.3 to 100": [soft(0.3, 100, **GEOMETRIC)],
    "soft 0.6 to 100": [soft(0.6, 100, **GEOMETRIC)],
    "smooth 0.1": [smooth()],
    "init": [init()],
    "skip 0.15, soft 0.3 to 100": [skip(0.15), soft(0.3, 100, **GEOMETRIC)],
}


def cell(out: Path, setting: str, seed: int, args: argparse.Namespace) -> float:
    """Validation accuracy of one setting and seed, from disk or from a run of its own."""
    folder = out / f"{setting.replace(', ', '+').replace(' ', '_')}-seed{seed}"
    if not (folder / "result.json").exists():
        recipe = {
            "name": setting, "seed": seed, "model": args.model, "tweaks": SETTINGS[setting],
            "mask": {**({"batches": 2} if args.mask == "snip" else {}), "kind": args.mask,
                     "sparsity": args.sparsity, "on_collapse": "keep_one"}, "duration": f"{args.epochs}ep",
            "data": {"name": "cifar10", "limit": args.limit, "validation": 5000, "batch_size": args.batch_size},
            "precision": args.precision,
        }  # fmt: skip
        code = (
            "import json,sys,torch; from tost_plugins.recipe import Recipe; from tost_plugins.train import train;"
            "torch.set_num_threads(1); train(Recipe.from_dict(json.loads(sys.argv[1])), sys.argv[2])"
        )
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        subprocess.run(
            [sys.executable, "-c", code, json.dumps(recipe), str(folder)], check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    return json.loads((folder / "result.json").read_text())["history"][-1]["accuracy"]


def main() -> None:
    """Run the grid, seed by seed, so that a stopped grid has compared like with like."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/schedules"))
    parser.add_argument("--model", default="cifar/resnet20")
    parser.add_argument("--mask", default="snip")
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--limit", type=int, default=10000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    cells = [(setting, seed) for seed in range(args.seed, args.seed + args.seeds) for setting in args.only]
    with ThreadPoolExecutor(args.jobs) as pool:
        found = dict(zip(cells, pool.map(lambda c: cell(args.out, *c, args), cells), strict=True))
    with (args.out / "schedules.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["setting", "seed", "validation_accuracy"])
        writer.writerows([setting, seed, f"{accuracy:.2f}"] for (setting, seed), accuracy in found.items())
    for setting in args.only:
        values = [found[setting, seed] for seed in range(args.seed, args.seed + args.seeds)]
        print(f"{setting:40s} {statistics.mean(values):6.2f}  {' '.join(f'{v:.2f}' for v in values)}")


if __name__ == "__main__":
    main()
