"""A cell's own process: the cell comes in as a pickle from the process that started it."""

import pickle
import sys
from pathlib import Path

from tost_plugins.errors import TostError
from tost_plugins.lab.grid.cell import run_cell
from tost_plugins.lab.grid.processes import BUSY
from tost_plugins.lab.job import Stopped

if __name__ == "__main__":
    try:
        if run_cell(pickle.load(sys.stdin.buffer), Path(sys.argv[1])) is None:
            sys.exit(BUSY)
    except (Stopped, KeyboardInterrupt):
        sys.exit(130)
    except TostError as error:
        sys.exit(str(error))
