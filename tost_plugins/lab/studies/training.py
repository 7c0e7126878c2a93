"""Studies of the first paper that train with one tweak, with another, with all: accuracy is what they look at."""

from __future__ import annotations

from collections.abc import Sequence

from tost_plugins.lab.grid import Cell, Record
from tost_plugins.lab.report import Plot
from tost_plugins.lab.studies.base import Content, Row, Size, Study, accuracies, alone, cell, on_one_mask
from tost_plugins.lab.studies.settings import BASES, CURVES, GELDER, GHOSTS, NEVER, STRUCTURES, TOST

_SPARSITIES = {
    "smoke": (0.5, 0.95),
    "cpu": (0.2, 0.5, 0.8, 0.9, 0.95, 0.97),
    "paper": (0.2, 0.36, 0.49, 0.59, 0.67, 0.74, 0.79, 0.83, 0.87, 0.89, 0.91, 0.93, 0.95, 0.97),
}
_DENSITIES = {"smoke": (0.0, 0.95), "cpu": (0.0, 0.2, 0.75, 0.95), "paper": (0.0, 0.2, 0.75, 0.95)}


def _ablation(content: Content, size: Size, seeds: Sequence[int]) -> list[Cell]:
    return on_one_mask(content, seeds, {**alone(content), "all": {}})


def _sweep(content: Content, size: Size, seeds: Sequence[int]) -> list[Cell]:
    return _over(_SPARSITIES[size], content, seeds, {**alone(content, ()), "all": {}})


def _density(content: Content, size: Size, seeds: Sequence[int]) -> list[Cell]:
    return _over(_DENSITIES[size], content, seeds, alone(content, GHOSTS))


def _over(sparsities: Sequence[float], content: Content, seeds: Sequence[int], variants: dict[str, Row]) -> list[Cell]:
    """The variants at each sparsity; a dense network needs no method to find its mask."""
    made: list[Cell] = []
    for sparsity in sparsities:
        mask = {**content["mask"], "sparsity": sparsity} if sparsity else {"kind": "random", "sparsity": 0}
        made += on_one_mask({**content, "mask": mask}, seeds, variants, {"sparsity": sparsity})
    return made


def _gains(records: Sequence[Record], size: Size) -> list[Row]:
    """What each training adds to the accuracy of the plain one on the same mask, in points."""
    found = accuracies(records, size)
    plain = {(r.get("sparsity"), r["seed"]): r["test_accuracy"] for r in found if r["training"] == "plain"}
    return [
        {**row, "gain": row["test_accuracy"] - plain[row.get("sparsity"), row["seed"]]}
        for row in found
        if row["training"] != "plain"
    ]


def _accuracies_and_gains(records: Sequence[Record], size: Size) -> list[Row]:
    """Both, since seeds differ by more than tweaks do: gains are paired, seed by seed."""
    found = [("test accuracy (%)", row, row.pop("test_accuracy")) for row in accuracies(records, size)]
    for row in _gains(records, size):
        del row["test_accuracy"]
        found.append(("gain over plain (points)", row, row.pop("gain")))
    return [{**row, "quantity": quantity, "value": value} for quantity, row, value in found]


def _ghosts(content: Content, size: Size, seeds: Sequence[int]) -> list[Cell]:
    ghosts = [tweak for tweak in content["tweaks"] if tweak["kind"] in GHOSTS]
    kept = {
        "ghost_skip": {"until": NEVER, "schedule": "constant"},
        "soft_activation": {"until": NEVER, "shape": "swish"},
    }
    variants = {
        "no ghosts": {"tweaks": []},
        "ghosts that vanish": {"tweaks": ghosts},
        "ghosts for the whole run": {"tweaks": [{**tweak, **kept[tweak["kind"]]} for tweak in ghosts]},
    }
    return on_one_mask(content, seeds, variants)


def _with_and_without(records: Sequence[Record], size: Size) -> list[Row]:
    """Two accuracies of each run: as it stood at its last step, ghosts and all, and of the plain network left."""
    rows = []
    for record in (r for r in records if r["labels"]):
        trained, left = record["result"]["history"][-1]["accuracy"], record["result"]["test_accuracy"]
        rows += [{**record["labels"], "network": "as trained", "test_accuracy": trained},
                 {**record["labels"], "network": "the plain one left", "test_accuracy": left}]  # fmt: skip
    return rows


_NORMS_AT = {"smoke": (0.0, 0.9), "cpu": (0.0, 0.5, 0.8, 0.9, 0.95), "paper": (0.0, 0.5, 0.8, 0.9, 0.95, 0.98)}


def _norms(content: Content, size: Size, seeds: Sequence[int]) -> list[Cell]:
    return _over(_NORMS_AT[size], content, seeds, {"norms alone": {"train": "norms"}, "all": {}})


_FREEZE = {
    "smoke": ("0ep", "1ep", None),
    "cpu": ("0ep", "1ep", "2ep", "3ep", None),
    "paper": ("0ep", "1ep", "5ep", "20ep", "60ep", None),
}


def _freeze(content: Content, size: Size, seeds: Sequence[int]) -> list[Cell]:
    made = []
    for seed in seeds:
        for freeze in _FREEZE[size]:
            mask = {"kind": "dnw", "allocation": "erk", "sparsity": content["mask"]["sparsity"], "freeze": freeze}
            moves = freeze or "all"
            made.append(cell(content, f"dnw-{moves}", seed, {"moves_for": moves.removesuffix("ep")}, {"mask": mask}))
    return made


def _accuracy_and_time(records: Sequence[Record], size: Size) -> list[Row]:
    """Accuracy and mean time of a step; a run that was finished by another go than this has no time to tell."""
    rows = []
    for record in records:
        labels, seconds = record["labels"], record["step_seconds"]
        rows.append({**labels, "quantity": "test accuracy (%)", "value": record["result"]["test_accuracy"]})
        if seconds is not None:
            rows.append({**labels, "quantity": "time of a step (ms)", "value": 1000 * seconds})
    return rows


ablation = Study(
    about="each tweak alone and all together, on the same masks and seeds",
    paper=f"{TOST}, table 4 (ResNet-18, CIFAR-100, lottery tickets): at 90 % 71.12 plain, 72.17 ghost_skip, 72.03 "
    "soft_activation, 71.83 rescaled_init, 71.93 label_smoothing, 73.23 all.",
    plot=Plot("training", "value", panel="quantity"),
    cells=_ablation, rows=_accuracies_and_gains,
)  # fmt: skip
sparsity_sweep = Study(
    about="with and without the tweaks, from dense to very sparse",
    paper=f"{TOST}, figure 7 (20 to 97 %){CURVES}",
    plot=Plot("sparsity", "value", by="training", panel="quantity", xlabel="sparsity"),
    cells=_sweep, rows=_accuracies_and_gains,
)  # fmt: skip
density_benefit = Study(
    about="what ghost skips and soft activations add at each density",
    paper=f"{TOST}, table 5: ghost skips -0.77 (dense), +0.03, +0.56, +2.15 points (95 %); soft activations +0.11, "
    "+0.29, +0.24, +1.28.",
    plot=Plot("sparsity", "gain", by="training", xlabel="sparsity", ylabel="gain in test accuracy (points)", zero=True),
    cells=_density, rows=_gains,
)  # fmt: skip
ghostliness = Study(
    about="ghosts that vanish against ghosts that stay for the whole run",
    paper=f"{TOST}, figure 6{CURVES}",
    plot=Plot("training", "test_accuracy", by="network", xlabel="", ylabel="test accuracy (%)"),
    cells=_ghosts, rows=_with_and_without,
    base={"cpu": {"data": BASES["cpu"]["data"] | {"validation": 0}}},  # both accuracies on the test images
)  # fmt: skip
norms_only = Study(
    about="gamma and beta of the norms alone trained, against all parameters, dense and sparse",
    paper="Frankle, Schwab and Morcos, Training BatchNorm and Only BatchNorm, ICLR 2021: on CIFAR-10 82 % in a deep enough "
    "ResNet, dense; sparse networks are ours.",
    plot=Plot("sparsity", "test_accuracy", by="training", xlabel="sparsity", ylabel="test accuracy (%)"),
    cells=_norms, rows=accuracies,
    base=STRUCTURES | {"paper": STRUCTURES["paper"] | {"mask": BASES["cpu"]["mask"]}},
)  # fmt: skip
freeze = Study(
    about="DNW with a structure that moves for N epochs: accuracy and time of a step",
    paper=f"{GELDER}, figure 4 (ResNet-18, CIFAR-10){CURVES}",
    plot=Plot("moves_for", "value", panel="quantity", xlabel="epochs in which the structure moves", ylabel=""),
    cells=_freeze, rows=_accuracy_and_time,
    base=STRUCTURES,
)  # fmt: skip
