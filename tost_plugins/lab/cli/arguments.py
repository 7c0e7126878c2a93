"""What the commands share: arguments that mean the same in all of them, and how a result is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tost_plugins.errors import TostError
from tost_plugins.lab.progress import duration

if TYPE_CHECKING:
    from tost_plugins.lab.grid import Cluster
    from tost_plugins.recipe.recipe import Recipe

RecipeArg = Annotated[str, typer.Argument(help="A shipped recipe's name, or the path of a YAML file.")]
TargetArg = Annotated[Path, typer.Argument(help="The file to write.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a key, like mask.sparsity=0.95 (repeatable).")
]
SeedsOption = Annotated[int, typer.Option(help="How many seeds, from the recipe's on.")]
JobsOption = Annotated[
    int | None, typer.Option("--jobs", help="How many runs side by side; default: 1, with --ray all that have room.")
]
RayOption = Annotated[
    str | None, typer.Option("--ray", metavar="ADDRESS", help="Run on a Ray cluster: auto, local or HOST:PORT.")
]
CpusOption = Annotated[float | None, typer.Option("--cpus-per-cell", help="With --ray: of each run; default: 1.")]
GpusOption = Annotated[
    float | None,
    typer.Option("--gpus-per-cell", help="With --ray: of each run, like 0.25; default: 1 if there are any."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say how many runs there are, and train nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

_out = Console()


def recipe_of(name: str, changes: list[str]) -> Recipe:
    """The recipe that RecipeArg and SetOption stand for."""
    from tost_plugins.recipe.recipe import Recipe, apply_changes, read

    return Recipe.from_dict(apply_changes(read(name), changes), f"recipe {name}")


def workers(jobs: int | None, ray: str | None, cpus: float | None, gpus: float | None) -> int | Cluster:
    """What JobsOption, RayOption, CpusOption and GpusOption stand for: how many runs side by side, or a cluster."""
    if ray is None:
        for name, value in (("--cpus-per-cell", cpus), ("--gpus-per-cell", gpus)):
            if value is not None:
                raise TostError(f"{name}: expected --ray ADDRESS beside it, got none; runs on this machine take --jobs")
        return 1 if jobs is None else jobs
    from tost_plugins.lab.grid import Cluster

    return Cluster(ray, 1 if cpus is None else cpus, gpus, jobs)


def show(as_json: bool, values: Any, *lines: Any) -> None:
    """Print the values as JSON, or else the lines, which may be tables, for people; text as it is, whatever is in it."""
    if as_json:
        print(json.dumps(values, indent=1))
        return
    for line in lines:
        _out.print(line, highlight=False, markup=False, soft_wrap=isinstance(line, str))


def show_plan(as_json: bool, plan: dict[str, Any]) -> None:
    """Print how many runs a grid has, and how long those that are left take."""
    time = "how long is known after the first" if plan["seconds"] is None else f"about {duration(plan['seconds'])}"
    several = plan.get("trainings", 0) > plan["cells"]
    rounds = f" ({plan['trainings']} trainings with the rounds of tickets)" if several else ""
    left = f"{plan['left']} left: {time if plan['left'] else 'nothing to do'}"
    show(as_json, plan, f"{plan['cells']} runs{rounds}, {left}")
