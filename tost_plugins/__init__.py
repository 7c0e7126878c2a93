"""tost_plugins: sparse training that works, in the training runs people already have."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tost_plugins import masks
    from tost_plugins.adapters.accelerate import TostHook
    from tost_plugins.adapters.composer import TostAlgorithm
    from tost_plugins.adapters.lightning import TostLightning
    from tost_plugins.adapters.transformers import TostCallback
    from tost_plugins.channels.packed import load_packed
    from tost_plugins.channels.removal import compact
    from tost_plugins.errors import TostError
    from tost_plugins.lottery.ticket import LotteryTicket
    from tost_plugins.masks.mask import Mask
    from tost_plugins.recipe.recipe import Recipe
    from tost_plugins.session.session import Session

__version__ = "0.1.0"
__all__ = [
    "LotteryTicket",
    "Mask",
    "Recipe",
    "Session",
    "TostAlgorithm",
    "TostCallback",
    "TostError",
    "TostHook",
    "TostLightning",
    "compact",
    "load_packed",
    "masks",
]

_HOME = {
    "LotteryTicket": "lottery.ticket",
    "Mask": "masks.mask",
    "Recipe": "recipe.recipe",
    "Session": "session.session",
    "TostAlgorithm": "adapters.composer",
    "TostCallback": "adapters.transformers",
    "TostError": "errors",
    "TostHook": "adapters.accelerate",
    "TostLightning": "adapters.lightning",
    "compact": "channels.removal",
    "load_packed": "channels.packed",
}


def __getattr__(name: str) -> Any:
    """Names load when they are asked for: no framework before its adapter, no torch before `tost --help`."""
    if name == "masks":
        return importlib.import_module("tost_plugins.masks")
    if name not in _HOME:
        raise AttributeError(f"module 'tost_plugins' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"tost_plugins.{_HOME[name]}"), name)
    except ModuleNotFoundError as cause:
        extra = _HOME[name].rpartition(".")[2]
        raise ImportError(
            f"{name} needs a package that is missing; run: pip install 'tost_plugins[{extra}]'"
        ) from cause
