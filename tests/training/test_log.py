"""What is shown while something takes long: a bar on a terminal, lines elsewhere, and nothing where it is over at once."""

import logging
import os
import pty
import subprocess
import sys

import pytest

from tost_plugins.training import log
from tost_plugins.training.log import shown

ON_A_TERMINAL = """
from tost_plugins.training.log import shown
print(list(shown(range(3), 3, "synflow: round")))
"""


def test_what_is_over_at_once_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tost_plugins"):
        assert list(shown(iter("abc"), 3, "synflow: round")) == ["a", "b", "c"]
    assert not caplog.records


def test_lines_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_OFTEN", -1.0)  # each of them
    with caplog.at_level(logging.INFO, logger="tost_plugins"):
        assert list(shown(range(3), 3, "synflow: round")) == [0, 1, 2]
    assert [record.getMessage() for record in caplog.records] == ["synflow: round 1 of 3", "synflow: round 2 of 3"]


def test_a_bar_on_a_terminal_which_goes_at_the_end() -> None:
    here, there = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", ON_A_TERMINAL], stderr=there, stdout=subprocess.PIPE, text=True, timeout=120, check=True
    )
    os.close(there)
    written = os.read(here, 10_000).decode()
    os.close(here)
    assert done.stdout.strip() == "[0, 1, 2]"
    assert "\rtost: synflow: round 2 of 3 [####################          ]" in written
    assert written.endswith("\r\x1b[K")
