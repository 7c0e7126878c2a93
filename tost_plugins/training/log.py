"""One logger, and a way to say a thing once: on rank 0, visible even where nobody set up logging."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator, Iterable
from typing import TypeVar

from tost_plugins.training import ranks

T = TypeVar("T")

logger = logging.getLogger("tost_plugins")

#: Seconds between two lines about something that takes long, where no terminal shows a bar.
_OFTEN = 15.0


def say(message: str, level: int = logging.INFO) -> None:
    """Log one line from rank 0. Without any logging set-up it goes to stderr, since nothing may happen silently."""
    if ranks.rank() != 0:
        return
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("tost: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    logger.log(level, message)


def shown(items: Iterable[T], total: int, what: str) -> Generator[T, None, None]:
    """The items, and on rank 0 how far they are: a bar on a terminal, else a line now and then if they take long.

    `what` names them: "synflow: round". The bar goes when they end, or the generator is closed.
    """
    terminal = sys.stderr is sys.__stderr__ and sys.stderr.isatty()  # not a notebook's, nor within another bar
    bar = ranks.rank() == 0 and terminal
    said = time.monotonic()
    try:
        for done, item in enumerate(items):
            if bar:
                filled = 30 * done // max(total, 1)
                print(f"\rtost: {what} {done} of {total} [{'#' * filled:30}]", end="", file=sys.stderr, flush=True)
            elif done and time.monotonic() - said > _OFTEN:
                said = time.monotonic()
                say(f"{what} {done} of {total}")
            yield item
    finally:
        if bar:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
