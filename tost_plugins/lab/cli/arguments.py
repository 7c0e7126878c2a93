"""What the commands share: arguments that mean the same in all of them, and how a result is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tost_plugins.lab.progress import duration

if TYPE_CHECKING:
    from tost_plugins.recipe.recipe import Recipe

RecipeArg = Annotated[str, typer.Argument(help="A shipped recipe's name, or the path of a YAML file.")]
TargetArg = Annotated[Path, typer.Argument(help="The file to write.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a key, like mask.sparsity=0.95 (repeatable).")
]
SeedsOption = Annotated[int, typer.Option(help="How many seeds, from the recipe's on.")]
JobsOption = Annotated[int, typer.Option("--jobs", help="How many runs side by side.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say how many runs there are, and train nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

_out = Console()


def recipe_of(name: str, changes: list[str]) -> Recipe:
    """The recipe that RecipeArg and SetOption stand for."""
    from tost_plugins.recipe.recipe import Recipe, apply_changes, read

    return Recipe.from_dict(apply_changes(read(name), changes), f"recipe {name}")


def show(as_json: bool, values: Any, *lines: Any) -> None:
    """Print the values as JSON, or else the lines, which may be tables, for people."""
    if as_json:
        print(json.dumps(values, indent=1))
        return
    for line in lines:
        _out.print(line, highlight=False)


def show_plan(as_json: bool, plan: dict[str, Any]) -> None:
    """Print how many runs a grid has, and how long those that are left take."""
    time = "how long is known after the first" if plan["seconds"] is None else f"about {duration(plan['seconds'])}"
    several = plan.get("trainings", 0) > plan["cells"]
    rounds = f" ({plan['trainings']} trainings with the rounds of tickets)" if several else ""
    left = f"{plan['left']} left: {time if plan['left'] else 'nothing to do'}"
    show(as_json, plan, f"{plan['cells']} runs{rounds}, {left}")
