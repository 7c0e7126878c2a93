"""When a run's network becomes the plain one: from that step on a best checkpoint may be taken."""

from __future__ import annotations

from typing import Any

from tost_plugins.tweaks import Tweak


def ends(session: Any, *parts: Any) -> int:
    """The step at which the last of these parts of a recipe has come to its end; of tweaks, those that make another network of
    it, as their metrics tell."""
    timed = [part for part in parts if getattr(part, "until", None) is not None]
    seen: list[Any] = [part for part in timed if not isinstance(part, Tweak) or _is_seen(part, session)]
    return max([part.until.steps(session.clock) for part in seen], default=0)


def plain_from(session: Any) -> int:
    """The step from which on a running session's network is the plain one, under the mask that stays; 0 once it is over."""
    return ends(session, session.recipe.mask, *session.tweaks) if session.state == "running" else 0


def _is_seen(tweak: Tweak, session: Any) -> bool:
    return any(name.endswith(("alpha", "active")) for name in tweak.metrics(session.model))
