"""How long it takes until something happens: imports, and `tost --help`."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from interleave import Ratio, Row, timed

TITLE = "Start-up"
ABOUT = """
Fresh processes, in turn. The names of the package load when they are asked for, so `import tost_plugins` alone does little; the
third line asks for those that need no trainer.
"""

_NAMES = "from tost_plugins import Mask, Recipe, Session, masks"
_HELP = "tost --help"
_CODE = {name: name for name in ("pass", "import torch", "import tost_plugins", _NAMES)}
RATIOS = [
    Ratio("import tost_plugins, to import torch", "import tost_plugins", "import torch", most=1.2),
    Ratio(f"{_NAMES}, to import torch", _NAMES, "import torch", most=1.2),
    Ratio("tost --help, seconds", _HELP, most=0.5),
    Ratio("python itself, seconds", "pass"),
    Ratio("tost --help imports torch (1: yes)", "torch is imported", most=0, unit=""),
]


def measure(small: bool) -> Iterator[Row]:
    """The rows."""
    commands = {name: [sys.executable, "-c", code] for name, code in _CODE.items()}
    commands[_HELP] = [str(Path(sys.executable).with_name("tost")), "--help"]
    yield from timed("start-up", {name: functools.partial(_run, c) for name, c in commands.items()}, 2 if small else 15)
    look = "import sys; from tost_plugins.lab.cli import app; app(['--help'], standalone_mode=False); "
    look += "print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", look], stdout=subprocess.PIPE, text=True, check=True).stdout
    yield Row("start-up", "torch is imported", 0, int(found.split()[-1] == "True"), "")


def _run(command: list[str]) -> None:
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
