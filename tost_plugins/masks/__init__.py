"""Masks: what one is (`mask`), how it is chosen (`allocation`, `topk`, `scoring`), what one connects (`paths`), and every
method that finds one (`methods`, a file and a registry row each). `find` is the one call for users, `live` says which of its
weights lie on a path, `soft` draws what of the others stays. Nothing here knows tweaks, sessions or recipes.

May import: errors, training, files.
"""

from tost_plugins.masks.find import find, run, search, starting_weights
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.methods import MASKS
from tost_plugins.masks.paths.connectivity import live
from tost_plugins.masks.soft import soft

__all__ = ["MASKS", "Mask", "find", "live", "run", "search", "soft", "starting_weights"]
