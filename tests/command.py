"""How tests run `tost`, and read what is refused."""

from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from tost_plugins import TostError
from tost_plugins.lab.cli import app


def tost(*args: object) -> str:
    """What a command of this process prints; a TostError comes through."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(call: Callable[[], object], *parts: object) -> str:
    """The TostError of a call: it is one line, and every part is in it."""
    with pytest.raises(TostError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(str(part) in text for part in parts), text
    return text
