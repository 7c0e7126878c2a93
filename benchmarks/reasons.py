"""Why does a tweak gain what it gains? Looks into runs of schedules.py: gradients, ranks, dead channels, norms at a ghost's end.

    python benchmarks/reasons.py --out runs/reasons --masks random synflow --seeds 1     # TOST_DATA: folder with cifar10/

Trains the settings of `--only` on the same masks, at 3,750 steps of 16 x 16 pixels, and looks at each network at the end of each
epoch, and at the end of `0.1dur`, where ghosts and soft activations end, and 20 steps later. All is measured on the first 1,000
validation images, by a copy of the network:

* accuracy, and without the ghosts and soft activations that are at work at that moment;
* loss, of the labels as they are, and the norm of its gradient over the kept weights, in training mode;
* effective rank of the features before the head: e to the entropy of their normalised singular values, 64 at most;
* dead channels: the share of the activations' channels that are 0 on every image;
* norms' drift since the look before: the mean over channels of |change of the running mean| / running deviation.

Writes `reasons.csv`, a row per look, and prints it as one table a setting.
"""

from __future__ import annotations

import argparse
import copy
import csv
import functools
import itertools
import math
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import schedules
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tost_plugins.lab import data
from tost_plugins.session.session import session_of

ALL = "init, smooth 0.05, skip 0.1, soft 0.1"
COLUMNS = ("accuracy", "without_tweaks", "loss", "gradient_norm", "effective_rank", "dead_channels", "drift")
Key = tuple[int, str, float, str]


class Looks:
    """What is measured of one run, at the steps of `at`; `rows` has it."""

    def __init__(self, at: set[int], images: Tensor, labels: Tensor) -> None:
        self.at, self.images, self.labels = at, images, labels
        self.rows: list[dict[str, Any]] = []
        self.before: list[Tensor] | None = None

    def __call__(self, step: int, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
        if step not in self.at:
            return
        row = {"step": step, "accuracy": self._accuracy(model), **self._features(model), **self._gradient(model)}
        with session_of(model).tweaks.quiet():
            row["without_tweaks"] = self._accuracy(model)
        self.rows.append({**row, "drift": self._drift(model)})

    @torch.no_grad()
    def _accuracy(self, model: nn.Module) -> float:
        model.eval()
        right = (self._outputs(model).argmax(1) == self.labels).float().mean()
        model.train()
        return 100 * float(right)

    def _outputs(self, model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(self.images).float()

    @torch.no_grad()
    def _features(self, model: nn.Module) -> dict[str, float]:
        """Effective rank before the head, and dead channels, from one forward pass in evaluation mode."""
        seen: dict[str, list[Tensor]] = {"features": [], "dead": []}
        hooks = [m.register_forward_hook(lambda *a: seen["dead"].append(_dead(a[2]))) for m in _relus(model)]
        hooks += [m.register_forward_pre_hook(lambda *a: seen["features"].append(a[1][0])) for m in _heads(model)]
        self._accuracy(model)
        for hook in hooks:
            hook.remove()
        return {
            "effective_rank": effective_rank(seen["features"][0].float()),
            "dead_channels": 100 * float(torch.cat(seen["dead"]).float().mean()),
        }

    def _gradient(self, model: nn.Module) -> dict[str, float]:
        """The loss of the labels as they are, and the norm of its gradient, as the network trains."""
        session, twin = session_of(model), copy.deepcopy(model)
        loss = F.cross_entropy(self._outputs(twin.train()), self.labels)
        params = dict(twin.named_parameters())
        mask = session.mask
        grads = torch.autograd.grad(loss, [params[name] for name in mask])
        kept = [(grad * mask[name]).norm() for name, grad in zip(mask, grads, strict=True)]
        return {"loss": float(loss), "gradient_norm": float(torch.stack(kept).norm())}

    def _drift(self, model: nn.Module) -> float:
        """How far the norms' running means are from those of the look before, in running deviations."""
        norms = [m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and "ghost" not in name]
        now, before = [m.running_mean.clone() for m in norms], self.before  # type: ignore[union-attr]
        self.before = now
        if before is None:
            return math.nan
        moved = [
            ((a - b).abs() / (m.running_var + m.eps).sqrt()).mean()  # type: ignore[operator]
            for a, b, m in zip(now, before, norms, strict=True)
        ]
        return float(torch.stack(moved).mean())


def effective_rank(features: Tensor) -> float:
    """e to the entropy of the normalised singular values of centred features `(N, D)`: from 1, a line, to D, all alike.

    Example:
        >>> round(effective_rank(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])), 3)
        2.0
    """
    values = torch.linalg.svdvals(features - features.mean(0))
    shares = values / values.sum()
    return float(torch.exp(torch.special.entr(shares).sum()))


def _dead(outputs: Tensor) -> Tensor:
    """For each channel whether it is 0 on every image."""
    return (outputs == 0).flatten(2).all(2).all(0)


def _relus(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.ReLU)]


def _heads(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def looks(options: argparse.Namespace, key: Key) -> list[dict[str, Any]]:
    """The rows of one run."""
    torch.set_num_threads(1)
    recipe = schedules.recipe_of(options, *key)
    found = schedules.load(recipe.data)
    loader = data.Loader(found.validation, 1000, shuffle=False, augment=None, seed=0, mean=found.mean, std=found.std)
    images, labels = next(iter(schedules.Images(loader, options.halved)))
    per_epoch = -(-len(found.train) // recipe.data.batch_size)
    end = math.ceil(0.1 * options.epochs * per_epoch)
    at = {0, end - 1, end + 1, end + 21, *(per_epoch * epoch for epoch in range(1, options.epochs + 1))}
    seen = Looks(at, images, labels)
    schedules.train(options, *key, look=seen)
    seed, mask, sparsity, setting = key
    return [{"seed": seed, "mask": mask, "sparsity": sparsity, "setting": setting, **row} for row in seen.rows]


def main() -> None:
    """Run them, write every look, and print the means over masks and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/reasons"))
    parser.add_argument("--masks", nargs="*", default=["random"])
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--model", default="cifar/resnet20")
    parser.add_argument("--limit", type=int, default=20000, help="training images")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=10, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=["plain", ALL], choices=list(schedules.SETTINGS))
    parser.set_defaults(halved=True, budget="kept", steps=None, lr=0.1)
    args = parser.parse_args()
    seeds = range(args.seed, args.seed + args.seeds)
    keys = [(seed, mask, args.sparsity, setting) for seed in seeds for mask in args.masks for setting in args.only]
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = list(itertools.chain.from_iterable(pool.map(functools.partial(looks, args), keys)))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "reasons.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for setting in args.only:
        print(f"\n| {setting}: step | {' | '.join(COLUMNS)} |\n| {'--- | ' * (len(COLUMNS) + 1)}")
        for step in sorted({row["step"] for row in rows}):
            those = [row for row in rows if (row["setting"], row["step"]) == (setting, step)]
            means = [statistics.mean(row[column] for row in those) for column in COLUMNS]
            print(f"| {step} | {' | '.join(f'{mean:.3g}' for mean in means)} |")


if __name__ == "__main__":
    main()
