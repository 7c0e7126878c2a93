"""A checkpoint whose weights are the plain network's own, with the session's tensors beside them: who loads the weights needs
no session, and a resumed run lacks nothing."""

from __future__ import annotations

from typing import Any

from tost_plugins.errors import TostError
from tost_plugins.session import buffers

KEY = "tost"  # as `files.nested` knows it
_KEPT = ("state_dict", "current_model_state")  # the weights, and beside those of an average the network's


def put_aside(session: Any, checkpoint: dict[str, Any]) -> None:
    """Where the network is the plain one take what is the session's out of a checkpoint's weights, and keep it beside them;
    while ghosts or soft activations are at work it stays there, since the weights alone are another network."""
    if session is not None and session.state in ("attached", "running") and session.is_plain:
        checkpoint[KEY] = {
            key: {name: weights.pop(name) for name in list(weights) if buffers.of_a_session(name)}
            for key in _KEPT
            if (weights := checkpoint.get(key)) is not None
        }


def put_back(checkpoint: dict[str, Any], plain: bool) -> None:
    """Make a checkpoint's weights what the network at hand has: a `plain` one, or one with a session. Raises TostError for the
    plain one where ghosts or soft activations were at work."""
    ours = checkpoint.pop(KEY, {})
    if not plain:
        for key, tensors in ours.items():
            checkpoint[key].update(tensors)
    elif any(map(buffers.of_a_session, checkpoint["state_dict"])):
        raise TostError(
            f"ckpt_path: expected a checkpoint from after the ghosts and soft activations have ended, got one of step "
            f"{checkpoint.get('global_step')} for a network without them; take a later one, or fit(ckpt_path=...) on"
        )
