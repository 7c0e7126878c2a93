"""The studies of both papers: name -> study, and one call that runs one. A new study is one entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tost_plugins.errors import unknown
from tost_plugins.lab import grid
from tost_plugins.lab.progress import Listener, silent
from tost_plugins.lab.report import Plot, study_figure, summary
from tost_plugins.lab.studies import curves, structure, training, watching
from tost_plugins.lab.studies.base import Study
from tost_plugins.lab.studies.real_speed import real_speed
from tost_plugins.lab.studies.settings import BASES, SEEDS, TOST
from tost_plugins.recipe.recipe import apply_changes

_CURVES = Study(
    about="the curves of PSwish over beta",
    paper=f"{TOST}, figure 5.",
    plot=Plot("x", "y", by="curve", xlabel="x", ylabel="x sigmoid(beta x)"),
    cells=lambda content, size, seeds: [],
    rows=lambda records, size: curves.pswish(),
)

STUDIES: dict[str, Study] = {
    "ablation": training.ablation,
    "sparsity-sweep": training.sparsity_sweep,
    "ghostliness": training.ghostliness,
    "density-benefit": training.density_benefit,
    "pswish": _CURVES,
    "activation-sparsity": watching.activation_sparsity,
    "curvature": watching.curvature,
    "reinit": structure.reinit,
    "robustness": structure.robustness,
    "in-degree": watching.in_degree,
    "emergence": watching.emergence,
    "freeze": training.freeze,
    "norms-only": training.norms_only,
    "real-speed": real_speed,
}


def content_of(name: str, size: str = "smoke", changes: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe's content that a study of this size starts from, with `key.sub=value` changes."""
    base = BASES[size] | dict((STUDIES[name].base or {}).get(size, {}))
    return apply_changes(base, list(changes))


def cells(name: str, size: str = "smoke", changes: Sequence[str] = (), seeds: int | None = None) -> list[grid.Cell]:
    """The grid of a study. Raises TostError for an unknown name or size and for what a recipe does not take."""
    if name not in STUDIES:
        raise unknown("tost study", "study", name, STUDIES)
    if size not in BASES:
        raise unknown("--size", "size", size, BASES)
    count = grid.seed_range(SEEDS[size] if seeds is None else seeds)
    return STUDIES[name].cells(content_of(name, size, changes), size, count)  # type: ignore[arg-type]


def run(
    name: str,
    out: str | Path,
    size: str = "smoke",
    changes: Sequence[str] = (),
    seeds: int | None = None,
    jobs: int | grid.Cluster = 1,
    listen: Listener = silent,
) -> dict[str, Any]:
    """Run a study in `out`: its cells, then NAME.csv (all rows), NAME-summary.csv, NAME.json and NAME.png there.

    Cells that are finished are not run again, and one that was stopped goes on. Returns what NAME.json holds.
    """
    made, out = cells(name, size, changes, seeds), Path(out)
    study = STUDIES[name]
    records = grid.run(made, out, jobs, listen=listen)
    rows = study.rows(records, size)  # type: ignore[arg-type]
    short = summary(rows, study.plot)
    count = [] if seeds is None else ["--seeds", str(seeds)]
    result = {
        "about": study.about, "paper": study.paper, "size": size, "title": title(records), "summary": short, "rows": rows,
        "command": grid.command(["tost", "study", name, "--size", size, *count], changes, out),
    }  # fmt: skip

    def draw(path: Path) -> None:
        study_figure(rows, study.plot, f"{name}: {study.about}", result["title"], path)

    return grid.leave(out, name, made, records, {name: rows, f"{name}-summary": short}, draw, result)


def title(records: Sequence[Mapping[str, Any]]) -> str:
    """Network, data, length and seeds of the runs, for a figure."""
    if not records:
        return ""
    recipe = records[-1]["cell"]["recipe"]
    data, seeds = recipe["data"], len({r["labels"]["seed"] for r in records if r["labels"]})
    images = f" ({data['limit']:,} images)" if data["limit"] else ""
    names = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
    return (
        f"{recipe['model']} on {names.get(data['name'], data['name'])}{images}, {recipe['duration']}, "
        f"{seeds} seed{'s' if seeds > 1 else ''}"
    )
