"""Label smoothing in the training loss, and only there: cross entropy on class indices, as torch's own argument has it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tost_plugins.errors import Inapplicable, TostError
from tost_plugins.training.numbers import NUMBER
from tost_plugins.tweaks.base import STRICT, Tweak

#: What torch's cross_entropy takes, in order; nll_loss takes the same but for the last.
_ARGUMENTS = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
_IN_PLACE = ("{}_", "__i{}__")


def _functions(names: str, *forms: str) -> dict[Callable[..., Any], None]:
    """The functions and methods of torch by these names: compiled code finds one in a dict, but cannot read its name."""
    named = [form.format(name) for name in names.split() for form in forms]
    found = [getattr(owner, name, None) for owner in (torch, Tensor) for name in named]
    return {function: None for function in found if callable(function)}


_FACTORS, _DIVISORS = "mul multiply dot", "div divide true_divide truediv"
_OTHERS = """add sub neg sum mean where masked_fill stack cat concat view view_as reshape flatten unflatten squeeze unsqueeze
    expand expand_as permute transpose movedim contiguous clone getitem select narrow index_select masked_select gather take
    unbind split chunk to type type_as float double half bfloat16 cpu cuda requires_grad detach"""
_PRODUCTS = _functions(_FACTORS, "{}", "__{}__", "__r{}__", *_IN_PLACE)
_QUOTIENTS = _functions(_DIVISORS, "{}", "__{}__", *_IN_PLACE)
#: What is linear in a tensor that it is given. `detach` is: who multiplies by the result is seen to depend on the tensor.
_LINEAR = _functions(_OTHERS, "{}", "__{}__", "__r{}__", *_IN_PLACE) | _PRODUCTS | _QUOTIENTS
_CHANGING = _functions(f"{_FACTORS} {_DIVISORS} {_OTHERS}", *_IN_PLACE)


class Twins(TorchFunctionMode):
    """Within: each cross entropy on class indices is computed a second time, with smoothed labels, and so is all that is made
    of it by sums, means, weights and masks: its twin. Nothing that is computed within changes.

    `of(loss)` is the loss's twin: the value and the gradients that `label_smoothing=alpha` in each call would have led to.

    Example:
        >>> logits, labels, twins = torch.tensor([[2.0, 0.0]]), torch.tensor([0]), Twins(0.5)
        >>> with twins:
        ...     loss = 3 * F.cross_entropy(logits, labels)
        >>> torch.equal(twins.of(loss), 3 * F.cross_entropy(logits, labels, label_smoothing=0.5))
        True
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.pairs: list[tuple[Tensor, Any]] = []  # a tensor, and its twin or why it has none
        self._handed_on = False  # whether some came through DDP, which waits for their gradients (static_graph)

    def of(self, result: Any) -> Any:
        """The loss, or a tuple, list or dict with losses, with twins in the place of losses. Raises Inapplicable, which
        says what is wrong with "the loss", unless it is linear in cross entropies on class indices."""
        for twin in self._used(result) or ["has no cross entropy on class indices"]:
            if isinstance(twin, str):
                raise Inapplicable(twin)
            if not isinstance(twin, Tensor):
                raise Inapplicable(f"is not linear in its cross entropy ({twin.__name__.strip('_')})")
        return self._swapped(result, tied=self._handed_on)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy or func is F.nll_loss:
            given = {_ARGUMENTS[i]: value for i, value in enumerate(args)}  # dynamo takes every zip for a strict one
            twin = self._smoothed(func, {**given, **kwargs})
        elif used := self._used((args, kwargs)):
            twin = self._followed(func, used, args, kwargs)
        else:
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        self._pair(out, twin)
        return out

    def _smoothed(self, func: Callable[..., Tensor], given: dict[str, Any]) -> Tensor | str | None:
        """The twin of a cross entropy; None for an nll_loss of what is not a log_softmax over the classes."""
        if func is F.nll_loss and not _is_log_softmax(given["input"]):
            return None
        if given["target"].is_floating_point():
            return "has probabilities for labels, mixed or smoothed already"
        if given.get("label_smoothing"):
            return "smooths labels itself"
        return _apart(F.cross_entropy, **{**given, "label_smoothing": self.alpha})

    def _followed(self, func: Any, used: list[Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """The twin of what is made of tensors that have twins; the function, if it is none that can be followed."""
        for twin in used:
            if not isinstance(twin, Tensor):
                return twin
        # what trains, or is itself made of cross entropy, may be added to it; as a factor it makes another loss
        varies = [
            isinstance(x, Tensor) and (x.requires_grad or self._twin(x) is not None) for x in (*args, *kwargs.values())
        ]
        other = sum(varies) > 1 if func in _PRODUCTS else func in _QUOTIENTS and any(varies[1:])
        if func not in _LINEAR or other or "out" in kwargs:
            return func
        if func is Tensor.clone and not torch.is_grad_enabled():  # as DDP hands outputs on, in a function of its own
            self._handed_on = True
            return used[0]
        twins = self._swapped(args)
        if func in _CHANGING and twins[0] is args[0]:  # `total += loss` with a total that was no loss before
            twins = (args[0].clone(), *twins[1:])
        return _apart(func, *twins, **self._swapped(kwargs))

    def _used(self, tree: Any) -> list[Any]:
        return [twin for leaf in _leaves(tree) if (twin := self._twin(leaf)) is not None] if self.pairs else []

    def _twin(self, tensor: Any) -> Any:
        """A tensor's twin, or the reason or the function for which it has none; None for any other tensor."""
        for one, twin in reversed(self.pairs):
            if one is tensor:
                same = not isinstance(twin, Tensor) or one.requires_grad == twin.requires_grad
                return twin if same else "computes its cross entropy without gradients, as reentrant checkpoints do"
        return None

    def _pair(self, out: Any, twin: Any) -> None:
        if isinstance(out, Tensor):
            if twin is not None:
                self.pairs.append((out, twin))
        elif isinstance(out, (tuple, list)):
            for i, part in enumerate(out):
                self._pair(part, twin[i] if isinstance(twin, (tuple, list)) else twin)

    def _swapped(self, tree: Any, tied: bool = False) -> Any:
        """The same with twins where there are some; `tied`: what they stand for gets its gradients too, zeros."""
        if type(tree) in (tuple, list):
            return type(tree)([self._swapped(part, tied) for part in tree])
        if type(tree) is dict:
            return {key: self._swapped(part, tied) for key, part in tree.items()}
        twin = self._twin(tree)
        return tree if twin is None else twin + 0 * tree if tied else twin


def _apart(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What is computed in a checkpointed part is not computed there again for the backward pass: it keeps its own tensors."""
    if (
        torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
    ):  # which allow no hooks
        return func(*args, **kwargs)
    with torch.autograd.graph.saved_tensors_hooks(_same, _same):
        return func(*args, **kwargs)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _leaves(tree: Any) -> list[Any]:
    if type(tree) is dict:
        tree = list(tree.values())
    if type(tree) in (tuple, list):
        return [leaf for part in tree for leaf in _leaves(part)]
    return [tree]


def _is_log_softmax(scores: Tensor) -> bool:
    """Whether log_softmax over the second dimension, the classes, made them; a negative one is saved as unsigned."""
    made: Any = scores.grad_fn
    return made is not None and made.name() == "LogSoftmaxBackward0" and made._saved_dim in (1, 2**64 + 1 - scores.ndim)


def check_hard(where: str, loss_fn: Any) -> None:
    """Raise TostError if a loss function smooths labels, or wants smoothed ones, by its own settings: torch's and timm's."""
    own = _own_smoothing(loss_fn)
    if own is not None:
        raise TostError(
            f"{where}: expected a loss with hard labels, got one that smooths them already ({own}); "
            f"set its label_smoothing to 0, or leave label_smoothing out of the tweaks"
        )


def _own_smoothing(loss_fn: Any) -> Any:
    """What a loss smooths by: a keyword of a partial, or an attribute of a module or of one inside it."""
    if isinstance(loss_fn, functools.partial):
        own = loss_fn.keywords.get("label_smoothing")
        return _own_smoothing(loss_fn.func) if own is None else own or None
    for part in loss_fn.modules() if isinstance(loss_fn, nn.Module) else (loss_fn,):
        if type(part).__name__ in ("SmoothedLoss", "SoftTargetCrossEntropy"):
            return type(part).__name__
        own = getattr(part, "label_smoothing", 0) or getattr(part, "smoothing", 0)
        if isinstance(own, (int, float)) and own > 0:
            return own
    return None


@dataclass(frozen=True, config=STRICT, kw_only=True)
class LabelSmoothing(Tweak):
    """Training labels y become y(1-a) + a/K; evaluation loss and metrics see hard labels.

    It acts where the loss is linear in torch's cross entropy on class indices (per pixel and per token too, summed, averaged,
    weighted, masked), by the values of torch's own `label_smoothing`: class weights, `ignore_index` and `reduction` included.
    Other losses are left as they are, and that is said; it is an error unless `optional`.

    Fields: `alpha`, the a above: 0 leaves labels hard, values toward 1 approach the uniform distribution.

    Paper: "Training Your Sparse Neural Network Better with Any Mask" (Jaiswal et al., ICML 2022), section 3.
    Differs from the paper: nothing (its code spreads a over the K-1 wrong classes; its text, like us, over all K).

    Example:
        >>> LabelSmoothing(alpha=0.1).alpha
        0.1
    """

    kind: Literal["label_smoothing"] = "label_smoothing"
    alpha: Annotated[float, Field(ge=0, lt=1), NUMBER] = 0.1
