"""`tost reproduce` and `tost study`: grids of runs, which go on where they were stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tost_plugins.errors import TostError
from tost_plugins.lab.cli.arguments import (
    CpusOption,
    DryRunOption,
    GpusOption,
    JobsOption,
    JsonOption,
    RayOption,
    SeedsOption,
    SetOption,
    show,
    show_plan,
    workers,
)
from tost_plugins.lab.progress import progress

_TABLES = "table2, table3, table4, table5, or table2-cifar100, table2-resnet50, table2-resnet50-cifar100."


def reproduce(
    name: Annotated[str, typer.Argument(metavar="TABLE", help=_TABLES)],
    protocol: Annotated[str, typer.Option(help="full (as published), short (a GPU in minutes) or cpu.")] = "short",
    masks: Annotated[list[str], typer.Option(help="Only these, like random,snip (repeatable).")] = [],
    sparsities: Annotated[list[str], typer.Option(help="Only these, in percent, like 95,98.")] = [],
    seeds: SeedsOption = 3,
    jobs: JobsOption = None,
    ray: RayOption = None,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    set_: SetOption = [],
    out_dir: Annotated[Path | None, typer.Option("--out", help="The folder; default: runs/TABLE-PROTOCOL.")] = None,
    dry_run: DryRunOption = False,
    finished: Annotated[bool, typer.Option("--finished", help="Show what is done so far, and train nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a table of the ToST paper and print ours beside the published numbers; what was stopped goes on by itself."""
    from tost_plugins.lab import reproduce as tables
    from tost_plugins.lab.report import table

    folder, where = out_dir or Path(f"runs/{name}-{protocol}"), workers(jobs, ray, cpus, gpus)
    chosen = (protocol, _listed(masks), _percents(sparsities), set_, seeds)
    if dry_run:
        return show_plan(as_json, tables.plan(tables.cells(name, *chosen), folder, where))
    with progress(as_json) as listen:
        result = tables.run(name, folder, *chosen, where, listen, train=not finished)
    show(
        as_json,
        {key: result[key] for key in ("study", "about", "title", "paper", "left", "summary")},
        table(f"{result['about']}: test accuracy (%), mean (std over seeds)", tables.shown(result["summary"])),
        *tables.notes(result),
        f"picture: {folder}/{name}.png   table: {folder}/{name}.csv, {name}.json",
    )


def _listed(values: list[str]) -> list[str]:
    """The names in options that may be repeated and may hold several, with commas between them."""
    return [name.strip() for value in values for name in value.split(",") if name.strip()]


def _percents(values: list[str]) -> list[float]:
    try:
        return [float(value) for value in _listed(values)]
    except ValueError:
        raise TostError(f"--sparsities: expected percents, got {', '.join(values)!r}; write 95,98") from None


class _Names(TyperGroup):
    """`tost study NAME` is `tost study run NAME`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        named = bool(args) and args[0] not in self.commands and not args[0].startswith("-")
        return super().resolve_command(ctx, ["run", *args] if named else args)


study = typer.Typer(help="The figures and tables of both papers: tost study NAME (see tost study list).",
                    no_args_is_help=True, cls=_Names)  # fmt: skip


@study.command("run")
def study_run(
    name: Annotated[str, typer.Argument(help="A study of `tost study list`.")],
    size: Annotated[str, typer.Option(help="smoke (digits), cpu (a part of CIFAR-10) or paper.")] = "smoke",
    out_dir: Annotated[Path | None, typer.Option("--out", help="The folder; default: runs/study-NAME-SIZE.")] = None,
    jobs: JobsOption = None,
    ray: RayOption = None,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds; default: the size's own.")] = None,
    set_: SetOption = [],
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a study: its grid of runs (those in --out are not run again), then table, JSON and figure in --out."""
    from tost_plugins.lab import grid
    from tost_plugins.lab.report import table
    from tost_plugins.lab.studies import registry as studies

    folder, where = out_dir or Path(f"runs/study-{name}-{size}"), workers(jobs, ray, cpus, gpus)
    if dry_run:
        return show_plan(as_json, grid.outlook(studies.cells(name, size, set_, seeds), folder, where))
    with progress(as_json) as listen:
        result = studies.run(name, folder, size, set_, seeds, where, listen)
    rows = result["summary"]
    show(
        as_json,
        {key: result[key] for key in ("study", "title", "summary")},
        *([table(f"{result['about']} ({result['title']})", rows)] if len(rows) <= 60 else []),
        f"paper: {result['paper']}",
        f"picture: {folder}/{name}.png   tables: {folder}/{name}.csv, {name}-summary.csv",
    )


@study.command("list")
def study_list(as_json: JsonOption = False) -> None:
    """Every study: what it looks at, and how many runs it takes at each size."""
    from tost_plugins.lab.report import table
    from tost_plugins.lab.studies import registry as studies

    rows = [{"name": name, "about": study.about, **{size: len(studies.cells(name, size)) for size in studies.BASES}}
            for name, study in studies.STUDIES.items()]  # fmt: skip
    show(as_json, rows, table("studies (and how many runs they take)", rows))


@study.command("report")
def study_report(
    folder: Annotated[Path, typer.Argument(help="A folder with studies in it, or in the folders below.")],
    target: Annotated[Path | None, typer.Option("--out", help="The page; default: report.html in the folder.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Put the figures and tables of a folder into one HTML page that needs nothing else."""
    from tost_plugins.lab.page import page

    result = page(folder, target or folder / "report.html")
    show(as_json, result, f"{result['studies']} studies: {result['page']}")
