"""Which cell runs when, whatever runs it: parents first, in order; one that fails or dies does not hold up the others."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from tost_plugins.errors import TostError, one_line
from tost_plugins.files.atomic import write
from tost_plugins.lab.grid.cell import Cell, run_cell
from tost_plugins.lab.job import Stopped
from tost_plugins.lab.progress import Listener, silent

#: How often a cell is begun whose process dies under it.
GOES = 3


@dataclass(frozen=True)
class Outcome:
    """How a cell's go has ended, and what it said: `done` with its record in its folder, `failed` as it would again, `stopped`
    because it was asked to, or `died` with its process."""

    how: Literal["done", "failed", "stopped", "died"]
    said: str = ""


def attempt(cell: Cell, out: Path, listen: Listener = silent) -> Outcome:
    """Run a cell in this process: how it ended, in a line. Where that is a fault of the program, its traceback is in the cell's
    folder."""
    trace = out / cell.name / "traceback.txt"
    try:
        trace.unlink(missing_ok=True)
        run_cell(cell, out, listen)
        return Outcome("done")
    except (Stopped, KeyboardInterrupt):
        return Outcome("stopped")
    except TostError as error:
        return Outcome("failed", str(error))
    except Exception as error:
        said = one_line(f"{cell.name}: its run ended with {type(error).__name__}: {error}")
        with contextlib.suppress(OSError):  # the disk may be what is full
            trace.parent.mkdir(parents=True, exist_ok=True)
            write(trace, traceback.format_exc())
            said += f"; where: {trace}"
        return Outcome("failed", said)


class Engine(Protocol):
    """What runs cells: this process (`Here`), processes of this machine (`Pool`), or a cluster (`Ray`)."""

    def room(self) -> int:
        """How many cells it takes at once; more are given to it when some have ended."""
        ...

    def at_once(self) -> int:
        """How many of them run at the same time, for the time that is left."""
        ...

    def start(self, cell: Cell) -> None:
        """Begin a cell; `ended` tells of its end."""
        ...

    def ended(self) -> list[tuple[Cell, Outcome]]:
        """Wait until a cell has ended; those that have since the last call."""
        ...

    def stop(self) -> None:
        """Ask all cells to write their checkpoints, and wait until they have."""
        ...

    def close(self) -> None:
        """Give back what it holds; cells that are still running are lost, but for their checkpoints."""
        ...


class Here(Engine):
    """Cells in this process, one after another, whose steps `listen` hears."""

    def __init__(self, out: Path, listen: Listener) -> None:
        self.out, self.listen, self.cells = out, listen, list[Cell]()

    def room(self) -> int:
        return 1

    at_once = room

    def start(self, cell: Cell) -> None:
        self.cells.append(cell)

    def ended(self) -> list[tuple[Cell, Outcome]]:
        cell = self.cells.pop()
        return [(cell, attempt(cell, self.out, self.listen))]

    def stop(self) -> None:
        """Nothing runs any more: Ctrl-C has ended it."""

    close = stop


def run_all(cells: Sequence[Cell], engine: Engine, done: Callable[[Cell], None], listen: Listener) -> dict[str, str]:
    """Run all cells; `done` is called with each that has come to its end. Returns the name of each that has not, and why.

    A cell starts when its parent is done; without it, it fails too. One that died is begun again, three times in all
    (`listen("again", ...)`), and goes on from its checkpoint; one that failed is told (`listen("failed", ...)`). Raises
    Stopped after Ctrl-C.
    """
    left = {cell.name: cell for cell in cells}
    begun, running, failed = Counter[str](), set[str](), dict[str, str]()

    def fail(cell: Cell, said: str) -> None:
        del left[cell.name]
        failed[cell.name] = said
        listen("failed", {"name": cell.name, "said": said})

    def end(cell: Cell, outcome: Outcome) -> None:
        running.remove(cell.name)
        if outcome.how == "stopped":
            raise KeyboardInterrupt
        if outcome.how == "died" and begun[cell.name] < GOES:
            listen("again", {"name": cell.name, "said": outcome.said, "go": begun[cell.name] + 1, "of": GOES})
        elif outcome.how == "done":
            del left[cell.name]
            done(cell)
        else:
            fail(cell, outcome.said)

    try:
        while left:
            for cell in list(left.values()):
                if cell.parent in failed:
                    fail(cell, f"{cell.name}: expected the run {cell.parent}, which failed")
                elif len(running) < engine.room() and cell.name not in running and cell.parent not in left:
                    running.add(cell.name)
                    begun[cell.name] += 1
                    engine.start(cell)
            for cell, outcome in engine.ended() if running else ():
                end(cell, outcome)
    except KeyboardInterrupt:
        engine.stop()
        raise Stopped("stopped; what had begun goes on from its checkpoint") from None
    finally:
        engine.close()
    return failed
