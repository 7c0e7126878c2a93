"""The tables of "Training Your Sparse Neural Network Better with Any Mask" again: what is published (`tables`, `published/`),
how long it is run here (`protocols`), the runs (`runs`), and ours beside theirs (`beside`).

May import: errors, masks, recipe, lab.
"""

from tost_plugins.lab.reproduce.beside import beside, notes, shown
from tost_plugins.lab.reproduce.protocols import PROTOCOLS
from tost_plugins.lab.reproduce.runs import cells, plan, run
from tost_plugins.lab.reproduce.tables import TABLES, published

__all__ = ["PROTOCOLS", "TABLES", "beside", "cells", "notes", "plan", "published", "run", "shown"]
