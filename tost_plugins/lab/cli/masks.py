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
    from tost_plugins.files.atomic import check_end
    from tost_plugins.lab.train import find_mask

    check_end(target, ".safetensors", tell=False)  # before it takes its time; `save` tells
    mask = find_mask(recipe_of(recipe, set_))
    mask.save(target)
    _show_mask(mask, target, as_json)


@app.command("inspect")
def inspect(
    path: Annotated[Path, typer.Argument(help="A mask file, or any checkpoint.")],
    recipe: Annotated[
        str | None, typer.Option(help="The recipe of its network: show also what the mask connects.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Or its network, by the name that a recipe would have.")] = None,
    side: Annotated[int, typer.Option(help="The side of an image, with --model.")] = 32,
    target: Annotated[Path | None, typer.Option("--picture", help="Draw live and dead per layer.")] = None,
    set_: SetOption = [],
    as_json: JsonOption = False,
) -> None:
    """Show what a mask keeps, layer by layer, and with --recipe or --model which of it lies on a path through the network."""
    from tost_plugins.errors import TostError
    from tost_plugins.lab import wiring
    from tost_plugins.masks import Mask

    mask, found = Mask.load(path), None
    if recipe is not None and model is not None:
        raise TostError("mask inspect: expected one network, got --recipe and --model; leave one away")
    if recipe is not None:
        found = wiring.of_recipe(mask, recipe_of(recipe, set_))
    elif model is not None:
        found = wiring.of_model(mask, model, side)
    elif target is not None:
        raise TostError("mask inspect: expected the mask's network beside --picture, got none; add --recipe or --model")
    mask = mask if found is None else Mask({name: mask[name] for name in found.live})
    title = _show_mask(mask, path, as_json, found)
    if target is not None:
        wiring.picture(wiring.layer_rows(mask, found), title, target)


@app.command("convert")
def convert(
    path: Annotated[Path, typer.Argument(help="A mask in any format, or a sparse checkpoint.")],
    target: TargetArg,
    as_json: JsonOption = False,
) -> None:
    """Write any mask (pruning state dict, dict of tensors, zeros of a checkpoint) as our packed file, with its card."""
    from tost_plugins.masks import Mask

    mask = Mask.load(path)
    mask.save(target)
    _show_mask(mask, target, as_json)


@app.command("card")
def card(
    path: Annotated[Path, typer.Argument(help="A mask file, or any checkpoint.")], as_json: JsonOption = False
) -> None:
    """Print the card of a mask: method, settings, seed, data, what is kept and live, versions; what is not known is left out."""
    from tost_plugins.masks import Mask
    from tost_plugins.masks.card import text

    found = Mask.load(path).card(path.name)
    show(as_json, found, text(found))


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


def _show_mask(mask: Any, path: Path, as_json: bool, found: Any = None) -> str:
    """Print a mask, and what it connects where that is known; returns the title."""
    from tost_plugins.lab.report import table
    from tost_plugins.lab.wiring import layer_rows

    rows = layer_rows(mask, found)
    values = {"path": str(path), "sparsity": mask.sparsity, "kept": mask.kept, "size": mask.size, "layers": rows}
    title = f"{path}: {mask.kept:,} of {mask.size:,} weights kept, sparsity {mask.sparsity:.4f}"
    if found is not None:
        live = found.live_count
        values |= {"live": live, "effective_sparsity": 1 - live / mask.size, "connected": found.connected,
                   "ends": found.ends, "not_run": list(found.unseen), "not_followed": list(found.lost)}  # fmt: skip
        title += f"; {live:,} live, effective sparsity {1 - live / mask.size:.4f}"
        title += (
            "" if found.connected else f"; no path from the inputs to the outputs: the last one ends at {found.ends}"
        )
    shown = rows if found is None else [  # what fits into a terminal
        {"layer": row["layer"].removesuffix(".weight"), "shape": row["shape"], "kept": row["kept"], "live": row["live"],
         "dead channels": f"{row['dead_channels']} of {row['channels']}"} for row in rows]  # fmt: skip
    show(as_json, values, table(title, shown))
    return title
