"""`tost mask` and `tost export`: masks and checkpoints, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tost_plugins.lab.cli.arguments import JsonOption, RecipeArg, SetOption, TargetArg, recipe_of, show

app = typer.Typer(help="Find, look at and convert masks.", no_args_is_help=True)


@app.command("find")
def find(recipe: RecipeArg, target: TargetArg, set_: SetOption = [], as_json: JsonOption = False) -> None:
    """Find the mask of a recipe, on its model and data, without training."""
    from tost_plugins.lab.train import find_mask

    mask = find_mask(recipe_of(recipe, set_))
    mask.save(target)
    _show_mask(mask, target, as_json)


@app.command("inspect")
def inspect(
    path: Annotated[Path, typer.Argument(help="A mask file, or any checkpoint.")], as_json: JsonOption = False
) -> None:
    """Show what a mask keeps, layer by layer."""
    from tost_plugins.masks import Mask

    _show_mask(Mask.load(path), path, as_json)


@app.command("convert")
def convert(
    path: Annotated[Path, typer.Argument(help="A mask in any format, or a sparse checkpoint.")],
    target: TargetArg,
    as_json: JsonOption = False,
) -> None:
    """Write any mask (pruning state dict, dict of tensors, zeros of a checkpoint) as our packed file."""
    from tost_plugins.masks import Mask

    mask = Mask.load(path)
    mask.save(target)
    _show_mask(mask, target, as_json)


def export(
    source: Annotated[Path, typer.Argument(help="A run's folder, or a checkpoint of any trainer.")],
    target: TargetArg,
    unfinished: Annotated[bool, typer.Option(help="Also from a checkpoint where ghosts were still at work.")] = False,
    compact: Annotated[bool, typer.Option("--compact", help="Without the channels that no path runs through.")] = False,
    onnx: Annotated[bool, typer.Option("--onnx", help="For ONNX Runtime and others, compared with PyTorch.")] = False,
    pt2: Annotated[bool, typer.Option("--pt2", help="For torch.export.load, compared with PyTorch.")] = False,
    packed: Annotated[bool, typer.Option("--packed", help="Bits and what is not 0: for load_packed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint into the plain sparse network: its own keys, no ghosts, exact zeros. With --compact, --onnx or --pt2
    from a run's folder, whose recipe says what network it is."""
    from tost_plugins.errors import wrong
    from tost_plugins.lab.export import export as run

    forms = [name for name, asked in (("onnx", onnx), ("pt2", pt2), ("packed", packed)) if asked]
    if len(forms) > 1:
        raise wrong("tost export", "one of --onnx, --pt2, --packed", " ".join(forms), "write one file after the other")
    result = run(source, target, unfinished, forms[0] if forms else "safetensors", compact)  # type: ignore[arg-type]
    what = f"{result['tensors']} tensors, sparsity {result['sparsity']:.4f} over {result['layers']} layers"
    more = f", {result['parameters']:,} parameters" if "parameters" in result else ""
    more += f", logits apart by {result['difference']:.1e} at most" if "difference" in result else ""
    show(as_json, result, f"{result['source']} -> {result['out']}: {what}{more}, {result['bytes']:,} bytes")


def _show_mask(mask: Any, path: Path, as_json: bool) -> None:
    from tost_plugins.lab.report import table

    rows = [{"layer": name, "shape": "x".join(map(str, keep.shape)), "kept": int(keep.sum()),
             "density": f"{int(keep.sum()) / keep.numel():.4f}"} for name, keep in mask.items()]  # fmt: skip
    values = {"path": str(path), "sparsity": mask.sparsity, "kept": mask.kept, "size": mask.size, "layers": rows}
    title = f"{path}: {mask.kept:,} of {mask.size:,} weights kept, sparsity {mask.sparsity:.4f}"
    show(as_json, values, table(title, rows))
