"""Functions that a network calls, and others in their place: what modules cannot show."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tost_plugins.errors import TostError

#: Every spelling of a functional relu -> its cap (None: without).
RELUS: dict[Callable[..., Any], float | None] = {
    F.relu: None, F.relu_: None, torch.relu: None, torch.relu_: None, Tensor.relu: None, Tensor.relu_: None,
    F.relu6: 6.0,
}  # fmt: skip
#: Those that write into their input without being asked to.
IN_PLACE = (F.relu_, torch.relu_, Tensor.relu_)


class Instead(TorchFunctionMode):
    """Within: other functions in the place of torch's, as `table` has them: function -> what is called with its arguments.

    Example:
        >>> with Instead({torch.relu: torch.abs}):
        ...     torch.relu(torch.tensor(-2.0))
        tensor(2.)
    """

    def __init__(self, table: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.table.get(func, func)(*args, **(kwargs or {}))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    out = F.hardtanh(input / 6 + 0.5, 0.0, 1.0)
    return input.copy_(out) if inplace else out


#: Functions that torch cannot differentiate twice, written with others that it can.
SMOOTHER: dict[Callable[..., Any], Callable[..., Any]] = {F.hardsigmoid: _hardsigmoid}


def eager() -> AbstractContextManager[Any]:
    """Within: compiled forwards run as they were written. A compiled one has no second derivative, calls no hooks of the modules
    in it, and would compile anew."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def checkpoints_run_once() -> Iterator[None]:
    """Within: what `torch.utils.checkpoint.checkpoint` is given is run plainly, and not again in the backward pass, which would
    see the module's own weights and change its statistics."""
    from torch.utils import checkpoint  # brings sympy, a fifth of what torch itself takes to import

    before = {name: getattr(checkpoint, name) for name in _PLAINLY}
    try:
        for name, plainly in _PLAINLY.items():
            setattr(checkpoint, name, plainly)
        yield
    finally:
        for name, value in before.items():
            setattr(checkpoint, name, value)


class _NoCheckpoint:
    """In the place of the autograd function of reentrant checkpoints."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _no_checkpoint(*args: Any, **kwargs: Any) -> Iterator[None]:
    """In the place of what other checkpoints do before the function is called, and after."""
    yield


#: What `checkpoint` looks up when it is called, by whatever name it was imported.
_PLAINLY = {"CheckpointFunction": _NoCheckpoint, "_checkpoint_without_reentrant_generator": _no_checkpoint}


@contextmanager
def backward_only(method: str) -> Iterator[None]:
    """Within: a gradient is taken. A module that runs forward meanwhile, as other libraries' checkpoints have it, would do
    so with its own weights and statistics: raises TostError."""

    def refuse(module: nn.Module, args: Any) -> None:
        raise TostError(
            f"{method}: expected a forward pass that runs once, got {type(module).__name__} run again by gradient checkpointing; "
            f"switch the checkpointing off until the session has started"
        )

    handle = nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
