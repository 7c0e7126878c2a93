"""An optimizer tried out: another one of the same kind and settings trains a small parameter, and what it does is looked at."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing random, printed, warned of, compiled or recorded for gradients stays of what happens inside."""
    level = logging.root.manager.disable
    with (
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        torch.compiler.set_stance("force_eager"),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        torch.manual_seed(0)
        try:
            yield
        finally:
            logging.disable(level)


def group_of(optimizer: Any, weight: nn.Parameter) -> dict[str, Any]:
    """The settings of a weight's group, without its parameters."""
    group = next(g for g in optimizer.param_groups if any(param is weight for param in g["params"]))
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def twin(optimizer: Any, weight: nn.Parameter, probe: nn.Parameter, **changed: Any) -> Any:
    """An optimizer of `probe` alone, made as that of `weight` was, as far as its group, its attributes and its class's
    arguments tell. Raises whatever the class raises."""
    settings = group_of(optimizer, weight) | changed
    for key, value in settings.items():
        if isinstance(value, Tensor):  # a learning rate for CUDA graphs; others count steps
            settings[key] = value.item() if key in ("lr", "initial_lr") else value.detach().cpu().clone()
    settings |= {"capturable": False} if "capturable" in settings else {}  # of CUDA graphs
    arguments = dict(list(inspect.signature(type(optimizer)).parameters.items())[1:])  # the first are the parameters
    known = {name: settings.get(name, getattr(optimizer, name, arguments)) for name in arguments}
    given = {
        name: value for name, value in known.items() if value is not arguments and name not in ("defaults", "state")
    }
    needed = {name for name, argument in arguments.items() if argument.default is argument.empty}
    groups = [{**settings, "params": [probe]}]
    made = _first_of(
        lambda: type(optimizer)(groups, **given),
        lambda: type(optimizer)(groups, **{name: value for name, value in given.items() if name in needed}),
        lambda: type(optimizer)([(settings.get("name", "weight"), probe)], **given),  # made from named parameters
    )
    getattr(made, "train", lambda: None)()  # schedule-free optimizers ask for it
    return made


def wave(shape: list[int] | torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of both signs, the same each time, without a pattern in rows or columns."""
    count = torch.Size(shape).numel()
    return (torch.arange(1, count + 1).double() ** 2 * 0.7345).sin().view(torch.Size(shape)).to(dtype)


def take_step(optimizer: Any, probe: nn.Parameter, slope: Tensor, keep: Tensor) -> None:
    """A step of the twin at a loss whose gradient is about `slope` at the entries `keep`, and 0 elsewhere: by the gradient
    alone or, where that is an error, with its graph (second-order optimizers), or by a closure."""

    def loss(graph: bool = True) -> Tensor:
        probe.grad = None
        with torch.enable_grad():
            value = ((slope * probe + 0.05 * probe**2) * keep).sum()
            value.backward(create_graph=graph)
        return value

    def plain(graph: bool) -> None:
        loss(graph)
        optimizer.step()

    before = probe.detach().clone()

    def again(step: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: (probe.copy_(before), step())

    _first_of(lambda: plain(False), again(lambda: plain(True)), again(lambda: optimizer.step(loss)))


def _first_of(*ways: Callable[[], Any]) -> Any:
    """What the first way gives that is no error; raises the last way's."""
    for way in ways[:-1]:
        with contextlib.suppress(Exception):
            return way()
    return ways[-1]()
