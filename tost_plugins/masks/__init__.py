"""Masks: what one is (`mask`), how it is chosen (`allocation`, `topk`, `scoring`), and every method that finds one
(`methods`, a file and a registry row each). `find` is the one call for users. Nothing here knows tweaks, sessions or recipes.

May import: errors, training, files.
"""

from tost_plugins.masks.find import find, run
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.methods import MASKS

__all__ = ["MASKS", "Mask", "find", "run"]
