"""The recipe: everything that defines a sparse run, strict, to and from YAML, also from strangers.

May import: errors, training, files, masks, tweaks, session.
"""

from tost_plugins.recipe.recipe import Recipe

__all__ = ["Recipe"]
