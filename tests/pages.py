"""Runs a page of the documentation as its reader would: its blocks in order, in one folder.

A python block is executed, all in one namespace; one that begins with `# NAME.py` is saved under that name instead, and a yaml
block that begins with `# NAME.yaml` too; a sh block is run by the shell. What a block prints has to be what the text block right
behind it shows; a number behind "≈" there may be another, off by a twentieth. `python tests/pages.py PAGE [FOLDER]` prints
what the blocks print, and leaves the page's pictures in the folder.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(python|yaml|sh)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
ABOUT = re.compile(r"≈ ?(-?[\d,]+(?:\.\d+)?)")
FILE = re.compile(r"# (\w+\.(?:py|yaml))\b")


class Ran(NamedTuple):
    code: str
    shown: str | None  # what the page says that it prints, None where it does not say
    printed: str


def run(page: Path, folder: Path) -> Iterator[Ran]:
    """Each block of a page, run in turn in this folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for language, code, shown in BLOCK.findall(page.read_text("utf-8")):
        if found := FILE.match(code):
            (folder / found[1]).write_text(code, "utf-8")
            printed = ""
        elif language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.chdir(folder):
                exec(compile(code, str(page), "exec"), names)
            printed = out.getvalue()
        else:
            printed = shell(code, folder) if language == "sh" else ""
        yield Ran(code, shown or None, printed)


def shell(commands: str, folder: Path) -> str:
    """What commands print, with this interpreter's first on the path; they have to succeed."""
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    torchrun = 'torchrun() { python -m torch.distributed.run "$@"; }'  # what it is, wherever it lies
    command = ["bash", "-euc", f"{torchrun}\n{commands}"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def says_so(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed, but for the numbers that it calls approximate."""
    said, found = ABOUT.findall(shown), ABOUT.findall(printed)
    pairs = [[float(number.replace(",", "")) for number in pair] for pair in zip(said, found, strict=False)]
    close = all(abs(one - other) <= 0.05 * abs(one) for one, other in pairs)
    words = [[line.rstrip() for line in ABOUT.sub("≈", text).strip().splitlines()] for text in (shown, printed)]
    return close and words[0] == words[1]


def wrong(page: Path, folder: Path) -> list[str]:
    """What a page says that its blocks print, where they print something else."""
    return [f"{ran.code}prints\n{ran.printed}and the page says\n{ran.shown}" for ran in run(page, folder)
            if ran.shown is not None and not says_so(ran.shown, ran.printed)]  # fmt: skip


if __name__ == "__main__":
    where = Path(sys.argv[2] if len(sys.argv) > 2 else ".").resolve()
    for block in run(Path(sys.argv[1]).resolve(), where):
        print(
            block.code, block.printed, "differs" * (block.shown is not None and not says_so(block.shown, block.printed))
        )
