"""The end of a backward pass, as seen from a hook inside it."""

from __future__ import annotations

from collections.abc import Callable

import torch

#: DDP's last word may come by two callbacks, of which the first queues the second (static_graph).
_TURNS = 3


def number() -> int:
    """The number of the backward pass that is going on; -1 where there is none."""
    return torch._C._current_graph_task_id()


def when_over(call: Callable[[], None]) -> None:
    """Have `call()` come at the end of this backward pass, behind what DDP does there."""
    _queue(call, _TURNS)


def _queue(call: Callable[[], None], turns: int) -> None:
    # callbacks come in the order in which they are queued, those that are queued by others too
    later = call if turns == 0 else lambda: _queue(call, turns - 1)
    torch.autograd.Variable._execution_engine.queue_callback(later)
