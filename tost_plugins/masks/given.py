"""A mask that somebody gives, cut to what of a network can be masked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from tost_plugins.files.renamed import own_names, renamed
from tost_plugins.masks.mask import Mask
from tost_plugins.training.log import say
from tost_plugins.training.params import clean_name, is_layer, is_recurrent, plain_modules, some, weight_keys
from tost_plugins.training.sharding import whole
from tost_plugins.training.transformed import transforms


def fitted(mask: Mask, model: nn.Module, params: Mapping[str, nn.Parameter]) -> Mask:
    """The mask for exactly `params`; one line names other tensors of the network of which it removes numbers that may come
    back: biases, norms, embeddings and frozen layers have no masks. Recurrent weights of which it says nothing stay dense, which
    is said. The names may also be those that transformers writes, those of the network within another one (a LightningModule's
    `net.fc.weight`) or the other way round, and those of the layers. Raises TostError as `Mask.fit` does, and on zeros in a layer
    that is ignored or not of this network.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 1)
        >>> list(fitted(Mask({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}), net, {"weight": net.weight}))
        ['weight']
    """
    others = _others(model, params)
    names = own_names(model)
    about = mask.about
    mask = _named_as(Mask(renamed(mask, names)) if names else mask, params)
    unknown = [name for name in params if name not in mask and is_recurrent(name)]
    if unknown:
        say(f"mask: without recurrent weights, which stay dense: {some(unknown)}")
        mask = Mask({**mask, **Mask.dense({name: params[name] for name in unknown})})
    found = mask.fit(params, known=others).described(**about)
    ours = {id(param) for param in params.values()}
    lost = [name for name, kept in mask.items() if name in others and id(others[name]) not in ours
            and not bool(kept.all()) and not _stays_zero(others[name], kept)]  # fmt: skip
    if lost:
        say(f"mask: zeros of {len(lost)} tensors that have no mask here may come back: {some(lost)}")
    return found


def _named_as(mask: Mask, params: Mapping[str, nn.Parameter]) -> Mask:
    """The mask under the names of `params`, where it has none of them and one way to see it so fits best, which is said."""
    if not params or any(name in params for name in mask):
        return mask
    ways = [way for end in ("", ".weight") for way in _ways(mask, next(iter(params)), end)]  # names of layers, too
    most, best = 0, []
    for way in ways:
        fits = sum(name in way and mask[way[name]].shape == param.shape for name, param in params.items())
        if fits > most:
            most, best = fits, [way]
        elif fits == most and way not in best:
            best.append(way)
    if most == 0 or len(best) != 1 or (most < len(params) and any(map(is_recurrent, params))):
        return mask  # what fits in part is for `fit` to say what is missing: recurrent weights may be
    new, old = next((new, old) for new, old in best[0].items() if new in params)
    others = f"; {left} of another part are left out" if (left := len(mask) - len(best[0])) else ""
    say(f"mask: its {old} is taken as {new} here, and all others likewise{others}")
    return Mask({new: mask[old] for new, old in best[0].items()})


def _ways(mask: Mask, first: str, end: str) -> Iterator[dict[str, str]]:
    """New names -> names in the mask, with an end, and with something else in front, so that `first` is one of the new: what
    they share is all of one of them, or more than its last part."""
    there = first.split(".")
    for name in mask:
        parts = f"{name}{end}".split(".")
        same = [one == other for one, other in zip(reversed(parts), reversed(there), strict=False)]
        shared = len(list(itertools.takewhile(bool, same)))
        if shared >= 2 or shared == min(len(parts), len(there)):
            off, on = (".".join([*path[: len(path) - shared], ""]) for path in (parts, there))
            yield {f"{on}{f'{old}{end}'.removeprefix(off)}": old for old in mask if f"{old}{end}".startswith(off)}


def _others(model: nn.Module, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The model's tensors by all their names, less the weights that might be masked and are ignored."""
    ours = {id(param) for param in params.values()}
    weights = {
        id(weight)
        for _, module in plain_modules(model)
        if is_layer(module) and (isinstance(module, nn.RNNBase) or not transforms(module))
        for key in weight_keys(module)
        if (weight := module._parameters.get(key)) is not None and weight.requires_grad
    }
    ignored = weights - ours
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {clean_name(name): tensor for name, tensor in named if id(tensor) not in ignored}


def _stays_zero(tensor: Tensor, kept: Tensor) -> bool:
    """Whether a tensor that does not train is 0 already where the mask removes it."""
    if tensor.requires_grad or tensor.shape != kept.shape:
        return False
    return not bool(whole(tensor.detach()).cpu()[~kept].any())
