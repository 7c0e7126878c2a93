"""Numbers in settings: what YAML reads of a yes or an on is none, though Python counts with it."""

from __future__ import annotations

from typing import Any

from pydantic import BeforeValidator

from tost_plugins.errors import shown


def _checked(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {shown(value)}; YAML reads true, yes and on so: write the number")
    return value


#: Beside each `int` and `float` that somebody sets, since pydantic takes True for 1 there: `Annotated[int, Field(ge=1), NUMBER]`.
NUMBER = BeforeValidator(_checked)
