"""Grids of runs: what a cell is and starts with (`cell`, `starts`), in which process it runs (`processes`), and all of them
(`grid`): finished cells are not run again, and one that was stopped goes on.

May import: errors, training, files, masks, recipe, lab.
"""

from tost_plugins.lab.grid.cell import Cell, Record, last_run
from tost_plugins.lab.grid.grid import command, finished, leave, outlook, run, seed_range

__all__ = ["Cell", "Record", "command", "finished", "last_run", "leave", "outlook", "run", "seed_range"]
