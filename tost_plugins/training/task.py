"""What a mask method or an initialisation may see of a training run, and how it looks without leaving a trace."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tost_plugins.errors import TostError
from tost_plugins.training.params import clean_name, device_of, prunable

#: Keys of a dict batch that hold the labels, the first that is there.
LABELS = ("labels", "label", "target", "targets", "y")


def call(model: Callable[..., Any], batch: Any) -> Any:
    """The usual ways to call a network on a batch: `model(**batch)`, `model(batch[0])` or `model(batch)`."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0]) if isinstance(batch, (tuple, list)) else model(batch)


def logits_of(outputs: Any) -> Tensor:
    """The class scores in what a network returned: the tensor itself, or its `logits`."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if logits is None:
        raise TostError(
            f"outputs: expected a tensor or something with `logits`, got {type(outputs).__name__}; "
            f"pass a loss function that takes these outputs"
        )
    return logits


def labels_of(batch: Any) -> Tensor:
    """The labels of a batch: the second of a pair, or the entry `labels`, `label`, `target(s)` or `y` of a dict."""
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1]
    found = [batch[key] for key in LABELS if key in batch] if isinstance(batch, Mapping) else []
    if not found:
        raise TostError(
            f"batch: expected a pair (inputs, labels) or a dict with labels, got {type(batch).__name__}; "
            f"pass batches with labels"
        )
    return found[0]


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        values = [to_device(value, device) for value in batch]
        return (
            type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
        )  # a named tuple takes them singly
    return batch


def check_batches(batches: Any) -> None:
    """Raise TostError unless `batches` can be iterated again and again: a DataLoader or a list, not an iterator."""
    if iter(batches) is batches:
        raise TostError(
            f"batches: expected something that can be read twice, got a one-shot {type(batches).__name__}; "
            f"pass the DataLoader itself or a list of batches"
        )
    try:
        empty = len(batches) == 0
    except TypeError:  # no length, such as a DataLoader of an IterableDataset
        empty = False
    if empty:
        raise TostError("batches: expected at least one batch, got an empty loader; check batch_size and drop_last")


@dataclass(frozen=True)
class Task:
    """A model, its prunable weights, and optionally batches and a loss: all that a method is given.

    Nothing here changes the model: `outputs` runs it on copies of its weights and buffers. `forward(call, batch)` and
    `criterion(outputs, batch)` are a framework's own conventions; without them the usual ones are used, and
    `loss_fn(logits, labels)`, the loss that the model returns, or cross entropy, in this order.
    """

    model: nn.Module
    params: Mapping[str, nn.Parameter]
    batches: Iterable[Any] | None = None
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    forward: Callable[[Callable[..., Any], Any], Any] = call
    criterion: Callable[[Any, Any], Tensor] | None = None

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
        if self.batches is None:
            raise TostError(f"{method}: expected batches to look at, got None; pass batches=train_dataloader")
        check_batches(self.batches)
        taken = []
        for batch in self.batches:
            taken.append(to_device(batch, self.device))
            if len(taken) == count:
                break
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

    def outputs(self, weights: Mapping[str, Tensor], batch: Any, dtype: torch.dtype | None = None) -> Any:
        """What the model returns on `batch` with these weights in place of its own; buffers are thrown-away copies."""
        taken = {
            id(param): weights[clean_name(name)]
            for name, param in self.model.named_parameters()
            if clean_name(name) in weights
        }
        for buffer in self.model.buffers():
            taken[id(buffer)] = buffer.to(dtype if dtype and buffer.is_floating_point() else buffer.dtype, copy=True)
        tensors = {
            f"{path}.{name}" if path else name: taken[id(tensor)]
            for path, module in self.model.named_modules()  # each module once, tied tensors wherever they are
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if id(tensor) in taken
        }
        try:
            # tie_weights would swap a module with two names twice, and so lose its parameters
            return self.forward(lambda *a, **k: functional_call(self.model, tensors, a, k, tie_weights=False), batch)
        except ValueError as error:
            if not str(error).startswith("Expected more than 1 value per channel when training"):
                raise
            raise TostError(
                f"batch: expected more than 1 value per channel for batch norm in training mode, got "
                f"{str(error).rpartition('input size ')[2]}; use larger batches, or drop a short last one (drop_last=True)"
            ) from error

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """The training loss of these outputs (not checked for being finite)."""
        if self.criterion is not None:
            return self.criterion(outputs, batch)
        if self.loss_fn is not None:
            return self.loss_fn(logits_of(outputs), labels_of(batch))
        own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        return own if own is not None else F.cross_entropy(logits_of(outputs), labels_of(batch))


@contextlib.contextmanager
def untouched(model: nn.Module, batches: Any = None, *, train: bool) -> Iterator[None]:
    """Look at a model in train or eval mode and leave no trace: modes, RNG states and the loader's generators return.

    Weights, gradients and buffers are safe because `Task.outputs` works on copies.
    """
    modes = [(module, module.training) for module in model.modules()]
    python, numpy_state = random.getstate(), np.random.get_state()
    batch_sampler = getattr(batches, "batch_sampler", None)
    sharded = getattr(batch_sampler, "batch_sampler", None)  # Accelerate's share of one rank wraps the sampler of all
    owners = (batches, batch_sampler, *(getattr(part, "sampler", None) for part in (batches, batch_sampler, sharded)))
    generators = [g for g in (getattr(owner, "generator", None) for owner in owners) if isinstance(g, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    reading = getattr(batches, "gradient_state", None)  # Accelerate's loaders count epochs, and who is being read
    before = None if reading is None else (batches.iteration, reading.dataloader_references)
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), _eager():
            _seed(device)
            model.train(train)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(python)
        np.random.set_state(numpy_state)
        if reading is not None and before is not None:
            batches.iteration, reading.dataloader_references = before
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _seed(device: torch.device) -> None:
    """Dropout inside a score must not depend on what ran before. Only generators that `untouched` puts back are seeded:
    `torch.manual_seed` would reach those of all devices, and of ones that are not in use yet."""
    torch.default_generator.manual_seed(0)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Run compiled forwards as they were written: a compiled one has no second derivative, and would compile anew."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
