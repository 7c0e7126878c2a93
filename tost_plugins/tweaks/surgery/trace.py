"""What a network does with its layers: which norm reads which convolution, which is the stem, where relu is called.

The network is run once on a copy without storage (the `meta` device), so nothing is computed and nothing changes.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tost_plugins.training.functions import RELUS, eager
from tost_plugins.training.params import plain_modules

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_RELUS = (nn.ReLU, nn.ReLU6)
_SIZES = (32, 64, 224, 8)


@dataclass
class Trace:
    """`reader[conv]` is the path of the norm that reads this convolution's output, unchanged, at each of its calls;
    `order` lists the convolutions as they run; `relu_callers` are the modules whose own forward calls relu as a function;
    `reached` says of convolutions, nn.ReLUs and relu callers whether gradients pass through their results."""

    reader: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    relu_callers: list[str] = field(default_factory=list)
    reached: dict[str, bool] = field(default_factory=dict)

    def note(self, path: str, output: Tensor) -> None:
        """Count gradients that pass; without any runs a checkpointed part too, which trains all the same."""
        self.reached[path] = self.reached.get(path, False) or output.requires_grad or not torch.is_grad_enabled()


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


def pairs(model: nn.Module, found: Trace | None) -> dict[str, str | None]:
    """Convolution -> the norm that reads it (None: no norm), for all that run; for all there are where nobody knows."""
    if found is None or not found.order:
        return dict.fromkeys(path for path, module in plain_modules(model) if isinstance(module, CONVOLUTIONS))
    return {path: found.reader.get(path) for path, _ in plain_modules(model) if path in found.order}


def _without_storage(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {
        id(param): nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
        for param in model.parameters()
    }
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in model.buffers()}
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():  # hooks are copied as they are: they would show the user what is not real
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_fit)
    return twin


def _fit(linear: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A network that flattens works at one size of images only; what it does with them is the same at any other."""
    if not args or args[0].shape[-1] == linear.in_features:
        return None
    return (args[0].sum(-1, keepdim=True).expand(*args[0].shape[:-1], linear.in_features), *args[1:])


def _features(model: nn.Module) -> int:
    return next((m.in_features for m in model.modules() if isinstance(m, nn.Linear)), 1)


def _calls(model: nn.Module, image: Tensor) -> Iterator[Callable[[], Any]]:
    yield lambda: model(image)
    yield lambda: model(pixel_values=image)
    yield lambda: model((image, torch.zeros(len(image), dtype=torch.long, device="meta")))
    yield lambda: model({"pixel_values": image, "labels": torch.zeros(len(image), dtype=torch.long, device="meta")})


def _attempt(model: nn.Module, image: Tensor) -> Trace | None:
    for run in _calls(model, image):
        found = _observe(model.eval(), run)
        if found is not None:
            training = _observe(model.train(), run)
            return found if training is None else _agreed(found, training)
    return None


def _observe(model: nn.Module, run: Callable[[], Any]) -> Trace | None:
    record = Trace()
    with contextlib.suppress(Exception), torch.enable_grad(), eager(), _recording(model, record), _without_traces():
        run()
        return record
    return None


def _agreed(found: Trace, training: Trace) -> Trace:
    """What holds in eval and in train mode."""
    for conv, norm in list(found.reader.items()):
        if conv in training.order and training.reader.get(conv) != norm:
            del found.reader[conv]
    found.relu_callers += [path for path in training.relu_callers if path not in found.relu_callers]
    found.reached |= {path: found.reached.get(path, False) or passes for path, passes in training.reached.items()}
    return found


@contextlib.contextmanager
def _without_traces() -> Iterator[None]:
    """A failed attempt is no news, and random numbers that a forward pass draws are put back."""
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    python, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        random.setstate(python)
        np.random.set_state(numpy_state)


class _FindRelus(TorchFunctionMode):
    """Records the innermost module around each functional relu; `inside` ends with None in an nn.ReLU's own forward."""

    def __init__(self, record: Trace, inside: list[str | None]) -> None:
        super().__init__()
        self.record, self.inside = record, inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, caller = func(*args, **(kwargs or {})), self.inside[-1]
        if func in RELUS and caller is not None:
            self.record.note(caller, out)
            if caller not in self.record.relu_callers:
                self.record.relu_callers.append(caller)
        return out


@contextlib.contextmanager
def _recording(model: nn.Module, record: Trace) -> Iterator[None]:
    made_by: list[tuple[Tensor, str]] = []  # holds the tensors, so that an id is never used twice
    readers: list[tuple[str, str]] = []
    inside: list[str | None] = [None]
    handles = []

    def conv_hook(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            record.note(path, output)
            record.order.append(path)
            made_by.append((output, path))

        return hook

    def norm_hook(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for tensor, conv in made_by:
                if (
                    args and tensor is args[0] and tensor.shape == getattr(output, "shape", None)
                ):  # some turn channels over
                    readers.append((conv, path))

        return hook

    def enter_hook(path: str | None) -> Callable[..., None]:
        return lambda *_: inside.append(path)

    def leave_hook(path: str | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            inside.pop()
            if path is not None:
                record.note(path, output)

        return hook

    for path, module in plain_modules(model):
        relu = isinstance(module, _RELUS)
        handles.append(module.register_forward_pre_hook(enter_hook(None if relu else path)))
        handles.append(module.register_forward_hook(leave_hook(path if relu else None)))
        if isinstance(module, CONVOLUTIONS):
            handles.append(module.register_forward_hook(conv_hook(path)))
        elif is_norm(module):
            handles.append(module.register_forward_hook(norm_hook(path)))
    try:
        with _FindRelus(record, inside):
            yield
    finally:
        for handle in handles:
            handle.remove()
    _pair(record, readers)


def _pair(record: Trace, readers: list[tuple[str, str]]) -> None:
    norms = {norm for _, norm in readers}
    for conv in dict.fromkeys(record.order):
        # a convolution with a norm per call, as detection heads have, hands its input over to none of them
        found = [norm for source, norm in readers if source == conv]
        if len(set(found)) == 1 and len(found) == record.order.count(conv) and found[0] in norms:
            record.reader[conv] = found[0]
            norms.discard(found[0])  # a norm that several convolutions share serves the first
