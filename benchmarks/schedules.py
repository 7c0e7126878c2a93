"""When should each tweak end? Trains a grid of settings on the same masks and seeds; reads validation data only.

    python benchmarks/schedules.py --out runs/schedules --seed 10 --seeds 2 --jobs 2     # TOST_DATA: folder with cifar10/

bf16, a thread per run; `--halved` trains on images of 16 x 16 pixels, four times as fast; `--steps N` ends runs there, whatever
`--epochs` says. All settings of a seed train the same mask. Finished cells are not run again; nan is a mask that is refused.
Writes `schedules.csv` (a row per cell) and prints, for each mask, sparsity and setting, mean and single values, and the mean gain
over "plain"; then each setting's mean gain over all pairs, with its standard error.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tost_plugins import Recipe, Session, TostError
from tost_plugins.lab import data, models
from tost_plugins.tweaks.ghost_skip import ghosts


def skip(until: float) -> dict[str, Any]:
    return {"kind": "ghost_skip", "until": f"{until}dur"}


def soft(until: float) -> dict[str, Any]:
    return {"kind": "soft_activation", "until": f"{until}dur", "beta": [1, 100], "schedule": "geometric"}


def smooth(alpha: float) -> dict[str, Any]:
    return {"kind": "label_smoothing", "alpha": alpha}


def init(iterations: int, rate: float) -> dict[str, Any]:
    return {"kind": "rescaled_init", "iterations": iterations, "learning_rate": rate}


EVERYWHERE = "ghosts in dead channels too"
KEPT = "skips that stay, and are counted in"  # not a sparse network: what ghosts are worth that nobody takes away
INIT, SMOOTH = init(60, 0.01), smooth(0.05)
DEFAULT = Recipe.of(None).to_dict()["tweaks"]
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "plain": [],
    "default": DEFAULT,
    "default, whatever the length": [{**tweak, "least_steps": 0} for tweak in DEFAULT],
    "skip 0.05": [skip(0.05)],
    "skip 0.1": [skip(0.1)],
    "skip 0.15": [skip(0.15)],
    f"skip 0.05, {EVERYWHERE}": [skip(0.05)],
    f"skip 0.15, {EVERYWHERE}": [skip(0.15)],
    "skip 0.5": [skip(0.5)],
    KEPT: [{"kind": "ghost_skip", "until": "1dur", "schedule": "constant"}],
    "soft 0.15": [soft(0.15)],
    "smooth 0.05": [SMOOTH],
    "init, skip 0.15": [INIT, skip(0.15)],
    "init, skip 0.15, soft 0.15": [INIT, skip(0.15), soft(0.15)],
    "skip 0.15, soft 0.15": [skip(0.15), soft(0.15)],
    "skip 0.15, smooth 0.05": [skip(0.15), SMOOTH],
    "soft 0.6": [soft(0.6)],
    "soft 0.95": [soft(0.95)],
    "smooth 0.1": [smooth(0.1)],
    "init 60 x 0.003": [init(60, 0.003)],
    "init 180 x 0.003": [init(180, 0.003)],
    "init 60 x 0.01": [INIT],
    "init 120 x 0.01": [init(120, 0.01)],
    "init, smooth 0.05": [INIT, SMOOTH],
    "init, soft 0.6": [INIT, soft(0.6)],
    f"init, smooth 0.05, skip 0.02, soft 0.1, {EVERYWHERE}": [INIT, SMOOTH, skip(0.02), soft(0.1)],
    "init, smooth 0.05, skip 0.1": [INIT, SMOOTH, skip(0.1)],
    "neurons": [{"kind": "neuron_gradients"}],
    "multiplicative": [{"kind": "multiplicative"}],
    "multiplicative 30": [{"kind": "multiplicative", "strength": 30, "most": 0.15}],
    "sparse init": [{"kind": "sparse_init"}],
    "sharpness": [{"kind": "sharpness"}],
    "init, smooth 0.05, skip 0.1, soft 0.1": [INIT, SMOOTH, skip(0.1), soft(0.1)],
    "all four, multiplicative": [INIT, SMOOTH, skip(0.1), soft(0.1), {"kind": "multiplicative"}],
}


class Images:
    """A loader's batches, channels last; `halved` averages 2 x 2 pixels to one."""

    def __init__(self, loader: data.Loader, halved: bool) -> None:
        self.loader, self.halved = loader, halved

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in self.loader:
            images = F.avg_pool2d(images, 2) if self.halved else images
            yield images.contiguous(memory_format=torch.channels_last), labels


Key = tuple[int, str, float, str]  # seed, mask, sparsity and setting
Look = Callable[[int, torch.nn.Module, Callable[..., torch.Tensor]], None]


def cell(options: argparse.Namespace, key: Key) -> float:
    """Validation accuracy in percent of one setting on one mask after its last epoch, from disk or trained here."""
    seed, mask, sparsity, setting = key
    live = "live-" * (options.budget == "live")
    path = options.out / f"{live}{mask}-{sparsity:g}-{setting.replace(', ', '+').replace(' ', '_')}-seed{seed}.json"
    if not path.exists():
        torch.set_num_threads(1)
        try:
            history = train(options, *key)
        except TostError as refused:  # a mask that connects nothing, say
            print(f"{mask} {sparsity:g}: {refused}", flush=True)
            history = [math.nan]
        path.write_text(json.dumps(history))
    return json.loads(path.read_text())[-1]


load = functools.cache(data.load)


def recipe_of(options: argparse.Namespace, seed: int, mask: str, sparsity: float, setting: str) -> Recipe:
    """What a cell trains."""
    content = Recipe.load("cifar10_short").to_dict() | {"seed": seed, "tweaks": SETTINGS[setting]}
    batches = {"batches": 2} if mask == "snip" else {}
    content["mask"] = {"kind": mask, "sparsity": sparsity, "on_collapse": "keep_one", **batches}
    if options.budget == "live":
        content["mask"] |= {"budget": "live", "on_collapse": "error"}
    return Recipe.from_dict(content | {"model": options.model, "data": {**content["data"], "limit": options.limit}})


def train(
    options: argparse.Namespace, seed: int, mask: str, sparsity: float, setting: str, look: Look = lambda *_: None
) -> list[float]:
    """Validation accuracy after each epoch, and at the end; `look(step, model, loss_fn)` before each step and after the last."""
    recipe = recipe_of(options, seed, mask, sparsity, setting)
    found, spec, halved = load(recipe.data), recipe.optimizer, options.halved
    torch.manual_seed(seed)
    model = models.build(recipe.model, 10, 3).train()
    kinds = {"seed": seed, "mean": found.mean, "std": found.std}
    loader = data.Loader(found.train, recipe.data.batch_size, shuffle=True, augment=found.augment, **kinds)
    batches = Images(loader, halved)
    validation = Images(data.Loader(found.validation, 500, shuffle=False, augment=None, **kinds), halved)
    session = Session(model, recipe).attach()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=options.lr, momentum=spec.momentum, weight_decay=spec.weight_decay
    )
    total, loss_fn = options.steps or options.epochs * len(loader), session.criterion(F.cross_entropy)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (1 + math.cos(math.pi * min(1, t / total))) / 2)
    history = []
    longer = setting == KEPT  # the last accuracy is from before the skips' end
    with session.drive(optimizer, batches, F.cross_entropy, total + longer, len(loader)):
        if EVERYWHERE in setting:
            for ghost in ghosts(model):
                ghost.alive.fill_(1)
        for epoch in range(math.ceil(total / len(loader))):
            loader.set_epoch(epoch)
            done = epoch * len(loader)
            for step, (images, labels) in enumerate(itertools.islice(batches, total - done), done):
                look(step, model, loss_fn)
                with torch.autocast("cpu", torch.bfloat16):
                    outputs = model(images).float()
                optimizer.zero_grad()
                loss_fn(outputs, labels).backward()
                optimizer.step()
                schedule.step()
            history.append(accuracy(model, validation))
        look(total, model, loss_fn)
    return history


@torch.no_grad()
def accuracy(model: torch.nn.Module, batches: Images) -> float:
    """In percent, in eval mode; the model trains on."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        right = [(model(images).argmax(1) == labels).float().mean() for images, labels in batches]
    model.train()
    return 100 * float(torch.stack(right).mean())


def main() -> None:
    """Run the grid, seed by seed, so that a stopped grid has compared like with like."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/schedules"))
    parser.add_argument("--halved", action="store_true", help="images of 16 x 16 pixels")
    parser.add_argument("--masks", nargs="*", default=["snip"], help="mask methods")
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.98])
    parser.add_argument("--budget", choices=("kept", "live"), default="kept", help="of the masks")
    parser.add_argument("--model", default="cifar/resnet20")
    parser.add_argument("--limit", type=int, default=20000, help="training images")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--steps", type=int, help="in place of --epochs")
    parser.add_argument("--lr", type=float, default=0.1, help="the first learning rate")
    parser.add_argument("--seed", type=int, default=10, help="the first seed")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    seeds = range(args.seed, args.seed + args.seeds)
    rows = [(mask, sparsity) for mask in args.masks for sparsity in args.sparsities]
    cells = [(seed, *row, setting) for seed in seeds for row in rows for setting in args.only]
    with ProcessPoolExecutor(args.jobs) as pool:
        found = dict(zip(cells, pool.map(functools.partial(cell, args), cells), strict=True))
    with (args.out / "schedules.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mask", "sparsity", "setting", "seed", "validation_accuracy"])
        writer.writerows([*row, setting, seed, f"{value:.2f}"] for (seed, *row, setting), value in found.items())
    for row in rows:
        for setting in args.only:
            values = [found[(seed, *row, setting)] for seed in seeds]
            gains = [found[(seed, *row, setting)] - found.get((seed, *row, "plain"), math.nan) for seed in seeds]
            line = (
                f"{row[0]:8s} {row[1]:.2f} {setting:60s} {statistics.mean(values):6.2f}  {statistics.mean(gains):+5.2f}"
            )
            print(line, " ".join(f"{value:.2f}" for value in values))
    for setting in args.only if "plain" in args.only else ():
        gains = [found[(seed, *row, setting)] - found[(seed, *row, "plain")] for seed in seeds for row in rows]
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
        print(f"{setting:74s} {statistics.mean(gains):+5.2f}  (standard error {error:.2f}, {len(gains)} pairs)")


if __name__ == "__main__":
    main()
