"""What a rank holds after a step, and what it sends to the others meanwhile."""

import hashlib
from collections import Counter
from typing import Any

from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tost_plugins import Session

#: The steps before and after which sending is counted: in the midst of a run, with nothing but training going on.
FIRST, LAST = 2, 5


def digest(tensors: dict[str, Tensor]) -> str:
    """One line for many tensors, equal only if they are."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()


def state_of(model: nn.Module, optimizer: Any, session: Session | None) -> str:
    """A digest of weights, masks, ghosts' strength and optimizer state; running statistics are each rank's own."""
    found = dict(model.named_parameters())
    for name, param in model.named_parameters():
        state = optimizer.state.get(param, {})
        found |= {f"{name}/{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    if session is not None:
        found |= {f"{name}/mask": mask for name, mask in session.mask.items()}
        found |= {
            name: value for name, value in model.named_buffers() if name.endswith(("_mask", "alpha", "tost_clock"))
        }
    return digest(found)


class Watch:
    """Call it after every step: `states` is what was there then. A run that `counts`, which has to come to LAST, gets in
    `sent` which collectives ran from step FIRST to there."""

    def __init__(self, counts: bool = False) -> None:
        self.states: list[str] = []
        self.sent: dict[str, int] = {}
        self._counts = counts
        self._profile = profile(activities=[ProfilerActivity.CPU])

    def __call__(self, model: nn.Module, optimizer: Any, session: Session | None = None) -> None:
        self.states.append(state_of(model, optimizer, session))
        if self._counts and len(self.states) == FIRST:
            self._profile.start()
        if self._counts and len(self.states) == LAST:
            self._profile.stop()
            names = Counter(event.name for event in self._profile.events())  # type: ignore[union-attr]
            self.sent = {name: count for name, count in names.items() if name.startswith("c10d::")}
