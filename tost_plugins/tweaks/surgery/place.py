"""Where a tweak acts: at the layers that its globs name, that train, and that nobody ignores."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from tost_plugins.errors import Inapplicable, TostError
from tost_plugins.training.log import say
from tost_plugins.training.params import clean_name, plain_modules, some
from tost_plugins.tweaks.surgery.trace import Trace


def matching(paths: Sequence[str], layers: Sequence[str], where: str, what: str) -> list[str]:
    """The paths that a glob in `layers` matches; raises TostError where none does. One line names globs that match nothing
    beside others that do."""
    chosen = [path for path in paths if any(_matches(path, glob) for glob in layers)]
    missed = [glob for glob in layers if not any(_matches(path, glob) for path in paths)]
    if not chosen:
        raise TostError(
            f"{where}.layers: expected globs that match {what}, got {list(layers)!r}; there are {some([*map(_clean, paths)])}"
        )
    if missed:
        say(
            f"{where}.layers: {some([repr(glob) for glob in missed])} match nothing; {what} is at {some([*map(_clean, paths)])}",
            logging.WARNING,
        )
    return chosen


def in_training(
    model: nn.Module, paths: Sequence[str], ignore: Sequence[str], found: Trace | None, where: str
) -> list[str]:
    """The paths at which something trains; one line names the others. Raises Inapplicable where nothing does.

    What counts are the parameters there, or around a module that has none, and in the trial run whether gradients reach
    what it makes: activations behind a frozen backbone belong to it, those of a frozen loss network do not train either.
    """
    if next(model.parameters(), None) is None:
        return list(paths)
    modules = dict(plain_modules(model))
    left: dict[str, list[str]] = {"not trained": [], "ignored": []}
    chosen = []
    for path in paths:
        around = next((place for place in _upwards(path) if next(modules[place].parameters(), None) is not None), "")
        owners = [
            owner
            for owner, module in plain_modules(modules[around], around)
            if any(param.requires_grad for param in module.parameters(recurse=False))
        ]
        if not owners or (found is not None and not found.reached.get(path, True)):
            left["not trained"].append(path)
        elif all(_named(owner, ignore) for owner in owners):
            left["ignored"].append(path)
        else:
            chosen.append(path)
    named = ", ".join(
        f"{some([_clean(path) or 'the model' for path in them])} ({why})" for why, them in left.items() if them
    )
    if not chosen:
        raise Inapplicable(
            f"{where}: expected layers that train, got only {named}; leave {where} out, or mark it `optional: true`"
        )
    if named:
        say(f"{where}: left alone are {named}")
    return chosen


def _upwards(path: str) -> Iterator[str]:
    """The path, that of the module around it, and so on."""
    yield path
    while path:
        path = path.rpartition(".")[0]
        yield path


def _named(path: str, ignore: Sequence[str]) -> bool:
    """Whether a glob names this layer, or one that it is a part of, as the mask's `ignore` does."""
    return any(
        _matches(f"{place}{end}", glob) for place in _upwards(path) for end in ("", ".weight") for glob in ignore
    )


def _matches(path: str, glob: str) -> bool:
    """Whether a glob names it, with what a compiled or wrapped part puts into its path or without."""
    return fnmatchcase(path, glob) or fnmatchcase(_clean(path), glob)


def _clean(path: str) -> str:
    return clean_name(f"{path}.").removesuffix(".")
