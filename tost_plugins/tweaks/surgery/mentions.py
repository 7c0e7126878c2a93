"""Which modules call relu as a function, read from their code: for networks that nobody can run on made-up inputs."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from tost_plugins.training.functions import RELUS
from tost_plugins.training.params import plain_modules

_NAMES = {"relu", "relu_", "relu6"}


def relu_callers(model: nn.Module) -> list[str]:
    """The modules whose forward, or what it calls of its own class and file, names a relu, or that hold one of torch's."""
    return [
        path for path, module in plain_modules(model) if not isinstance(module, nn.ReLU | nn.ReLU6) and _calls(module)
    ]


def _calls(module: nn.Module) -> bool:
    held = any(value is relu for value in vars(module).values() for relu in RELUS)
    return held or any(_NAMES & set(code.co_names) for code in _codes(type(module), type(module).forward, set()))


def _codes(cls: type, function: Any, seen: set[Any]) -> Iterator[CodeType]:
    """The code of a function, and of those that it names: methods of its class, functions beside it."""
    if not isinstance(function, FunctionType) or function in seen:
        return
    seen.add(function)
    pending = [function.__code__]
    while pending:
        code = pending.pop()
        yield code
        pending += [const for const in code.co_consts if isinstance(const, CodeType)]
        for name in code.co_names:
            yield from _codes(cls, getattr(cls, name, function.__globals__.get(name)), seen)
