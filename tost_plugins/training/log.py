"""One logger, and a way to say a thing once: on rank 0, visible even where nobody set up logging."""

from __future__ import annotations

import logging

from tost_plugins.training import ranks

logger = logging.getLogger("tost_plugins")


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
