"""A checkpoint of any trainer -> the plain sparse network, without ghosts, masks and prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from tost_plugins.channels.removal import compact as smaller
from tost_plugins.channels.sizes import changed
from tost_plugins.errors import TostError, shown
from tost_plugins.files.atomic import check_end
from tost_plugins.files.containers import read
from tost_plugins.files.folders import locate
from tost_plugins.files.packed import FORMAT as PACKED
from tost_plugins.files.packed import save_packed
from tost_plugins.files.renamed import names_beside, renamed
from tost_plugins.files.tensors import by_clean_name, comparable, write_tensors
from tost_plugins.lab.export_formats import write_onnx, write_pt2
from tost_plugins.lab.export_network import network
from tost_plugins.masks.card import card, write_card
from tost_plugins.masks.layouts import Layout, check_hidden, check_strange, layout, only_0_and_1
from tost_plugins.masks.mask import FORMAT, Mask
from tost_plugins.masks.quantized import check_quantized
from tost_plugins.session import buffers, kinds
from tost_plugins.training.params import prunable
from tost_plugins.tweaks.soft_activation import RELU

#: What `export` can write.
Form = Literal["safetensors", "packed", "onnx", "pt2"]


def export(
    source: str | Path, out: str | Path, unfinished: bool = False, form: Form = "safetensors", compact: bool = False
) -> dict[str, Any]:
    """Write the plain network in `source` to `out` and return what it is: layers, sparsity, parameters.

    `source` is a run folder of `tost train`, or a checkpoint of any kind that docs/formats.md names, a file or a folder; of one
    that transformers has written names are the network's own. Weights outside the mask become exactly 0. A checkpoint from a
    moment when ghosts or soft activations were still at work computes something else than the plain network: a TostError,
    unless `unfinished`.

    "safetensors" is a state dict, "packed" a file for `load_packed`; "onnx" and "pt2" are networks for ONNX Runtime and
    torch.export, compared with PyTorch first. `compact` leaves out channels without a path; that file is for `load_packed`
    too. The last three need a run's folder, whose recipe says what network it is.
    """
    path = find(Path(source))
    try:
        return _export(path, Path(out), unfinished, form, compact)
    except TostError as error:
        raise error.at("export" if str(error).startswith(f"{path}: ") else f"export {path}") from None


def _export(path: Path, out: Path, unfinished: bool, form: Form, compact: bool) -> dict[str, Any]:
    if path.resolve() == out.resolve():
        raise TostError("expected another file to write to, got the checkpoint itself; choose a new name")
    check_end(out, {"onnx": ".onnx", "pt2": ".pt2"}.get(form, ".safetensors"))
    plain, masked = _plain(path, unfinished)
    weights = {name: plain[name] for name in masked} or {n: t for n, t in plain.items() if t.ndim >= 2}
    size = sum(tensor.numel() for tensor in weights.values())
    kept = sum(int(comparable(tensor).count_nonzero()) for tensor in weights.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        more = _write(path, out, plain, form, compact)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, TostError):
            raise
        raise TostError(f"expected tensors that safetensors can hold, got others ({error})") from None
    if weights:
        about, zeros = _about(path, {name: comparable(tensor) != 0 for name, tensor in weights.items()})
        write_card(out, card(zeros, {**about, "form": form, "compact": compact, **more}, out.name, "network"))
    return {"source": str(path), "out": str(out), "tensors": len(plain), "layers": len(weights),
            "sparsity": 1 - kept / size if size else 0.0, "bytes": out.stat().st_size, **more}  # fmt: skip


def _about(path: Path, kept: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the mask beside a run's weights, or above its checkpoints, says of how it was made, and the layers that it has;
    nothing, and all layers, where there is none whose zeros these have. What cannot be read there has nothing to say."""
    for file in [folder / "mask.safetensors" for folder in list(path.resolve().parents)[:3]]:
        try:
            mask = Mask.load(file)
        except TostError:
            continue
        if all(name in kept and _within(kept[name], mask[name]) for name in mask):
            ours = {name: kept[name] for name in mask}
            known = {key: value for key, value in mask.about.items() if key != "live" or mask == Mask(ours)}
            return known, ours
    return {}, kept


def _within(kept: Tensor, mask: Tensor) -> bool:
    return kept.shape == mask.shape and not bool((kept & ~mask).any())


def _write(path: Path, out: Path, plain: dict[str, Tensor], form: Form, compact: bool) -> dict[str, Any]:
    """Write the file; what else there is to say about it."""
    if not compact and form in ("safetensors", "packed"):
        save_packed(out, plain) if form == "packed" else write_tensors(out, plain)
        return {}
    model, images = network(path, plain)
    made = smaller(model, Mask.from_zeros(prunable(model)), images) if compact else model
    more: dict[str, Any] = {"parameters": sum(param.numel() for param in made.parameters())}
    if form in ("safetensors", "packed"):
        save_packed(out, made.state_dict(), changed(model, made), pack=form == "packed")
        return more
    return more | {"difference": (write_onnx if form == "onnx" else write_pt2)(out, made, images)}


def _plain(path: Path, unfinished: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The plain network's tensors, with zeros where a mask says so, and the names of those that have a mask."""
    found = read(path)
    assert found is not None  # `find` has seen it
    tensors, metadata = by_clean_name(found.tensors), found.metadata
    if metadata.get("format") == FORMAT:
        raise TostError("expected a checkpoint, got a mask file, which holds no weights; see tost mask")
    if PACKED in metadata:
        raise TostError("expected a checkpoint, got a file of tost export; load it with tost_plugins.load_packed")
    live = [name for name, value in tensors.items() if _is_live(name, value)]
    if live and not unfinished:
        raise TostError(
            f"expected a checkpoint from after the ghosts have ended, got one with {len(live)} at work ({live[0]} = "
            f"{shown(tensors[live[0]].tolist())}); take a later checkpoint, or pass --unfinished to get the plain network "
            f"as it stands"
        )
    parts = layout({name: tensor for name, tensor in tensors.items() if buffers.is_mask(name) or not _is_ours(name)})
    _check_weights(parts)
    names = names_beside(path, parts.plain)
    plain, masks = renamed(parts.plain, names), renamed(parts.masks, names)
    for name, mask in masks.items():
        if name not in plain or plain[name].shape != mask.shape:
            raise TostError(
                f"expected a weight {name} beside its mask, got none that fits; the checkpoint is not whole"
            )
        # not masked_fill, which knows no floats of 8 bits
        plain[name] = torch.where(comparable(mask) != 0, comparable(plain[name]), 0).to(plain[name].dtype)
    return plain, list(masks)


def _check_weights(parts: Layout) -> None:
    """Raise TostError where there are masks alone, and where a weight is computed from more than itself and its mask."""
    if not parts.masks and all(map(only_0_and_1, parts.plain.values())):
        raise TostError("expected a checkpoint, got masks, and no weights; see tost mask")
    computed = [name for name in parts.hidden if name in parts.masks]
    if computed:
        raise TostError(
            f"expected weights and their masks, got {computed[0]} under more parametrizations than its mask; take them off first "
            f"(torch.nn.utils.parametrize.remove_parametrizations)"
        )
    check_quantized(parts.plain)
    check_hidden(parts)
    check_strange(parts)


def find(source: Path) -> Path:
    """The file or folder with the weights: the source itself, or the newest one in a run's or a checkpoint's folder."""
    try:
        found = locate(source)
    except TostError as error:
        raise error.at("export") from None
    if found is None:
        raise TostError(f"export {source}: expected a checkpoint or a run's folder, got neither; check the path")
    return found


def _is_ours(name: str) -> bool:
    own = (buffers.CLOCK, buffers.CHANGED, kinds.KIND, "tost_beta", "tost_perturbation")
    return buffers.is_beside(name) or ".ghost_skip." in f".{name}" or name.rsplit(".", 1)[-1] in own


def _is_live(name: str, value: Tensor) -> bool:
    if name.endswith("ghost_skip.alpha"):
        return bool((comparable(value) != 0).any())
    return name.rsplit(".", 1)[-1] == "tost_beta" and bool((comparable(value).abs() < RELU * 0.9).any())
