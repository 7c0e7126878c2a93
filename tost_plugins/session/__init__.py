"""One model trained with one recipe. `session` leads: attach, start, the steps, finish; what it leads stands beside it.

May import: errors, training, files, masks, tweaks, channels.
"""

from tost_plugins.session.session import Report, Session, session_of

__all__ = ["Report", "Session", "session_of"]
