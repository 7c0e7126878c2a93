"""Labelled images in memory and seeded batches of them (`images`), and where they come from: `sources`, a file each.

May import: errors, training, recipe.
"""

from tost_plugins.lab.data.images import Augment, Data, Loader, Split
from tost_plugins.lab.data.sources import load

__all__ = ["Augment", "Data", "Loader", "Split", "load"]
