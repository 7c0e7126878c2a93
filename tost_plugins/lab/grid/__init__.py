"""Grids of runs: what a cell is and starts with (`cell`, `starts`), which comes when (`order`), in which processes of this
machine (`pool`) or of others (`cluster`), and all of them (`grid`): finished cells are not run again, and one that was stopped
goes on.

May import: errors, training, files, masks, recipe, lab.
"""

from tost_plugins.lab.grid.cell import Cell, Record, last_run
from tost_plugins.lab.grid.cluster import Cluster
from tost_plugins.lab.grid.grid import command, finished, leave, outlook, run, seed_range

__all__ = ["Cell", "Cluster", "Record", "command", "finished", "last_run", "leave", "outlook", "run", "seed_range"]
