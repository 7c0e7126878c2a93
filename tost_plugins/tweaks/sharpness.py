"""Sharpness-aware training in one pass: gradients are taken a little uphill of the weights, along the gradient before."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tost_plugins.errors import Inapplicable
from tost_plugins.training.clock import Clock, TimeField
from tost_plugins.training.log import say
from tost_plugins.training.numbers import NUMBER
from tost_plugins.training.params import clean_name, owners, plain_modules, prunable, some
from tost_plugins.training.sharding import whole
from tost_plugins.tweaks.base import STRICT, Step, Tweak
from tost_plugins.tweaks.surgery.swap import mixins_of, restore, swap


class Ascent:
    """Whether the layers of a model compute uphill; they have one between them. A copy of the model, or a pickle, does not
    until a run of its own says so: an average sees the weights as they are."""

    def __init__(self) -> None:
        self.live = self.quiet = False
        self.said = False  # that layers in eval mode do not take part

    def __deepcopy__(self, memo: dict[int, Any]) -> Ascent:
        return Ascent()

    def __reduce__(self) -> tuple:
        return Ascent, ()


class Uphill:
    """Mixin for a layer: in training it computes with its weight plus `tost_perturbation`. The weight itself never changes."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer, with its perturbation on the weight for the length of this call."""
        if not (self.training and self.tost_ascent.live) or self.tost_ascent.quiet:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        weight = self._parameters["weight"]
        self._parameters["weight"] = weight + self.tost_perturbation.to(weight.dtype)
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._parameters["weight"] = weight

    def _load_from_state_dict(self: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(
            f"{prefix}tost_perturbation", torch.zeros_like(self.tost_perturbation)
        )  # a plain network's
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Sharpness(Tweak):
    """Takes each step's gradient at w + rho g / |g|, g the gradient of the step before, so that training ends where the loss is
    flat around; in one forward and backward pass.

    The masked weights that are kept move, removed ones stay 0; |g| is the norm over all of them. The weights themselves never
    change: in training each layer computes with the sum, and whoever else reads them, in evaluation, checkpoints or averages,
    sees the plain ones. Layers in eval mode at the step take no part, which a line says. Micro-batches of a step share its
    perturbation; a step that a loss scaler skips, or in whose place the mask moves, hands the one before on. The first step
    has none. The perturbation is a buffer beside each weight, so that checkpoints resume bit for bit: memory for one more
    copy of the weights, and for the sums, in a forward pass, of another. A weight that several modules share, recurrent ones,
    and the output projection of nn.MultiheadAttention, which reads it past its layer, stay as they are, and a line says so.

    Fields: `rho`, above 0, how far uphill: toward 0 it is the plain training, 0.05 is usual, from 1 on hardly a network
    trains; `until`, from when on training is plain again; None is the end.

    Paper: Ji et al., A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve Efficient and Accurate Sparse
    Training (S2-SAM), NeurIPS 2024.
    Differs from the paper: masked weights alone are perturbed, no biases and norms; the last gradient is that after clipping and
    averaging, whose length does not count.

    Example:
        >>> Sharpness(rho=0.1, until="0.8dur").rho
        0.1
    """

    kind: Literal["sharpness"] = "sharpness"
    rho: Annotated[float, Field(gt=0, allow_inf_nan=False), NUMBER] = 0.05
    until: TimeField | None = None

    def attach(self, model: nn.Module, seed: int, ignore: Sequence[str] = ()) -> None:
        if next(_places(model), None) is not None:
            return  # a copy of an attached model brings its layers along
        layers = owners(model, prunable(model, ignore))
        left = [name for name, layer in layers.items() if _read_elsewhere(model, layer)]
        if len(left) == len(layers):
            raise Inapplicable(
                f"sharpness: expected a layer that alone reads its weight, got none in {type(model).__name__}; leave sharpness "
                f"out, or mark it `optional: true`"
            )
        if left:
            say(
                f"sharpness: {len(left)} weights stay as they are (shared, recurrent, or read past their layer): {some(left)}"
            )
        ascent = Ascent()
        for name, layer in layers.items():
            if name not in left:
                weight: Any = layer._parameters["weight"]
                layer.register_buffer("tost_perturbation", torch.zeros_like(weight.detach()))
                layer.tost_ascent = ascent  # type: ignore[assignment]
                swap(layer, Uphill)

    @torch.no_grad()
    def advance(self, model: nn.Module, clock: Clock) -> None:
        live = self.until is None or clock.progress(self.until) < 1
        for _, layer in _places(model):
            layer.tost_ascent.live = live
            if live:  # the mask may have moved: what is removed now is 0, and stays so
                layer.tost_perturbation.masked_fill_(whole(layer._parameters["weight"]) == 0, 0)
            else:
                layer.tost_perturbation.zero_()

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: Step) -> None:
        layers = {name: layer for name, layer in _places(model) if layer.tost_ascent.live}
        grads = {
            name: whole(grad) * whole(step.kept[name])
            for name in layers
            if (grad := step.weights[name].grad) is not None
        }
        if not grads:
            return
        _say_still([name for name in grads if not layers[name].training], layers)
        size = _norm(list(grads.values()))
        for name, layer in layers.items():
            grad = grads.get(name)
            if grad is None:
                layer.tost_perturbation.zero_()
            else:
                layer.tost_perturbation.copy_(grad * (self.rho / size).to(grad.device))

    def detach(self, model: nn.Module) -> None:
        for _, layer in list(_places(model)):
            restore(layer, Uphill)
            del layer.tost_perturbation, layer.tost_ascent

    @contextlib.contextmanager
    def quiet(self, model: nn.Module) -> Iterator[None]:
        found = next(_places(model), None)
        ascent = Ascent() if found is None else found[1].tost_ascent
        before, ascent.quiet = ascent.quiet, True
        try:
            yield
        finally:
            ascent.quiet = before

    def metrics(self, model: nn.Module) -> dict[str, float]:
        found = next(_places(model), None)
        return {"tost/sharpness/rho": self.rho if found is not None and found[1].tost_ascent.live else 0.0}


def _places(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name of the weight, and layer, of all that compute uphill."""
    for path, module in plain_modules(model):
        if Uphill in mixins_of(module):
            yield clean_name(f"{path}.weight" if path else "weight"), module


def _say_still(still: list[str], layers: dict[str, Any]) -> None:
    """Once in a run: which layers are in eval mode while the network trains."""
    ascent = next(iter(layers.values())).tost_ascent
    if still and not ascent.said:
        ascent.said = True
        say(
            f"sharpness: {len(still)} of {len(layers)} layers are in eval mode while the network trains, and take their "
            f"gradients where they stand: {some(still)}; call model.train() (norms alone may stay in eval mode)",
            logging.WARNING,
        )


def _read_elsewhere(model: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer's weight is one of another module's, too, or is read past the layer's forward pass or its parameters."""
    if isinstance(layer, nn.RNNBase):
        return True
    weight = layer._parameters["weight"]
    holders = sum(param is weight for module in model.modules() for param in module._parameters.values())
    return holders > 1 or isinstance(layer, NonDynamicallyQuantizableLinear)


def _norm(tensors: list[Tensor]) -> Tensor:
    """The norm of all numbers together, above 0; lone numbers of 16 bits would overflow."""
    sizes = [torch.linalg.vector_norm(t.float() if t.element_size() < 4 else t).to(tensors[0].device) for t in tensors]
    size = torch.linalg.vector_norm(torch.stack(sizes).double())
    return size.clamp(min=torch.finfo(torch.float32).tiny)
