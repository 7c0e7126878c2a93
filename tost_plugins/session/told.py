"""What a session says of itself: its clock, mask and weights, what was left out, and the numbers that trainers log."""

from __future__ import annotations

from typing import Any

from tost_plugins.errors import TostError
from tost_plugins.masks.base import Moving
from tost_plugins.masks.mask import Mask
from tost_plugins.session.masked_weights import MaskedWeights
from tost_plugins.session.report import Report, report
from tost_plugins.training.clock import Clock


class Told:
    """What is told of a session's run; nothing here changes it."""

    @property
    def clock(self: Any) -> Clock:
        """How far the run is, in optimizer steps."""
        return self.run.clock

    @property
    def weights(self: Any) -> MaskedWeights:
        """The masked weights; raises TostError before `start`."""
        if self.run.weights is None:
            raise TostError(f"session.mask: expected a started session, got state {self.state!r}; call start() first")
        return self.run.weights

    @property
    def mask(self: Any) -> Mask:
        """The mask that the run trains with; raises TostError before `start`."""
        return self.weights.mask

    @property
    def moving(self: Any) -> Moving | None:
        """The recipe's mask method, if it moves the mask."""
        return self.recipe.mask if isinstance(self.recipe.mask, Moving) else None

    @property
    def left_out(self: Any) -> list[str]:
        """Tweaks that found nothing to act on, each with the reason."""
        return self.tweaks.left_out

    @property
    def is_plain(self: Any) -> bool:
        """Whether no ghost and no soft activation is at work; take the best checkpoint from such a moment."""
        return self.state in ("new", "finished") or not self.tweaks.at_work()

    def report(self: Any, rows: bool = True) -> Report:
        """Sparsity, live weights and parameter counts, per layer with `rows`; raises TostError before `start`."""
        wiring = self.run.wiring
        return report(self.weights, self.tweaks, rows, wiring.look(self.mask) if rows else wiring.known)

    def metrics(self: Any) -> dict[str, float]:
        """What every adapter logs: sparsity, live weights, alpha, beta, the number of active parameters, ghosts included."""
        found = (
            None if self.weights.restless else self.run.wiring.known
        )  # else a resumed run would say more than another
        numbers = report(self.weights, self.tweaks, False, found).metrics()
        return numbers | self.weights.metrics() | self.tweaks.metrics()

    def state_dict(self: Any) -> dict[str, Any]:
        """Primitives only: the recipe, the state and the clock. Masks, alpha and beta are buffers of the model."""
        clock = [self.clock.step, self.clock.total_steps, self.clock.steps_per_epoch]
        return {"recipe": self.recipe.to_dict(), "state": self.state, "clock": clock}

    def saved_step(self: Any) -> int:
        """The step that the model's own buffer holds: that of a loaded checkpoint; -1 before the first start,
        and the last step after `finish`."""
        return self.clock.step if self.state == "finished" else self.run.saved.step
