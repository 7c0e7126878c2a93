"""Packed files of networks: read into a network that has been built as usual, made smaller where the file's is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tost_plugins.channels import sizes
from tost_plugins.errors import TostError
from tost_plugins.files.packed import Packed, read_packed
from tost_plugins.training.params import clean_name, some


def load_packed(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a file of `tost export --packed` or `--compact` into a network that has been built as usual, and return it.

    A compact file makes the network's layers smaller first. Every tensor of the network is in the file, and none else;
    otherwise, and where a shape or the file does not fit, raises TostError, and the network is as it was.

    Example:
        >>> import tempfile
        >>> from tost_plugins.files.packed import save_packed
        >>> path, net = Path(tempfile.mkdtemp()) / "net.safetensors", nn.Linear(100, 2)
        >>> _ = net.weight.data[:, 2:].zero_()
        >>> save_packed(path, net.state_dict())
        >>> path.stat().st_size < 4 * 202, torch.equal(load_packed(nn.Linear(100, 2), path).weight, net.weight)
        (True, True)
    """
    found = read_packed(path)
    try:
        _fits(model, found)
    except TostError as error:
        raise error.at(f"packed file {path}") from None
    for name, module in _named(model, found.sizes).items():
        now = {key: size for key, (_, size) in found.sizes[name].items()}
        sizes.resize(module, now, f"{name}.bias".removeprefix(".") in found.tensors)
    with torch.no_grad():
        for name, tensor in _state(model).items():
            tensor.copy_(found.tensors[name])
    return model


def _named(model: nn.Module, names: Mapping[str, Any]) -> dict[str, nn.Module]:
    modules = {clean_name(f"{path}.")[:-1]: module for path, module in model.named_modules()}
    return {name: modules[name] for name in names if name in modules}


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {clean_name(name): tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def _fits(model: nn.Module, found: Packed) -> None:
    """Raise TostError unless the file's tensors are those of the network."""
    shapes = {name: tuple(tensor.shape) for name, tensor in _state(model).items()}
    modules = _named(model, found.sizes)
    for name, pairs in found.sizes.items():
        usual, now = ({key: pair[i] for key, pair in pairs.items()} for i in (0, 1))
        if name not in modules or sizes.sizes(modules[name]) not in (usual, now) or not usual:
            raise TostError(f"expected a layer {name} with {usual}, got none; build the network that was exported")
        try:
            own = sizes.shapes(modules[name], now)
        except ValueError as error:
            raise TostError(f"expected sizes for {name}, got others ({error}); export it again") from None
        full = {key: f"{name}.{key}".removeprefix(".") for key in own}
        added = [
            key for key in ("bias",) if full[key] in found.tensors and f"{name}.weight".removeprefix(".") in shapes
        ]
        shapes |= {full[key]: own[key] for key in own if full[key] in shapes or key in added}
    missing, more = [n for n in shapes if n not in found.tensors], [n for n in found.tensors if n not in shapes]
    if missing or more:
        which = f"not {some(missing, 3)}" if missing else f"{some(more, 3)} too"
        raise TostError(f"expected the tensors of this network, got {which}; build the network that was exported")
    for name, shape in shapes.items():
        if tuple(found.tensors[name].shape) != shape:
            raise TostError(
                f"expected shape {shape} for {name}, got {tuple(found.tensors[name].shape)}; build the network that was "
                f"exported, with as many classes and channels"
            )
