"""Packages that not everybody has: imported where they are used, with one line that says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType

from tost_plugins.errors import TostError

_INSTALLED_AS = {"sklearn": "scikit-learn", "PIL": "pillow", "composer": "mosaicml"}


def package(name: str, where: str, install: str) -> ModuleType:
    """The module `name`; raises TostError with the command that installs it where a package is missing.

    Example:
        >>> package("no_such_package.module", "here", "it")
        Traceback (most recent call last):
        tost_plugins.errors.TostError: here: expected the package 'no_such_package', got none; run: pip install 'it'
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as cause:
        missing = (cause.name or name).partition(".")[0]
        missing = _INSTALLED_AS.get(missing, missing)
        raise TostError(f"{where}: expected the package {missing!r}, got none; run: pip install '{install}'") from cause
