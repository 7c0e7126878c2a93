"""From a model to its session."""

from __future__ import annotations

from typing import Any

from torch import nn


class Link:
    """Leads from a model to its session; in a copy or a pickle of the model it leads nowhere."""

    def __init__(self, session: Any = None) -> None:
        self.session = session

    def __reduce__(self) -> tuple:
        return Link, ()


def session_of(model: nn.Module) -> Any:
    """The Session that is attached to this very model object, or None: adapters find theirs again by it."""
    return getattr(getattr(model, "tost_session", None), "session", None)


def loaded(model: nn.Module, _: Any) -> None:
    """Let a run that loads a checkpoint go on from there at once: the next forward pass is already that step's."""
    session = session_of(model)
    if session is not None and session.state == "running":
        session.run.notice_loading()
