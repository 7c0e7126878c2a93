"""How a network is called on a batch, and where its labels, its class scores and its loss are: what needs no argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tost_plugins.errors import TostError, shown

#: Keys of a dict batch that hold the labels, the first that is there.
LABELS = ("labels", "label", "target", "targets", "y")

FORWARD = "say how the network is called: forward=lambda model, batch: ..."
CRITERION = "say what the loss is: criterion=lambda outputs, batch: ..."
_SCORES = "forward=lambda model, batch: model(batch[0])[0], say"
_HOW = {"forward": FORWARD, "criterion": CRITERION}


def check_callable(*, optional: bool = True, **given: Any) -> None:
    """Raise TostError for what is given as a function (None: nothing is, where that is `optional`) and cannot be called, or is
    the class of a loss in place of one.

    Example:
        >>> try:
        ...     check_callable(loss_fn=torch.nn.CrossEntropyLoss)
        ... except TostError as error:
        ...     print(error)
        loss_fn: expected a function, got the class CrossEntropyLoss; make one: CrossEntropyLoss()
    """
    for name, value in given.items():
        if isinstance(value, type) and issubclass(value, torch.nn.Module):
            raise TostError(
                f"{name}: expected a function, got the class {value.__name__}; make one: {value.__name__}()"
            )
        if not callable(value) and not (optional and value is None):
            remedy = _HOW.get(name, f"pass one, such as {name}=torch.nn.functional.cross_entropy")
            raise TostError(f"{name}: expected a function, got {shown(value)}; {remedy}")


class _Inputs(NamedTuple):
    """What a network's forward takes: names by place, of which the first `required` have no default; names that go by
    keyword alone, and whether it takes any."""

    names: list[str]
    required: int
    keywords: list[str]
    any_name: bool


def call(model: Callable[..., Any], batch: Any, labels: bool = False) -> Any:
    """Run a network on a batch as its forward's signature has it: its inputs are the entries of a dict by name, or the
    first of a tuple, without the labels unless it requires them.

    With `labels` it is given them too where it can take them, so that it returns its loss. A dict may hold more than the
    network takes, and one input under another name. Raises TostError where more than one reading is possible.
    """
    args, kwargs, _ = _arranged(model, batch, labels)
    return model(*args, **kwargs)


def labels_of(batch: Any, model: Any = None) -> Any:
    """The labels of a batch: what follows the network's inputs (with `model`), or the second of a tuple; of a dict the
    entry `labels`, `label`, `target(s)` or `y`, or the one that is called so or that the network does not take."""
    if isinstance(batch, Mapping):
        inputs = None if model is None else _inputs(model)
        found = [batch[key] for key in _label_keys(batch, inputs.names if inputs else [])]
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = [batch[1]] if model is None else list(_arranged(model, batch, False)[2])
    else:
        found = []
    if len(found) != 1:
        got = f"{len(found)} entries that may be labels in a" if found else "a"
        kind = f"{type(batch).__name__} of {list(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise TostError(
            f"batch: expected a pair (inputs, labels) or a dict with labels, got {got} {kind}; "
            f"pass batches with labels, or {CRITERION}"
        )
    return found[0]


def inputs_in(batch: Any, model: Any) -> int:
    """How many of the entries of a tuple are inputs of the network, one at least."""
    return (
        max(1, len(batch) - max(1, len(_arranged(model, batch, False)[2]))) if isinstance(batch, (tuple, list)) else 1
    )


def logits_of(outputs: Any) -> Tensor:
    """The class scores in what a network returned: the tensor itself, or its `logits`."""
    logits = outputs if isinstance(outputs, Tensor) else _entry(outputs, "logits")
    if logits is None:
        raise TostError(
            f"outputs: expected a tensor or something with `logits`, got {_shown(outputs)}; "
            f"pass a loss function that takes these outputs, or {CRITERION}"
        )
    return logits


def main_of(outputs: Any) -> Tensor:
    """As `logits_of`, and of other outputs the entry `out`, as segmentation networks have it, or the only tensor."""
    if isinstance(outputs, Tensor) or _entry(outputs, "logits") is not None:
        return logits_of(outputs)
    parts = list(outputs.values() if isinstance(outputs, Mapping) else outputs) if _many(outputs) else []
    tensors = [part for part in parts if isinstance(part, Tensor) and part.ndim]
    out = _entry(outputs, "out")
    return out if out is not None else tensors[0] if len(tensors) == len(parts) == 1 else logits_of(outputs)


def scores_of(outputs: Any, method: str) -> Tensor:
    """As `main_of`, for a method that looks at the class scores themselves; raises TostError where nobody can tell them."""
    try:
        return main_of(outputs)
    except TostError:
        raise TostError(
            f"{method}: expected a network that returns class scores, got {_shown(outputs)}; return them alone: {_SCORES}"
        ) from None


def loss_of(outputs: Any, batch: Any, model: Any, loss_fn: Callable[..., Tensor] | None) -> Tensor:
    """`loss_fn` of the outputs as they are, or else of the main one, and the labels; without it the loss, or the sum of the
    losses, that the network returned, or cross entropy (with 0.5 times that of an output `aux`, as torchvision trains
    segmentation networks). Raises TostError where none of them is there, or where they do not fit."""
    own = own_loss(outputs) if loss_fn is None else None
    if own is not None:
        return own
    function, labels = loss_fn or cross_entropy, labels_of(batch, model)
    try:
        return function(outputs, labels)
    except Exception as error:  # a user's function may raise anything, and one of class scores does
        if isinstance(error, (TostError, torch.OutOfMemoryError)):
            raise
        try:
            return function(main_of(outputs), labels)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError):
            named = getattr(function, "func", function)
            name = getattr(named, "__name__", type(named).__name__)
            raise TostError(
                f"loss: expected outputs and labels that {name} takes, got {_shown(outputs)} and {_shown(labels)} "
                f"({type(error).__name__}: {error}); pass loss_fn=, or {CRITERION}"
            ) from error


def own_loss(outputs: Any) -> Tensor | None:
    """The loss that a network returned: `loss`, the one number among its outputs, or the sum of a dict of numbers."""
    loss = _entry(outputs, "loss")
    if loss is not None or (isinstance(outputs, Tensor) and outputs.ndim == 0):
        return outputs if loss is None else loss
    parts = list(outputs.values() if isinstance(outputs, Mapping) else outputs) if _many(outputs) else []
    numbers = [part for part in parts if isinstance(part, Tensor) and part.ndim == 0 and part.requires_grad]
    if numbers and len(numbers) < len(parts) and (isinstance(outputs, Mapping) or len(numbers) > 1):
        raise TostError(f"outputs: expected one loss or nothing but losses, got {_shown(outputs)}; {CRITERION}")
    return sum(numbers[1:], numbers[0]) if numbers else None


def cross_entropy(outputs: Any, labels: Tensor, function: Callable[..., Tensor] = F.cross_entropy) -> Tensor:
    """Of the main output, and half of that of `aux`; raises TostError where the labels are no classes, or of no one axis."""
    scores, aux = main_of(outputs), _entry(outputs, "aux")
    if not _of_classes(scores, labels):
        raise TostError(
            f"loss: expected labels that are classes along one axis, for cross entropy, got {_shown(labels)} for "
            f"{_shown(scores)}; pass loss_fn=, or {CRITERION}"
        )
    loss = function(scores, labels)
    return loss if aux is None else loss + 0.5 * function(aux, labels)


def _of_classes(scores: Tensor, labels: Any) -> bool:
    """Whether there are several classes, along an axis that can be told (as many tokens as words: the second, or the last?),
    and the labels are classes or their probabilities, which add up to 1."""
    if not isinstance(labels, Tensor) or (scores.ndim > 1 and scores.shape[1] == 1):
        return False
    if not labels.is_floating_point():
        return scores.ndim != 3 or scores.shape[1] != scores.shape[2]
    return labels.ndim > 1 and bool((labels >= 0).all()) and bool(((labels.sum(1) - 1).abs() < 1e-3).all())


def _arranged(model: Any, batch: Any, labels: bool) -> tuple[tuple, dict[str, Any], tuple]:
    """A network's arguments, by place and by name, and what of the batch is left over: labels."""
    inputs = _inputs(model)
    if isinstance(batch, Mapping):
        return (*_by_name(inputs, batch), ())
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}, ()
    count, names = _how_many(inputs, batch), inputs.names if inputs else []
    given, left = tuple(batch[:count]), tuple(batch[count:])
    if count == len(batch) > 1 and _is_label(names[count - 1 : count]):
        return given, {}, given[-1:]
    if labels and len(left) == 1 and _is_label(names[count : count + 1]):
        return tuple(batch), {}, left
    if count == 1 and _side_by_side(inputs, batch[0]):
        return ((), dict(batch[0]), left) if isinstance(batch[0], Mapping) else (tuple(batch[0]), {}, left)
    return given, {}, left


def _how_many(inputs: _Inputs | None, batch: Any) -> int:
    """How many of the entries of a tuple a network takes as its inputs."""
    count, names = len(batch), inputs.names if inputs else ["input"]
    required = max(inputs.required, 1) if inputs else 1
    if count == 1 or (count == 2 and _side_by_side(inputs, batch[0]) and not _is_label(names[1:2])):
        return 1
    if required in (count - 1, count):
        return required
    if _is_label(names[count - 1 : count]):
        return count - 1  # of which some have a default
    if required < count and required == len(names):
        return required  # which of the rest are the labels is for the loss to say
    raise TostError(f"batch: expected inputs and labels, got {count} entries for {_signature(inputs)}; {FORWARD}")


def _side_by_side(inputs: _Inputs | None, entry: Any) -> bool:
    """Whether an entry of a batch holds the inputs of a network: ((image, table), labels), or the same by their names."""
    if inputs is None:
        return False
    if isinstance(entry, Mapping):
        return {*entry} <= {*inputs.names}
    return isinstance(entry, (tuple, list)) and inputs.required == len(entry) > 1


def _by_name(inputs: _Inputs | None, batch: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if inputs is None or {*batch} <= {*inputs.names, *inputs.keywords}:
        return (), dict(batch)
    known = {name: batch[name] for name in (*inputs.names, *inputs.keywords) if name in batch}
    if inputs.any_name and (known or not inputs.names):
        return (), dict(batch)
    missing = [name for name in inputs.names[: inputs.required] if name not in known]
    if known and not missing:
        return (), known
    if missing == ["batch"]:
        return (batch,), {}
    labels = _label_keys(batch, inputs.names)
    others = [key for key in batch if key not in known and key not in labels]
    wanted = missing or inputs.names[:1]
    if len(wanted) == len(others) == 1:
        return (), {**known, wanted[0]: batch[others[0]]}
    raise TostError(f"batch: expected the entries of {_signature(inputs)}, got {list(batch)}; {FORWARD}")


def _label_keys(batch: Mapping[str, Any], names: list[str]) -> list[str]:
    """The keys that hold labels: by their names, or because they are what the network does not take."""
    usual = [key for key in LABELS if key in batch][:1]
    if usual or (called := [key for key in batch if _is_label([key])]):
        return usual or called
    if any(name in batch for name in names):
        return [key for key in batch if key not in names]
    tensors = {key: part for key, part in batch.items() if isinstance(part, Tensor)}
    whole = [key for key, part in tensors.items() if not part.is_floating_point()]
    return whole if len(whole) == 1 and len(tensors) == 2 else []


def _is_label(names: list[str]) -> bool:
    return any(name in LABELS or "label" in str(name) or "target" in str(name) for name in names)


def _inputs(model: Any) -> _Inputs | None:
    """What the network's own forward takes: wrappers, which pass on whatever they are given, are looked through."""
    own = [vars(model).get("forward")] if hasattr(model, "__dict__") else []
    for forward in (*own, *(vars(cls).get("forward") for cls in type(model).__mro__)):
        try:
            parameters = list(inspect.signature(forward).parameters.values()) if callable(forward) else []
        except (TypeError, ValueError):
            continue
        kinds = {parameter.kind for parameter in parameters}
        if not parameters or Parameter.VAR_POSITIONAL in kinds:
            continue
        named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = named if forward in own else named[1:]  # without self
        keywords = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
        if named or keywords:
            required = sum(p.default is p.empty for p in named)
            return _Inputs([p.name for p in named], required, keywords, Parameter.VAR_KEYWORD in kinds)
    return None


def _signature(inputs: _Inputs | None) -> str:
    return f"forward({', '.join(inputs.names)})" if inputs else "forward(*args)"


def _entry(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _many(outputs: Any) -> bool:
    return isinstance(outputs, (Mapping, tuple, list))


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} of {list(value)}" if isinstance(value, Mapping) else type(value).__name__
