"""Settings made by hand: who calls a mask method or a tweak with fields that do not fit is told as a recipe's reader is."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import ValidationError

from tost_plugins.errors import from_pydantic

C = TypeVar("C", bound=type)


def names(settings: type) -> list[str]:
    """The names of its fields: those that somebody may give.

    Example:
        >>> from tost_plugins.masks.methods.dnw import Dnw
        >>> names(Dnw)  # and not what the class says of itself
        ['kind', 'sparsity', 'allocation', 'ignore', 'on_collapse', 'freeze']
    """
    return [field.name for field in fields(settings)]


def worded(settings: C) -> C:
    """The class, which raises TostError in one line from now on, where pydantic's own error has four and a link.

    Example:
        >>> from tost_plugins.masks.methods.snip import Snip
        >>> try:
        ...     Snip(sparsity=0.9, batches=0)
        ... except ValueError as error:
        ...     print(error)
        Snip: batches: expected greater than or equal to 1, got 0; correct this value
    """
    init: Any = settings.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except ValidationError as error:
            raise from_pydantic(type(self).__name__, error, keys={"": names(settings)}) from None

    settings.__init__ = __init__  # type: ignore[misc]
    return settings
