"""The network of a run, built as its recipe says, with the weights of a checkpoint, and images to try it on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tost_plugins.errors import TostError
from tost_plugins.lab import data, models
from tost_plugins.recipe.recipe import DataSpec, Recipe, read
from tost_plugins.training.log import say

_MOST = 64  # images


class Network(NamedTuple):
    """A network in eval mode on the CPU, and normalised images: the first of the run's test split, or random ones."""

    model: nn.Module
    images: Tensor


def network(checkpoint: Path, tensors: Mapping[str, Tensor]) -> Network:
    """The network whose weights these are: the recipe lies in the checkpoint's folder, or in one of those above.

    Where the run's data are not here any more, the sizes are read from the weights, and images are random ones; that is
    logged. Raises TostError where there is no recipe, and where the weights are not those of its network.
    """
    found = [folder / "recipe.yaml" for folder in list(checkpoint.resolve().parents)[:3]]
    recipe_file = next((path for path in found if path.is_file()), None)
    if recipe_file is None:
        raise TostError(
            f"expected a run's folder with its recipe.yaml, which says what network it is, got none at {found[0]}; without one "
            f"export the weights alone, and call tost_plugins.compact or torch.export with your own network"
        )
    recipe = Recipe.from_dict(read(recipe_file), f"recipe {recipe_file}")
    reasons = []
    for classes, images in _guesses(recipe.model, recipe.data, tensors):
        model = models.build(recipe.model, classes, images.shape[1])
        try:
            model.load_state_dict(dict(tensors), strict=True)
            return Network(model.eval(), images)
        except RuntimeError as error:
            reasons.append(str(error))
    raise TostError(
        f"expected the weights of {recipe.model}, as {recipe_file} says, got others ({reasons[0]}); check the folder"
    )


def _guesses(model: str, spec: DataSpec, tensors: Mapping[str, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Number of classes and images: of the data, or where they cannot be read as the weights have it."""
    try:
        real = _real(spec)
    except (TostError, OSError) as error:
        real, reason = None, error
    if real is not None:
        yield real
        return
    say(f"export: compared on random images, since the run's data cannot be read ({reason})")
    classes, channels = _sizes(model, tensors)
    side = spec.image_size or (8 if spec.name == "digits" else 32)
    yield classes, torch.randn(_MOST, channels, side, side, generator=torch.Generator().manual_seed(0))


def _sizes(model: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Classes and input channels: where these tensors have other shapes than those of a network with 2 and 3."""
    classes, channels = 2, 3
    for name, usual in models.build(model, classes, channels).state_dict().items():
        found = tensors.get(name, usual)
        if found.ndim and len(found) != len(usual):
            classes = len(found)
        if found.ndim == usual.ndim == 4 and found.shape[1] != usual.shape[1]:
            channels = found.shape[1]
    return classes, channels


def _real(spec: DataSpec) -> tuple[int, Tensor]:
    loaded = data.load(spec)
    loader = data.Loader(
        loaded.test, min(_MOST, len(loaded.test)), seed=0, shuffle=False, augment=None, mean=loaded.mean, std=loaded.std
    )
    images, _ = next(iter(loader))
    return loaded.classes, images.contiguous()
