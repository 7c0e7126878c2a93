"""The one exception of the library, and the helpers that word it the same way everywhere."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


_LONGEST = 3000  # characters of an error

_NOT_THERE = (
    "extra_forbidden",
    "unexpected_keyword_argument",
    "unexpected_positional_argument",
)  # as pydantic calls it


#: What pydantic expects, by what it calls the problem, as a recipe has it.
_WORDS = {
    **dict.fromkeys(("dict_type", "mapping_type", "model_type", "dataclass_type", "model_attributes_type"), "keys and values"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list"),
}  # fmt: skip


class TostError(ValueError):
    """Something the user can mend, worded in one line: where, what was expected, the value, the remedy.

    Example:
        >>> str(TostError("recipe quickstart: mask.sparsity: expected ...").at("tost train"))
        'tost train: recipe quickstart: mask.sparsity: expected ...'
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(str(message)))

    def at(self, where: str) -> TostError:
        """The same error with a place in front: inner code states the fact, the entry point adds where."""
        return type(self)(f"{where}: {self}")


def one_line(text: str) -> str:
    """One line that a terminal shows and does not obey: what a stranger's file put into it may be long, or have codes.

    Example:
        >>> one_line("two\\nlines, \\x1b[31mred")
        'two lines, \\\\x1b[31mred'
    """
    line = " ".join(text.split())
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def shown(value: object, most: int = 80) -> str:
    """The value as Python writes it, cut short.

    Example:
        >>> shown("a" * 100, most=10)
        "'aaaaaa..."
    """
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of more than 4300 digits
        text = f"a long {type(value).__name__}"
    return text if len(text) <= most else text[: most - 3] + "..."


class Inapplicable(TostError):
    """A tweak that finds nothing to act on in this network, which `optional: true` in a recipe turns into a log line; or a mask
    method that does not fit it, where `auto` takes another one."""


def wrong(where: str, expected: str, got: object, remedy: str) -> TostError:
    """The usual error, from its four parts.

    Example:
        >>> str(wrong("seeds", "at least 1", 0, "3 say more"))
        'seeds: expected at least 1, got 0; 3 say more'
    """
    return TostError(f"{where}: expected {expected}, got {shown(got, 500)}; {remedy}")


def unknown(where: str, what: str, value: object, known: Iterable[str]) -> TostError:
    """The error for a name that is not in a list: it offers the nearest one and lists them all.

    Example:
        >>> str(unknown("mask.kind", "mask method", "synflo", ["snip", "synflow"]))
        "mask.kind: expected a known mask method, got 'synflo'; did you mean 'synflow'? known: snip, synflow"
    """
    return TostError(f"{where}: expected a known {what}, got {shown(value)}; {_alternatives(value, known)}")


def _alternatives(value: object, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(str(value)[:100], names, n=1)
    return f"{f'did you mean {near[0]!r}? ' if near else ''}known: {', '.join(names)}"


def from_pydantic(
    where: str,
    error: ValidationError,
    kinds: Container[object] = (),
    keys: Mapping[str, Iterable[str]] = MappingProxyType({}),
) -> TostError:
    """A pydantic error as one line: the first problem in full, and how many more there are.

    `kinds` are the names that pydantic puts into a path for the member of a union it took; a user never wrote them. `keys` are
    the known keys: below a key, or in a kind; "" is the top.
    """
    problems = error.errors(include_url=False)
    first = next(
        (each for each in problems if each["type"].startswith(_NOT_THERE)), problems[0]
    )  # often what is missing
    parts = [str(part) for part in first["loc"]]
    path = ".".join(p for i, p in enumerate(parts) if not ("[" in p or (i and p in kinds))) or "value"
    words = _WORDS.get(first["type"])
    message = words or first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if first["type"] == "value_error":
        text = f"{path}: {message}"
    elif first["type"] == "unexpected_positional_argument":
        text = f"expected fields by name alone, got {shown(first.get('input'))} by place; write FIELD=VALUE"
    elif first["type"].startswith(_NOT_THERE):
        known = keys.get(next((part for part in reversed(parts[:-1]) if part in keys), ""), ())
        hint = _alternatives(parts[-1], known) if known else "remove it or correct its spelling"
        text = f"{path}: expected no such key, got {parts[-1]!r}; {hint}"
    elif first["type"] in ("missing", "missing_argument"):
        text = f"{path}: expected a value, got none; add the key {path.rsplit('.')[-1]!r}"
    else:
        remedy = "correct this value" if first.get("input") is not None else "write one, or leave the key away"
        text = f"{path}: expected {message[0].lower()}{message[1:]}, got {shown(first.get('input'))}; {remedy}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return TostError(f"{where}: {text}{more}")
