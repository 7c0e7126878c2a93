"""Networks that transformers writes under other names than they have: ViT, Swin, SegFormer, DETR and others."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from tost_plugins.errors import TostError
from tost_plugins.files.atomic import read_json
from tost_plugins.training.log import say
from tost_plugins.training.optional import package
from tost_plugins.training.params import clean_name

_CONFIG = "config.json"
_COUNTS = ("layer", "depth", "block", "stage", "group", "expert", "num_")
_MANY, _LARGE = 4096, 10**9  # of what _COUNTS names, and any other number in a config


def own_names(model: nn.Module) -> dict[str, list[str]]:
    """Name that transformers writes -> the names in the model, where they differ; several for a weight that is shared and
    written once. {} for a model of another kind.

    Example:
        >>> own_names(nn.Linear(2, 2))
        {}
    """
    loading = sys.modules.get("transformers.core_model_loading")
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    if not isinstance(model, kind):
        return {}
    own = model.state_dict()
    revert = getattr(loading, "revert_weight_conversion", None)  # of transformers 5
    written = own if revert is None else revert(model, own)
    names: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    found = {name: list(names[id(tensor)]) for name, tensor in written.items() if id(tensor) in names}
    for name, first in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        there = next((written_as for written_as, here in found.items() if first in here), None)
        if there is not None and name in own and name not in found[there]:
            found[there].append(name)
    return {clean_name(name): [*map(clean_name, here)] for name, here in found.items() if [*here] != [name]}


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, list[str]]) -> dict[str, Tensor]:
    """The tensors under the names of the model, where they have those that transformers writes.

    Example:
        >>> list(renamed({"output.dense.weight": torch.ones(1), "head": torch.ones(1)}, {"output.dense.weight": ["fc2.weight"]}))
        ['fc2.weight', 'head']
    """
    own = {name for here in names.values() for name in here}
    if sum(name in names for name in tensors) <= sum(name in own for name in tensors if name not in names):
        return dict(tensors)  # they have the model's own names
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for here in names.get(name, [name]):
            found.setdefault(here, tensor)
    return found


def names_beside(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What `own_names` says of the network that the `config.json` beside a file (or in a folder) tells of; {} where there is
    none, and, with one line, where no such network can be made, whose file then keeps its names."""
    config = (path if path.is_dir() else path.parent) / _CONFIG
    if not config.is_file():
        return {}
    about = read_json(config)
    if not isinstance(about.get("model_type"), str) or not isinstance(about.get("architectures"), list):
        return {}
    try:
        _check_size(about, max(_MANY, len(tensors)))
        with _at_most(_MANY + 10 * len(tensors)):
            return own_names(_made(config.parent, about))
    except Exception as error:  # a stranger's config makes transformers raise anything
        say(f"{path}: names are those in the file, since its network cannot be made ({type(error).__name__}: {error})")
        return {}


def _made(folder: Path, about: dict[str, Any]) -> nn.Module:
    """The network that a config tells of, without numbers; nothing is fetched, and no code but transformers' own is run."""
    transformers = package("transformers", "names of its network", "tost_plugins[transformers]")
    quiet = logging.getLogger("transformers")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        kind = getattr(transformers, str(about["architectures"][0]), None)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            raise TostError(f"expected a network of transformers, got {about['architectures'][0]!r}")
        with torch.device("meta"), contextlib.redirect_stderr(io.StringIO()):
            return kind(config)
    finally:
        quiet.setLevel(level)


def _check_size(about: Any, most: int) -> None:
    """Raise TostError for numbers of layers that would take time without end."""
    left: list[tuple[str, Any]] = [("", about)]
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, each) for each in value]
        elif isinstance(value, int | float) and abs(value) > (most if any(word in key for word in _COUNTS) else _LARGE):
            raise TostError(f"expected a network of a usual size, got {key} {value}")


@contextlib.contextmanager
def _at_most(most: int) -> Iterator[None]:
    """Raise TostError when more parts than this are put into modules."""
    parts = itertools.count()

    def count(*_: Any) -> None:
        if next(parts) > most:
            raise TostError(f"expected a network of the size of the file, got one of more than {most} parts")

    hooks = [register_module_parameter_registration_hook(count), register_module_module_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
