"""What a network does with its layers: which norm reads which convolution, which is the stem, where relu is called.

The network is run once on a copy without storage (the `meta` device), so nothing is computed and nothing changes.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tost_plugins.training.functions import RELUS
from tost_plugins.training.params import plain_modules

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_RELUS = (nn.ReLU, nn.ReLU6)
_SIZES = (32, 64, 224, 8)


@dataclass
class Trace:
    """`reader[conv]` is the path of the norm that reads this convolution's output, unchanged, at each of its calls;
    `order` lists the convolutions as they run; `relu_callers` are the modules whose own forward calls relu as a function."""

    reader: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    relu_callers: list[str] = field(default_factory=list)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises (batch, group, layer or instance norm of any library), and does nothing heavier."""
    heavy = any(isinstance(child, (*CONVOLUTIONS, nn.Linear)) for child in module.modules())
    return "norm" in type(module).__name__.lower() and not heavy


def trace(model: nn.Module) -> Trace | None:
    """Run a storage-free copy of the model on made-up images and record its layers; None when it cannot be run so."""
    try:
        twin = _without_storage(model)
    except Exception:
        return None
    first = next((m for _, m in plain_modules(twin) if isinstance(m, CONVOLUTIONS)), None)
    if first is None:
        return _attempt(twin, torch.zeros(1, _features(twin), device="meta"))
    dims = first.weight.ndim - 2
    for size in _SIZES:
        image = torch.zeros((2, first.in_channels, *[size] * dims), device="meta", dtype=first.weight.dtype)
        found = _attempt(twin, image)
        if found is not None:
            return found
    return None


def pairs(model: nn.Module) -> tuple[dict[str, str | None], str | None]:
    """Convolution -> the norm that reads it (None: no norm), for all convolutions, and the path of the stem.

    Where the network cannot be traced, the norm that follows among the convolution's siblings is taken.
    """
    modules = dict(plain_modules(model))
    convs = [path for path, module in modules.items() if isinstance(module, CONVOLUTIONS)]
    found = trace(model)
    if found is None or not found.order:
        return {path: _sibling(modules, path) for path in convs}, (convs[0] if convs else None)
    return {path: found.reader.get(path) for path in convs if path in found.order}, found.order[0]


def _without_storage(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {
        id(param): nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=False)
        for param in model.parameters()
    }
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    twin = copy.deepcopy(model, memo).eval()
    for module in twin.modules():  # hooks are copied as they are: they would show the user what is not real
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    return twin


def _features(model: nn.Module) -> int:
    return next((m.in_features for m in model.modules() if isinstance(m, nn.Linear)), 1)


def _calls(model: nn.Module, image: Tensor) -> Iterator[Callable[[], Any]]:
    yield lambda: model(image)
    yield lambda: model(pixel_values=image)
    yield lambda: model((image, torch.zeros(len(image), dtype=torch.long, device="meta")))
    yield lambda: model({"pixel_values": image, "labels": torch.zeros(len(image), dtype=torch.long, device="meta")})


def _attempt(model: nn.Module, image: Tensor) -> Trace | None:
    for run in _calls(model, image):
        record = Trace()
        with contextlib.suppress(Exception), torch.no_grad(), _recording(model, record), _without_traces():
            run()
            return record
    return None


@contextlib.contextmanager
def _without_traces() -> Iterator[None]:
    """A failed attempt is no news, and random numbers that a forward pass draws are put back."""
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class _FindRelus(TorchFunctionMode):
    """Records the innermost module around each functional relu; `inside` ends with None in an nn.ReLU's own forward."""

    def __init__(self, record: Trace, inside: list[str | None]) -> None:
        super().__init__()
        self.record, self.inside = record, inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        caller = self.inside[-1]
        if func in RELUS and caller is not None and caller not in self.record.relu_callers:
            self.record.relu_callers.append(caller)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _recording(model: nn.Module, record: Trace) -> Iterator[None]:
    made_by: list[tuple[Tensor, str]] = []  # holds the tensors, so that an id is never used twice
    readers: list[tuple[str, str]] = []
    inside: list[str | None] = [None]
    handles = []

    def conv_hook(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            record.order.append(path)
            made_by.append((output, path))

        return hook

    def norm_hook(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            source = next((conv for tensor, conv in made_by if args and tensor is args[0]), None)
            if source is not None:
                readers.append((source, path))

        return hook

    def enter_hook(path: str | None) -> Callable[..., None]:
        return lambda *_: inside.append(path)

    def leave_hook(*_: Any) -> None:
        inside.pop()

    for path, module in plain_modules(model):
        handles.append(module.register_forward_pre_hook(enter_hook(None if isinstance(module, _RELUS) else path)))
        handles.append(module.register_forward_hook(leave_hook))
        if isinstance(module, CONVOLUTIONS):
            handles.append(module.register_forward_hook(conv_hook(path)))
        elif is_norm(module):
            handles.append(module.register_forward_pre_hook(norm_hook(path)))
    try:
        with _FindRelus(record, inside):
            yield
    finally:
        for handle in handles:
            handle.remove()
    norms = {norm for _, norm in readers}
    for conv in dict.fromkeys(record.order):
        # a convolution with a norm per call, as detection heads have, hands its input over to none of them
        found = [norm for source, norm in readers if source == conv]
        if len(set(found)) == 1 and len(found) == record.order.count(conv) and found[0] in norms:
            record.reader[conv] = found[0]
            norms.discard(found[0])  # a norm that several convolutions share serves the first


def _sibling(modules: dict[str, nn.Module], path: str) -> str | None:
    parent, _, name = path.rpartition(".")
    siblings = list(modules[parent].named_children())
    after = siblings[[child for child, _ in siblings].index(name) + 1 :]
    for child, module in after:
        if isinstance(module, CONVOLUTIONS):
            return None
        if is_norm(module):
            return f"{parent}.{child}" if parent else child
    return None
