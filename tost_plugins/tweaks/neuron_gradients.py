"""Gradients that suit each neuron's own sparsity: behind a norm, the fewer weights a neuron has left, the larger they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from tost_plugins.errors import Inapplicable
from tost_plugins.training.log import say
from tost_plugins.training.params import is_layer, is_transposed, owners, plain_modules, prunable, some
from tost_plugins.training.sharding import is_part, like, local, whole
from tost_plugins.tweaks.base import STRICT, Step, Tweak
from tost_plugins.tweaks.surgery.place import matching

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def factors(kept: Tensor, groups: int = 0) -> Tensor:
    """What each neuron's gradient is multiplied by, in a shape that multiplies its weights: the root of the neuron's kept share
    over the layer's mean kept share. A neuron that keeps nothing has 1.

    `kept` is not 0 where a weight is kept, its neurons lie along the first dimension; `groups` above 0: as in transposed
    convolutions of so many groups, along the second, whose inputs come first.

    Example:
        >>> [round(factor, 3) for factor in factors(torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]])).flatten().tolist()]
        [0.632, 1.265]
    """
    ones, ends = [1] * (kept.ndim - 2), kept.shape[:2]
    rows = (kept != 0).reshape(groups, -1, ends[1], kept[0, 0].numel()) if groups else (kept != 0).flatten(1)
    counts = rows.sum((1, 3)) if groups else rows.sum(1)
    # whole numbers, so that neurons which keep as many get exactly 1
    found = torch.where(counts > 0, (counts * counts.numel() / counts.sum().clamp(min=1)).sqrt(), 1.0)
    if groups:
        return found[:, None].expand(-1, ends[0] // groups, -1).reshape(*ends, *ones)
    return found.view(-1, 1, *ones)


@dataclass(frozen=True, config=STRICT, kw_only=True)
class NeuronGradients(Tweak):
    """Multiplies the gradient of each neuron's weights (an output row of a linear layer, a filter of a convolution, a gate's row
    of a recurrent layer) by sqrt(1 - s) / sqrt(1 - mean s), where s is the neuron's sparsity, and mean s that of its layer's
    neurons, for each weight of a layer by itself.

    A neuron's weights are small in sum where few are kept; a norm behind it makes up for that, and by the chain rule the fewer
    there are, the larger is each one's gradient. Where all neurons of a layer keep as many, nothing changes. It acts on the
    final gradients, behind clipping, of weights that have a mask, in every step until the end, and follows a mask that moves.
    Under `dnw` the gradients of hidden weights are multiplied too, by their neuron's number: they compete with the kept ones.

    Fields: `layers`, globs of the layers whose gradients it changes.

    Paper: "SparseOpt: Addressing Normalization-induced Gradient Skew in Sparse Training" (Adnan et al., ICML 2026).
    Differs from the paper: layers without a norm behind them are not left out by themselves (`layers` does that). A neuron
    that keeps nothing counts in the mean, but has the factor 1 in place of 0, so that hidden weights under `dnw` can bring it
    back; without them it has no gradient anyway.

    Example:
        >>> NeuronGradients(layers=("layer4.*",)).layers
        ('layer4.*',)
    """

    kind: Literal["neuron_gradients"] = "neuron_gradients"
    optional: bool = False
    layers: tuple[str, ...] = Field(("*",), min_length=1)

    def attach(self, model: nn.Module, seed: int, ignore: Sequence[str] = ()) -> None:
        paths: dict[str, list[nn.Parameter]] = {}
        for name, weight in prunable(model, ignore).items():
            paths.setdefault(name.rpartition(".")[0], []).append(weight)
        chosen = matching(list(paths), self.layers, self.kind, "a layer with a mask")
        shared = _shared(model)
        left = [path or "the model" for path in chosen if all(id(weight) in shared for weight in paths[path])]
        if len(left) == len(chosen):
            raise Inapplicable(
                f"{self.kind}: expected a layer whose weight is its own, got only {some(left)}, whose weights other kinds of "
                f"modules use too; leave {self.kind} out, or mark it `optional: true`"
            )
        if left:
            say(f"{self.kind}: left alone are {some(left)} (other kinds of modules use the weight too)")
        if not hasattr(model, _HOLDER):
            setattr(model, _HOLDER, {})

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: Step) -> None:
        if self.kind not in step.made:
            found = self._factors(model, step.weights, step.kept)
            setattr(model, _HOLDER, found)
            step.made[self.kind] = {name: _placed(factor, step.kept[name]) for name, factor in found.items()}
        for name, factor in step.made[self.kind].items():
            if name in step.gradients:
                grad = local(step.gradients[name])
                grad.mul_(factor.to(grad.dtype))

    def detach(self, model: nn.Module) -> None:
        vars(model).pop(_HOLDER, None)

    def metrics(self, model: nn.Module) -> dict[str, float]:
        found = list(getattr(model, _HOLDER, {}).values())
        if not found:
            return {}
        least, most = (torch.stack([ends(factor).float() for factor in found]) for ends in (torch.amin, torch.amax))
        return {f"tost/{self.kind}/least": float(least.min()), f"tost/{self.kind}/most": float(most.max())}

    def _factors(
        self, model: nn.Module, weights: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Name -> what its gradient is multiplied by; where ranks hold parts, all of them come by."""
        modules, shared = owners(model, dict(weights)), _shared(model)
        return {
            name: factors(whole(kept[name]), _groups(module))
            for name, module in modules.items()
            if id(weights[name]) not in shared
            and any(fnmatchcase(name.rpartition(".")[0], glob) for glob in self.layers)
        }


_HOLDER = "tost_neuron_gradients"  # the model's attribute: the factors as they are now, for who logs them


def _groups(module: nn.Module) -> int:
    """Of a layer whose weight has its inputs first; 0 for others."""
    if isinstance(module, _TRANSPOSED):
        return module.groups
    return 1 if is_transposed(module) else 0


def _placed(factor: Tensor, kept: Tensor) -> Tensor:
    """Ready to multiply this rank's part of the gradient."""
    return local(like(factor.expand(kept.shape), kept)) if is_part(kept) else factor


def _shared(model: nn.Module) -> set[int]:
    """The ids of parameters of modules other than layers, such as embeddings, to which a layer's weight may be tied."""
    others = (module for _, module in plain_modules(model) if not is_layer(module))
    return {id(param) for module in others for param in module._parameters.values() if param is not None}
