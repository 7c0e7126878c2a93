"""The `tost` command. No logic here: each command reads its arguments, calls the library and shows the result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from tost_plugins.lab.progress import duration, progress

if TYPE_CHECKING:
    from tost_plugins.recipe.recipe import Recipe

app = typer.Typer(help="Sparse training that works: masks, ToST's tweaks, recipes.", no_args_is_help=True,
                  add_completion=False, pretty_exceptions_enable=False)  # fmt: skip
masks_app = typer.Typer(help="Find, look at and convert masks.", no_args_is_help=True)


class _Names(TyperGroup):
    """`tost study NAME` is `tost study run NAME`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        named = bool(args) and args[0] not in self.commands and not args[0].startswith("-")
        return super().resolve_command(ctx, ["run", *args] if named else args)


study_app = typer.Typer(help="The figures and tables of both papers: tost study NAME (see tost study list).",
                        no_args_is_help=True, cls=_Names)  # fmt: skip
recipes_app = typer.Typer(help="The recipes that come with the library.", no_args_is_help=True)
app.add_typer(masks_app, name="mask")
app.add_typer(recipes_app, name="recipes")
app.add_typer(study_app, name="study")

_TABLES = "table2, table3, table4, table5, or table2-cifar100, table2-resnet50, table2-resnet50-cifar100."

RecipeArg = Annotated[str, typer.Argument(help="A shipped recipe's name, or the path of a YAML file.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a key, like mask.sparsity=0.95 (repeatable).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
JobsOption = Annotated[int, typer.Option("--jobs", help="How many runs side by side.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]

out = Console()


@app.command()
def train(
    recipe: RecipeArg,
    set_: SetOption = [],  # noqa: B006 (typer reads it)
    out_dir: Annotated[Path, typer.Option("--out", help="The run's folder.")] = Path("runs/train"),
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe and leave the plain sparse network, its mask and its history in --out."""
    from tost_plugins.lab.train import train as run

    content = _recipe(recipe, set_)
    with progress(as_json) as listen:
        result = run(content, out_dir, resume, listen=listen)
    if as_json:
        return _print_json(result)
    out.print(
        f"test accuracy [bold]{result['test_accuracy']:.2f} %[/] at sparsity {result['sparsity']:.4f} "
        f"({result['active_parameters']:,} of {result['total_parameters']:,} parameters)"
    )
    out.print(f"network: {out_dir}/model.safetensors   mask: {out_dir}/mask.safetensors", highlight=False)


@app.command()
def compare(
    recipe: RecipeArg,
    set_: SetOption = [],  # noqa: B006
    seeds: Annotated[int, typer.Option(help="How many seeds, from the recipe's on.")] = 3,
    out_dir: Annotated[Path, typer.Option("--out", help="The comparison's folder.")] = Path("runs/compare"),
    jobs: JobsOption = 1,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe with and without its tweaks, on the same masks and seeds; table, CSV and picture in --out."""
    from tost_plugins.lab import report
    from tost_plugins.lab.compare import compare as run

    content = _recipe(recipe, set_)
    with progress(as_json) as listen:
        result = run(content, out_dir, seeds, resume, listen, jobs)
    rows = report.comparison_rows(result)
    report.write_csv(out_dir / "comparison.csv", rows)
    report.comparison_figure(result, out_dir / "comparison.png")
    if as_json:
        return _print_json({key: result[key] for key in ("rows", "mean", "std")})
    out.print(report.table("test accuracy (%): plain sparse training, ToST, and the difference in points", rows))
    out.print(f"picture: {out_dir}/comparison.png   table: {out_dir}/comparison.csv", highlight=False)


@app.command()
def lottery(
    recipe: RecipeArg,
    set_: SetOption = [],  # noqa: B006
    out_dir: Annotated[Path, typer.Option("--out", help="The folder of the rounds.")] = Path("runs/lottery"),
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find lottery tickets: train, prune the smallest weights, rewind, again; a mask and a line of a table per round."""
    from tost_plugins.lab import report
    from tost_plugins.lab.lottery import lottery as run

    content = _recipe(recipe, set_)
    with progress(as_json) as listen:
        rows = run(content, out_dir, resume, listen)
    if as_json:
        return _print_json({"rows": rows})
    shown = [{**row, "sparsity": f"{row['sparsity']:.4f}", "kept_weights": f"{row['kept_weights']:,}"} for row in rows]
    out.print(report.table("lottery tickets, round by round (accuracy in %)", shown))
    out.print(f"masks: {out_dir}/round-*/mask.safetensors   table: {out_dir}/lottery.csv", highlight=False)


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(metavar="TABLE", help=_TABLES)],
    protocol: Annotated[str, typer.Option(help="full (as published), short (a GPU in minutes) or cpu.")] = "short",
    masks: Annotated[list[str], typer.Option(help="Only these, like random,snip (repeatable).")] = [],  # noqa: B006
    sparsities: Annotated[list[str], typer.Option(help="Only these, in percent, like 95,98.")] = [],  # noqa: B006
    seeds: Annotated[int, typer.Option(help="How many seeds, from the recipe's on.")] = 3,
    jobs: JobsOption = 1,
    set_: SetOption = [],  # noqa: B006
    out_dir: Annotated[Path | None, typer.Option("--out", help="The folder; default: runs/TABLE-PROTOCOL.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many runs there are, and train nothing.")] = False,
    finished: Annotated[bool, typer.Option("--finished", help="Show what is done so far, and train nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a table of the ToST paper and print ours beside the published numbers; what was stopped goes on by itself."""
    from tost_plugins.lab import reproduce as tables
    from tost_plugins.lab.report import table

    folder = out_dir or Path(f"runs/{name}-{protocol}")
    chosen = (protocol, tables.listed(masks), tables.percents(sparsities), set_, seeds)
    if dry_run:
        plan = tables.plan(tables.cells(name, *chosen), folder, jobs)
        return _print_json(plan) if as_json else out.print(_outlook(plan), highlight=False)
    with progress(as_json) as listen:
        result = tables.run(name, folder, *chosen, jobs, listen, train=not finished)
    if as_json:
        return _print_json({key: result[key] for key in ("study", "about", "title", "paper", "left", "summary")})
    out.print(table(f"{result['about']}: test accuracy (%), mean (std over seeds)", tables.shown(result["summary"])))
    for line in tables.notes(result):
        out.print(line, highlight=False)
    out.print(f"picture: {folder}/{name}.png   table: {folder}/{name}.csv, {name}.json", highlight=False)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint of any trainer.")],
    target: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    unfinished: Annotated[bool, typer.Option(help="Also from a checkpoint where ghosts were still at work.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint into the plain sparse network: its own keys, no ghosts, exact zeros."""
    from tost_plugins.lab.export import export as run

    result = run(source, target, unfinished)
    if as_json:
        return _print_json(result)
    out.print(
        f"{result['source']} -> {result['out']}: {result['tensors']} tensors, sparsity "
        f"{result['sparsity']:.4f} over {result['layers']} layers",
        highlight=False,
    )


@masks_app.command("find")
def mask_find(
    recipe: RecipeArg,
    target: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    set_: SetOption = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Find the mask of a recipe, on its model and data, without training."""
    from tost_plugins.lab.train import find_mask

    mask = find_mask(_recipe(recipe, set_))
    mask.save(target)
    _show_mask(mask, target, as_json)


@masks_app.command("inspect")
def mask_inspect(
    path: Annotated[Path, typer.Argument(help="A mask file, or any checkpoint.")], as_json: JsonOption = False
) -> None:
    """Show what a mask keeps, layer by layer."""
    from tost_plugins.masks import Mask

    _show_mask(Mask.load(path), path, as_json)


@masks_app.command("convert")
def mask_convert(
    path: Annotated[Path, typer.Argument(help="A mask in any format, or a sparse checkpoint.")],
    target: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    as_json: JsonOption = False,
) -> None:
    """Write any mask (pruning state dict, dict of tensors, zeros of a checkpoint) as our packed file."""
    from tost_plugins.masks import Mask

    mask = Mask.load(path)
    mask.save(target)
    _show_mask(mask, target, as_json)


@recipes_app.command("list")
def recipes_list(as_json: JsonOption = False) -> None:
    """Name and source of every shipped recipe."""
    from tost_plugins.lab.report import table
    from tost_plugins.recipe.recipe import Recipe, shipped

    recipes = [Recipe.load(name) for name in shipped()]
    rows = [{"name": r.name, "mask": f"{r.mask.kind} {getattr(r.mask, 'sparsity', None) or ''}".strip(),
             "model": r.model, "data": r.data.name, "duration": str(r.duration)} for r in recipes]  # fmt: skip
    if as_json:
        return _print_json(rows)
    out.print(table("recipes", rows))


@recipes_app.command("show")
def recipes_show(recipe: RecipeArg, set_: SetOption = [], as_json: JsonOption = False) -> None:  # noqa: B006
    """Print a recipe with every default filled in."""
    found = _recipe(recipe, set_)
    if as_json:
        return _print_json(found.to_dict())
    print(found.to_yaml(), end="")


@recipes_app.command("schema")
def recipes_schema(as_json: JsonOption = False) -> None:
    """Print the JSON schema of recipes, for editors to complete from."""
    from tost_plugins.recipe.recipe import Recipe

    _print_json(Recipe.model_json_schema())


@study_app.command("run")
def study_run(
    name: Annotated[str, typer.Argument(help="A study of `tost study list`.")],
    size: Annotated[str, typer.Option(help="smoke (digits), cpu (a part of CIFAR-10) or paper.")] = "smoke",
    out_dir: Annotated[Path | None, typer.Option("--out", help="The folder; default: runs/study-NAME-SIZE.")] = None,
    jobs: JobsOption = 1,
    seeds: Annotated[int | None, typer.Option(help="How many seeds; default: the size's own.")] = None,
    set_: SetOption = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many runs there are, and train nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a study: its grid of runs (those in --out are not run again), then table, JSON and figure in --out."""
    from tost_plugins.lab import grid
    from tost_plugins.lab.report import table
    from tost_plugins.lab.studies import registry as studies

    folder = out_dir or Path(f"runs/study-{name}-{size}")
    if dry_run:
        plan = grid.outlook(studies.cells(name, size, set_, seeds), folder, jobs)
        return _print_json(plan) if as_json else out.print(_outlook(plan), highlight=False)
    with progress(as_json) as listen:
        result = studies.run(name, folder, size, set_, seeds, jobs, listen)
    if as_json:
        return _print_json({key: result[key] for key in ("study", "title", "summary")})
    if len(result["summary"]) <= 60:
        out.print(table(f"{result['about']} ({result['title']})", result["summary"]))
    out.print(f"paper: {result['paper']}", highlight=False)
    out.print(f"picture: {folder}/{name}.png   tables: {folder}/{name}.csv, {name}-summary.csv", highlight=False)


@study_app.command("list")
def study_list(as_json: JsonOption = False) -> None:
    """Every study: what it looks at, and how many runs it takes at each size."""
    from tost_plugins.lab.report import table
    from tost_plugins.lab.studies import registry as studies

    rows = [{"name": name, "about": study.about, **{size: len(studies.cells(name, size)) for size in studies.BASES}}
            for name, study in studies.STUDIES.items()]  # fmt: skip
    if as_json:
        return _print_json(rows)
    out.print(table("studies (and how many runs they take)", rows))


@study_app.command("report")
def study_report(
    folder: Annotated[Path, typer.Argument(help="A folder with studies in it, or in the folders below.")],
    target: Annotated[Path | None, typer.Option("--out", help="The page; default: report.html in the folder.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Put the figures and tables of a folder into one HTML page that needs nothing else."""
    from tost_plugins.lab.page import page

    result = page(folder, target or folder / "report.html")
    if as_json:
        return _print_json(result)
    out.print(f"{result['studies']} studies: {result['page']}", highlight=False)


def main() -> None:
    """Run the command line; a TostError is one line on stderr and exit status 1."""
    from click.exceptions import Abort

    try:
        app()
    except (KeyboardInterrupt, Abort):
        sys.exit(130)
    except Exception as error:
        from tost_plugins.errors import TostError
        from tost_plugins.lab.job import Stopped

        if isinstance(error, Stopped):
            Console(stderr=True).print(
                f"{error}; the same command goes on (train, compare, lottery: with --resume)", highlight=False
            )
            sys.exit(130)
        if isinstance(error, TostError):
            print(f"tost: {error}", file=sys.stderr)
            sys.exit(1)
        raise


def _recipe(name: str, changes: list[str]) -> Recipe:
    from tost_plugins.recipe.recipe import Recipe, apply_changes, read

    return Recipe.from_dict(apply_changes(read(name), changes), f"recipe {name}")


def _outlook(plan: dict[str, Any]) -> str:
    time = "how long is known after the first" if plan["seconds"] is None else f"about {duration(plan['seconds'])}"
    rounds = (
        f" ({plan['trainings']} trainings with the rounds of tickets)"
        if plan.get("trainings", 0) > plan["cells"]
        else ""
    )
    return f"{plan['cells']} runs{rounds}, {plan['left']} left: {time if plan['left'] else 'nothing to do'}"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _show_mask(mask: Any, path: Path, as_json: bool) -> None:
    from tost_plugins.lab.report import table

    rows = [{"layer": name, "shape": "x".join(map(str, keep.shape)), "kept": int(keep.sum()),
             "density": f"{int(keep.sum()) / keep.numel():.4f}"} for name, keep in mask.items()]  # fmt: skip
    if as_json:
        return _print_json({"path": str(path), "sparsity": mask.sparsity, "kept": mask.kept, "size": mask.size,
                            "layers": rows})  # fmt: skip
    out.print(table(f"{path}: {mask.kept:,} of {mask.size:,} weights kept, sparsity {mask.sparsity:.4f}", rows))
