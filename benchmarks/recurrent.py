"""Which mask for a recurrent network? An LSTM that learns Python's own documentation letter by letter, under masks.

    python benchmarks/recurrent.py --choose                             # learning rates, by the dense network's validation part
    python benchmarks/recurrent.py --out runs/recurrent --jobs 2
    python benchmarks/recurrent.py --out runs/recurrent --finished      # the tables of what is there

Nothing is downloaded: the text is `pydoc_data.topics`, which every Python has, and each version another one. One cell is one run
of a system, sparsity, optimizer and seed; finished cells are not run again. Seeds come one after another, so that a stopped grid
has compared like with like. Writes `recurrent.csv` (a row per cell) and prints two tables: perplexity of the test part per
letter, mean, standard deviation over the seeds and their number; then differences of pairs, with their standard errors.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import platform
import statistics
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from letters import Letters, Text, endlessly, paragraphs, perplexity, pieces
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tost_plugins import Recipe, Session, TostError
from tost_plugins.files.atomic import write, write_csv
from tost_plugins.masks.base import STRICT
from tost_plugins.masks.methods.selfish import Selfish

#: The learning rate of each optimizer, by `--choose`.
RATES = {"sgd": 40.0, "asgd": 20.0}
CHOICES = (2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
CLIP = 0.25
AVERAGED = 0.5  # of a run is over when ASGD begins to average
MOVES = {"every": "25ba"}
DENSE, APART = "dense", "selfish, gates apart"
TOST, RESCALED = "random, static, with ToST", "random, static, rescaled_init"
SYSTEMS: dict[str, dict[str, Any]] = {
    DENSE: {"kind": "random"},
    "random, static": {"kind": "random"},
    TOST: {"kind": "random"},
    RESCALED: {"kind": "random"},
    "set": {"kind": "set", **MOVES},
    "set, drop 0.7": {"kind": "set", "drop": 0.7, **MOVES},
    "rigl": {"kind": "rigl", **MOVES},
    "snfs": {"kind": "snfs", **MOVES},
    "selfish": {"kind": "selfish", **MOVES},
    APART: {"kind": "selfish", **MOVES},
}
#: Default settings of the four, optional all of them: what finds nothing to act on in an LSTM is left out, and is in the cell.
_KINDS = ("ghost_skip", "soft_activation", "rescaled_init", "label_smoothing")
_FOUR = [{**tweak, "least_steps": 0} for tweak in Recipe.of(None).to_dict()["tweaks"] if tweak["kind"] in _KINDS]
TWEAKS = {TOST: _FOUR, RESCALED: [tweak for tweak in _FOUR if tweak["kind"] == "rescaled_init"]}
PAIRS = [
    *((system, "random, static") for system in ("set", "rigl", "snfs", "selfish", TOST, RESCALED)),
    *(("selfish", system) for system in ("set", "set, drop 0.7", "rigl", APART)),
]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class GatesApart(Selfish):
    """`Selfish` in which weights do not move between the gates of a layer."""

    def update(self, mask: Mapping[str, Tensor], weights: Mapping[str, Tensor], *more: Any) -> dict[str, Tensor]:
        """Each gate's mask by itself."""
        gates = {name: 4 if name.startswith("lstm") else 1 for name in mask}
        new = super().update(_parts(mask, gates), _parts(weights, gates), *more)
        return {name: torch.cat([new[f"{name}.{i}"] for i in range(count)]) for name, count in gates.items()}


def _parts(tensors: Mapping[str, Tensor], gates: Mapping[str, int]) -> dict[str, Tensor]:
    return {f"{name}.{i}": part for name in gates for i, part in enumerate(tensors[name].chunk(gates[name]))}


class Place(NamedTuple):
    """What a cell is."""

    system: str
    sparsity: float
    optimizer: str
    seed: int

    @property
    def name(self) -> str:
        system = self.system.replace(", ", "-").replace(" ", "_")
        return f"{system}-{100 * self.sparsity:g}-{self.optimizer}-seed{self.seed}"


def recipe(place: Place) -> Recipe:
    """A cell's recipe: all layers but the embedding have the same share of their weights, at the start at least."""
    mask = {"sparsity": place.sparsity, "allocation": "uniform", **SYSTEMS[place.system]}
    made = Recipe.from_dict({"seed": place.seed, "mask": mask, "tweaks": TWEAKS.get(place.system, [])})
    if place.system == APART:  # a mask of ours alone
        made = made.model_copy(update={"mask": GatesApart(**mask)})
    return made


@functools.cache
def text(limit: int | None = None) -> Text:
    """The text, or its first letters."""
    return Text.of(paragraphs()[:limit])


def settings(options: argparse.Namespace, place: Place, rate: float) -> dict[str, Any]:
    """All that a cell's result depends on."""
    found = {"python": platform.python_version(), "text": zlib.crc32(paragraphs()[: options.limit].encode())}
    found |= {"recipe": recipe(place).to_dict(), "optimizer": place.optimizer, "system": place.system, "rate": rate}
    return json.loads(json.dumps({**found, "steps": options.steps, "hidden": options.hidden}))


def train(options: argparse.Namespace, place: Place, rate: float) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The networks that a run ends with, by what their weights are, and what there is to say about it.

    SGD's learning rate falls with half a cosine to 0. ASGD's stays, and its networks are the average that begins again with each
    weight that comes back, the `usual` one that does not, and the `last` weights.
    """
    found, total = text(options.limit), options.steps
    torch.manual_seed(place.seed)
    net = Letters(found.letters, options.hidden)
    session, batches = Session(net, recipe(place)).attach(), pieces(found.train)
    begin = int(AVERAGED * total)
    if place.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (1 + math.cos(math.pi * t / total)) / 2)
    else:
        optimizer = torch.optim.ASGD(net.parameters(), lr=rate, lambd=0, t0=begin)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1)
    usual, state, loss_fn = AveragedModel(net), None, session.criterion(F.cross_entropy)
    how = {"forward": lambda model, batch: model(batch[0])[0]}
    with session.drive(optimizer, batches, F.cross_entropy, total, len(batches), **how):
        for step, (x, y, first) in enumerate(itertools.islice(endlessly(batches), total)):
            scores, state = net(x, None if first or state is None else tuple(part.detach() for part in state))
            optimizer.zero_grad()
            loss_fn(scores, y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            if place.optimizer == "asgd" and step > begin:
                usual.update_parameters(net)
    said = {"left_out": session.tweaks.left_out, "kept": session.mask.kept, "gates": gates(session.mask)}
    if place.optimizer == "sgd":
        return {"last": net}, said
    averaged = copy.deepcopy(net)
    for own, param in zip(averaged.parameters(), net.parameters(), strict=True):
        own.data.copy_(optimizer.state[param]["ax"])
    return {"averaged": averaged, "usual": session.plain(usual), "last": net}, said


def gates(mask: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """How many weights each gate of the LSTM keeps: input, forget, cell and output."""
    return {name: [int(part.sum()) for part in kept.chunk(4)] for name, kept in mask.items() if name.startswith("lstm")}


def cell(options: argparse.Namespace, place: Place) -> dict[str, Any]:
    """A cell's record, from disk or trained here; raises TostError where the folder has one of other settings."""
    path, wanted = options.out / f"{place.name}.json", settings(options, place, RATES[place.optimizer])
    if not path.exists():
        networks, said = train(options, place, RATES[place.optimizer])
        found = {part: getattr(text(options.limit), part) for part in ("validation", "test")}
        reached = {part: {key: perplexity(net, ids) for key, net in networks.items()} for part, ids in found.items()}
        write(path, json.dumps({"settings": wanted, **reached, **said}))
    record = json.loads(path.read_text())
    if record["settings"] != wanted:
        raise TostError(
            f"--out {options.out}: expected results of these settings, got {path.name} of others; choose another"
        )
    return record


def choose(options: argparse.Namespace) -> list[str]:
    """The dense network's perplexity on the validation part with each rate."""
    lines = []
    for kind, rate in itertools.product(RATES, CHOICES):
        networks, _ = train(options, Place(DENSE, 0.0, kind, 100), rate)
        reached = perplexity(next(iter(networks.values())), text(options.limit).validation)
        lines.append(f"{kind} {rate:g}: {reached:.3f}")
        print(lines[-1], flush=True)
    return lines


Reached = Mapping[tuple[Place, str], float]  # a cell, and what its network's weights are


def spread(values: Sequence[float]) -> str:
    """Mean, standard deviation and number."""
    return f"{statistics.mean(values):.3f} ({_deviation(values)}, {len(values)})" if values else "-"


def error(values: Sequence[float]) -> str:
    """A mean difference, its standard error and the number of pairs."""
    found = _deviation(values, math.sqrt(len(values)))
    return f"{statistics.mean(values):+.3f} ({found}, {len(values)})" if values else "-"


def _deviation(values: Sequence[float], by: float = 1.0) -> str:
    return f"{statistics.stdev(values) / by:.3f}" if len(values) > 1 else "-"


VERSIONS = {"SGD": ("sgd", "last"), "ASGD, averaged": ("asgd", "averaged"), "ASGD, last weights": ("asgd", "last")}
USUAL = ("asgd", "usual")


def tables(reached: Reached) -> list[str]:
    """The lines to print, of the seeds that are there."""
    levels = sorted({place.sparsity for place, _ in reached})
    systems = [name for name in SYSTEMS if any(place.system == name for place, _ in reached)]

    def of(system: str, sparsity: float, optimizer: str, what: str) -> dict[int, float]:
        place = (0.0 if system == DENSE else sparsity, optimizer, what)
        return {
            p.seed: v for (p, w), v in reached.items() if p.system == system and (p.sparsity, p.optimizer, w) == place
        }

    def less(one: Mapping[int, float], other: Mapping[int, float]) -> str:
        return error([one[seed] - other[seed] for seed in one if seed in other])

    lines = [f"| sparsity | mask | {' | '.join(VERSIONS)} | begun again less not |", "| --- " * 6 + "|"]
    for level, system in itertools.product(levels, systems):
        words = [spread(list(of(system, level, *version).values())) for version in VERSIONS.values()]
        if any(word != "-" for word in words) and (system != DENSE or level == 0):
            again = less(of(system, level, *VERSIONS["ASGD, averaged"]), of(system, level, *USUAL))
            lines.append(f"| {100 * level:g} % | {system} | {' | '.join(words)} | {again} |")
    lines += ["", f"| sparsity | pair | {' | '.join(VERSIONS)} |", "| --- " * 5 + "|"]
    for level, (one, other) in itertools.product(levels, [*PAIRS, ("selfish", DENSE)]):
        words = [less(of(one, level, *version), of(other, level, *version)) for version in VERSIONS.values()]
        if any(word != "-" for word in words):
            lines.append(f"| {100 * level:g} % | {one} less {other} | {' | '.join(words)} |")
    return lines


def parser() -> argparse.ArgumentParser:
    """What may be asked for."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=Path("runs/recurrent"))
    made.add_argument("--sparsities", type=float, nargs="*", default=[0.67, 0.9])
    made.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=list(SYSTEMS))
    made.add_argument("--optimizers", nargs="*", default=list(RATES), choices=list(RATES))
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--jobs", type=int, default=2)
    made.add_argument("--steps", type=int, default=1200)
    made.add_argument("--hidden", type=int, default=128, help="units of each layer")
    made.add_argument("--limit", type=int, help="letters of the text, all without")
    made.add_argument("--finished", action="store_true", help="run nothing: the tables of what is there")
    made.add_argument(
        "--choose", action="store_true", help="the dense network with other learning rates, and nothing else"
    )
    return made


def main() -> None:
    """Run the grid, seed by seed, and print what has come out."""
    args = parser().parse_args()
    if args.choose:
        torch.set_num_threads(1)
        choose(args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    levels = {system: [0.0] if system == DENSE else args.sparsities for system in args.systems}
    grid = [(system, level, kind) for system in args.systems for level in levels[system] for kind in args.optimizers]
    places = [Place(*place, seed) for seed in range(args.seeds) for place in grid]
    if args.finished:
        places = [place for place in places if (args.out / f"{place.name}.json").exists()]
    with ProcessPoolExecutor(args.jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        records = list(pool.map(functools.partial(cell, args), places))
    reached = {(p, what): v for p, record in zip(places, records, strict=True) for what, v in record["test"].items()}
    if reached:
        write_csv(
            args.out / "recurrent.csv",
            [
                {**place._asdict(), "weights": what, "test_perplexity": value}
                for (place, what), value in reached.items()
            ],
        )
    print(f"{len(records)} cells", *tables(reached), sep="\n")


if __name__ == "__main__":
    main()
