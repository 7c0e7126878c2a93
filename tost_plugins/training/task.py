"""What a mask method or an initialisation may see of a training run, and how it looks without leaving a trace."""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tost_plugins.errors import TostError
from tost_plugins.training import rng
from tost_plugins.training.batches import walk
from tost_plugins.training.calling import CRITERION, FORWARD, call, check_callable, loss_of, own_loss
from tost_plugins.training.functions import checkpoints_run_once, eager
from tost_plugins.training.params import clean_name, device_of, prunable
from tost_plugins.training.reading import Batches, generators, reading

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """A model, its prunable weights, and optionally batches and a loss: all that a method is given.

    Nothing here changes the model: it runs on copies of its weights, its buffers and the batches. `forward(model, batch)` and
    `criterion(outputs, batch)` are a framework's or a user's own conventions; without them the usual ones are used (`call`),
    and `loss_fn(outputs, labels)`, the loss that the model returns, or cross entropy, in this order (`loss_of`).
    """

    model: nn.Module
    params: Mapping[str, nn.Parameter]
    batches: Iterable[Any] | None = None
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    forward: Callable[[Any, Any], Any] = call
    criterion: Callable[[Any, Any], Tensor] | None = None
    steps: int | None = None  # of the whole run, where that is known
    looked: set[str] = field(default_factory=set)  # which losses were looked at that nobody has given

    def __post_init__(self) -> None:
        check_callable(loss_fn=self.loss_fn, forward=self.forward, criterion=self.criterion)
        if self.forward is None:
            object.__setattr__(self, "forward", call)
        if self.batches is not None:
            object.__setattr__(self, "batches", Batches.of(self.batches, self.device))

    @classmethod
    def of(cls, model: nn.Module, ignore: Sequence[str] = (), **rest: Any) -> Task:
        """The task of a model, with its prunable weights found."""
        return cls(model, prunable(model, ignore), **rest)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return device_of(self.model)

    def take(self, count: int, method: str) -> list[Any]:
        """The first `count` batches on the model's device, fewer if there are fewer; raises TostError without any."""
        if not isinstance(self.batches, Batches):
            raise TostError(f"{method}: expected batches to look at, got None; pass batches=train_dataloader")
        taken = self.batches.take(count)
        if not taken:
            raise TostError(f"{method}: expected at least one batch, got an empty loader; check batch_size, drop_last")
        return taken

    def weights(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Detached copies of all parameters (clean names), which require grad; frozen and tied ones included once."""
        return {
            clean_name(name): param.detach().to(dtype or param.dtype, copy=True).requires_grad_()
            for name, param in self.model.named_parameters()
        }

    def leaves(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The entries of `weights()` for the prunable weights, under the names of `params`.

        A weight that is tied to an embedding has another name among the model's parameters than among the prunable ones.
        """
        names = {id(param): clean_name(name) for name, param in self.model.named_parameters()}
        return {name: weights[names[id(param)]] for name, param in self.params.items()}

    def outputs(
        self, weights: Mapping[str, Tensor], batch: Any, dtype: torch.dtype | None = None, labels: bool | None = None
    ) -> Any:
        """What the model returns on `batch` with these weights in place of its own; buffers are thrown-away copies.

        A network that can take labels, and return its loss, is given them (`labels`) where there is no other loss.
        """
        return self._within(weights, lambda: self._run(batch, labels), dtype)

    def loss_at(
        self, weights: Mapping[str, Tensor], batch: Any, of: Callable[[Any, Any], Tensor] | None = None
    ) -> Tensor:
        """The training loss with these weights (not checked for being finite), or `of(outputs, batch)` in its place."""
        return self._within(weights, lambda: (of or self.loss)(self._run(batch, None if of is None else False), batch))

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """The training loss of these outputs."""
        if self.criterion is not None:
            loss = self._by_criterion(outputs, batch)
        else:
            if self.loss_fn is None:
                self.looked.add("cross entropy" if own_loss(outputs) is None else "the model's own")
            loss = loss_of(outputs, batch, self.model, self.loss_fn)
        return loss.reshape(()) if isinstance(loss, Tensor) and loss.numel() == 1 else loss

    def _by_criterion(self, outputs: Any, batch: Any) -> Tensor:
        assert self.criterion is not None
        try:
            return self.criterion(outputs, batch)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            made = self.criterion if isinstance(self.criterion, FunctionType) else type(self.criterion)
            if made.__module__ not in ("torch.nn.functional", "torch.nn.modules.loss"):
                raise  # the user's own
            raise TostError(
                f"criterion: expected a function of the outputs and the batch, got {made.__name__}, which does not take a "
                f"{type(batch).__name__} ({type(error).__name__}: {error}); {CRITERION}"
            ) from error

    def _run(self, batch: Any, labels: bool | None) -> Any:
        labels = self.loss_fn is None and self.criterion is None if labels is None else labels
        batch = walk(lambda part: part.clone() if isinstance(part, Tensor) else part, batch)  # it may write into them
        try:
            return call(self.model, batch, labels) if self.forward is call else self.forward(self.model, batch)
        except (TostError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's network may raise anything
            if str(error).startswith("Expected more than 1 value per channel when training"):
                raise TostError(
                    f"batch: expected more than 1 value per channel for batch norm in training mode, got "
                    f"{str(error).rpartition('input size ')[2]}; use larger batches, or drop a short last one (drop_last=True)"
                ) from error
            if self.forward is not call:
                raise
            raise TostError(
                f"batch: expected one that {type(self.model).__name__} runs on, got {type(error).__name__} ({error}); {FORWARD}"
            ) from error

    def _within(self, weights: Mapping[str, Tensor], run: Callable[[], T], dtype: torch.dtype | None = None) -> T:
        """What `run` returns while these weights, and copies of the buffers, are in the model."""
        taken = {
            id(param): weights[clean_name(name)]
            for name, param in self.model.named_parameters()
            if clean_name(name) in weights
        }
        for buffer in self.model.buffers():
            taken[id(buffer)] = buffer.to(dtype if dtype and buffer.is_floating_point() else buffer.dtype, copy=True)
        tensors = {
            f"model.{path}.{name}" if path else f"model.{name}": taken[id(tensor)]
            for path, module in self.model.named_modules()  # each module once, tied tensors wherever they are
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if id(tensor) in taken
        }
        # tie_weights would swap a module with two names twice, and so lose its parameters
        return functional_call(_Run(self.model, run), tensors, (), tie_weights=False)


class _Run(nn.Module):
    """Calls a function that calls the model, whose methods and attributes are there for whatever forward a user has given."""

    def __init__(self, model: nn.Module, run: Callable[[], Any]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self) -> Any:
        return self.run()


@contextlib.contextmanager
def untouched(model: nn.Module, batches: Any = None, *, train: bool) -> Iterator[None]:
    """Look at a model in train or eval mode and leave no trace: modes, attributes that a forward pass sets, changes or fills,
    random generators and the loader (the task's batches) return, and gradient checkpointing runs nothing a second time.

    Weights, gradients and buffers are safe because `Task` works on copies.
    """
    modes = [(module, module.training) for module in model.modules()]
    own = [undo for module in model.modules() for undo in generators(module)]
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    seen: set[int] = set()
    own += [
        undo
        for _, held in attributes
        for name, value in held.items()
        if name not in _OWN
        for undo in _undo(value, seen)
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(reading(batches, device_of(model)))
        stack.enter_context(rng.aside(device_of(model)))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(eager())
        stack.enter_context(_plain_recurrent(model))
        stack.enter_context(checkpoints_run_once())
        try:
            model.train(train)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for undo in own:
                undo()
            for now, before in attributes:
                for name in now.keys() - before.keys():
                    del now[name]
                now.update(before)


#: What every module has, and a look puts back in other ways.
_OWN = frozenset(vars(nn.Module()))
_FILLED = (list, set, deque, dict, OrderedDict, defaultdict, Counter)


def _undo(value: Any, seen: set[int]) -> Iterator[Callable[[], Any]]:
    """What gives an attribute back what it held: a tensor that is no buffer its numbers, where they were written into; a list, a
    dict or a set its entries, and these what they held."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if type(value) in _FILLED:
        yield partial(_refill, value, value.copy())
    if type(value) in (*_FILLED, tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _undo(entry, seen)
    elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not value.is_inference():
        before, version = value.detach().clone(), value._version
        yield lambda: None if value._version == version else value.detach().copy_(before)


def _refill(held: Any, before: Any) -> None:
    held.clear()
    (held.extend if isinstance(held, (list, deque)) else held.update)(before)


@contextlib.contextmanager
def _plain_recurrent(model: nn.Module) -> Iterator[None]:
    """Run recurrent layers without cuDNN, where they have gradients in train mode only, and no second ones."""
    before = torch.backends.cudnn.enabled
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before
