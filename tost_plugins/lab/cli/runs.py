"""`tost train`, `compare`, `lottery` and `superpose`: a recipe is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tost_plugins.lab.cli.arguments import (
    CpusOption,
    GpusOption,
    JobsOption,
    JsonOption,
    RayOption,
    RecipeArg,
    ResumeOption,
    SeedsOption,
    SetOption,
    recipe_of,
    show,
    workers,
)
from tost_plugins.lab.progress import progress


def train(
    recipe: RecipeArg,
    set_: SetOption = [],
    out_dir: Annotated[Path, typer.Option("--out", help="The run's folder.")] = Path("runs/train"),
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe and leave the plain sparse network, its mask and its history in --out."""
    from tost_plugins.files.locks import alone
    from tost_plugins.lab.train import train as run

    content = recipe_of(recipe, set_)
    with alone(out_dir), progress(as_json) as listen:
        result = run(content, out_dir, resume, listen=listen)
    show(
        as_json,
        result,
        f"test accuracy {result['test_accuracy']:.2f} % at sparsity {result['sparsity']:.4f} "
        f"({result['active_parameters']:,} of {result['total_parameters']:,} parameters)",
        f"network: {out_dir}/model.safetensors   mask: {out_dir}/mask.safetensors",
    )


def compare(
    recipe: RecipeArg,
    set_: SetOption = [],
    seeds: SeedsOption = 3,
    out_dir: Annotated[Path, typer.Option("--out", help="The comparison's folder.")] = Path("runs/compare"),
    jobs: JobsOption = None,
    ray: RayOption = None,
    cpus: CpusOption = None,
    gpus: GpusOption = None,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a recipe with and without its tweaks, on the same masks and seeds; table, CSV and picture in --out."""
    from tost_plugins.lab import report
    from tost_plugins.lab.compare import compare as run

    content, where = recipe_of(recipe, set_), workers(jobs, ray, cpus, gpus)
    with progress(as_json) as listen:
        result = run(content, out_dir, seeds, resume, listen, where)
    rows = report.comparison_rows(result)
    report.write_csv(out_dir / "comparison.csv", rows)
    report.comparison_figure(result, out_dir / "comparison.png")
    show(
        as_json,
        {key: result[key] for key in ("rows", "mean", "std")},
        report.table("test accuracy (%): plain sparse training, ToST, and the difference in points", rows),
        f"picture: {out_dir}/comparison.png   table: {out_dir}/comparison.csv",
    )


def speed(
    recipe: RecipeArg,
    set_: SetOption = [],
    out_dir: Annotated[Path, typer.Option("--out", help="Where speed.json and speed.png go.")] = Path("runs/speed"),
    as_json: JsonOption = False,
) -> None:
    """Train a recipe dense, sparse and compact, step by step in turn: what a step takes in each, and that weights agree."""
    from tost_plugins.lab.report import table
    from tost_plugins.lab.speed import speed as run

    content = recipe_of(recipe, set_)
    with progress(as_json) as listen:
        result = run(content, out_dir, listen)
    shown = [{"network": r["network"], "ms_per_step": 1000 * r["seconds_per_step"], "to_dense": r["to_dense"],
              "test_accuracy": r["test_accuracy"]} for r in result["rows"]]  # fmt: skip
    show(
        as_json,
        result,
        table(f"{result['steps']} steps in turn, sparsity {result['sparsity']:.4f}", shown),
        f"{result['dead_channels']:.0%} of the channels are on no path, and compact steps do without them; after 5 steps in "
        f"float64 the sparse and the compact network agree to {result['weights_differ']:.1e}",
        f"picture: {out_dir}/speed.png",
    )


def lottery(
    recipe: RecipeArg,
    set_: SetOption = [],
    out_dir: Annotated[Path, typer.Option("--out", help="The folder of the rounds.")] = Path("runs/lottery"),
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find lottery tickets: train, prune the smallest weights, rewind, again; a mask and a line of a table per round."""
    from tost_plugins.files.locks import alone
    from tost_plugins.lab.lottery import lottery as run
    from tost_plugins.lab.report import table

    content = recipe_of(recipe, set_)
    with alone(out_dir), progress(as_json) as listen:
        rows = run(content, out_dir, resume, listen)
    shown = [{**row, "sparsity": f"{row['sparsity']:.4f}", "kept_weights": f"{row['kept_weights']:,}"} for row in rows]
    show(
        as_json,
        {"rows": rows},
        table("lottery tickets, round by round (accuracy in %)", shown),
        f"masks: {out_dir}/round-*/mask.safetensors   table: {out_dir}/lottery.csv",
    )


def superpose(
    recipe: RecipeArg,
    set_: SetOption = [],
    out_dir: Annotated[Path, typer.Option("--out", help="The folder of the run and its tickets.")] = Path(
        "runs/superpose"
    ),
    cycles: Annotated[int, typer.Option(help="How many tickets.")] = 3,
    share: Annotated[float, typer.Option(help="The part of the run's steps that all cycles take.")] = 0.1,
    explore: Annotated[float, typer.Option(help="The share of the weights that move where a cycle begins.")] = 0.5,
    low: Annotated[float, typer.Option(help="The learning rate at a cycle's ends, in the recipe's.")] = 0.01,
    high: Annotated[float, typer.Option(help="The learning rate in a cycle's middle, in the recipe's.")] = 0.05,
    resume: ResumeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Sup-tickets: end a run of a moving mask with short cycles, and superpose the networks that they lead to."""
    from tost_plugins.files.locks import alone
    from tost_plugins.lab.report import table
    from tost_plugins.lab.superpose import Cycles
    from tost_plugins.lab.superpose import superpose as run

    content, spent = recipe_of(recipe, set_), Cycles(cycles, share, explore, low, high)
    with alone(out_dir), progress(as_json) as listen:
        rows = run(content, out_dir, spent, resume, listen)
    shown = [{**row, "sparsity": f"{row['sparsity']:.4f}", "kept_weights": f"{row['kept_weights']:,}"} for row in rows]
    show(
        as_json,
        {"rows": rows},
        table("the run, its tickets and what they make together (accuracy in %)", shown),
        f"network: {out_dir}/model.safetensors   mask: {out_dir}/mask.safetensors",
    )
