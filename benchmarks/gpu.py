"""What a GPU says, in minutes: the tests that need one, what a step costs, and as much of table 2 as there is time for.

    python benchmarks/gpu.py --data FOLDER --out runs/gpu                # FOLDER holds cifar10/; at most 9 minutes
    python benchmarks/gpu.py --data FOLDER --out runs/gpu --parts table  # goes on with the cells that are left
    python benchmarks/gpu.py --out DIR --small                           # a toy, on whatever device there is

Needs torch, torchvision, pytest and, for the table, datasets, with this package installed beside them; no network.
FOLDER/gpu.md is the page, from all that is there.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gpu_steps
import run
import torch
from interleave import Row

HEAD = """# On a GPU

Written by `python benchmarks/gpu.py`. Contenders take turns, in a new order in every round; a number is the median over the
rounds of the ratio to the other contender in the same round, with its quartiles. The device is waited for before and after the
steps that are timed, so what the CPU adds counts too.
"""
TABLE = ("reproduce", "table2", "--protocol", "short", "--masks", "random,snip,grasp,synflow")
TOY = ("reproduce", "table2", "--protocol", "cpu", "--masks", "random", "--sparsities", "98", "--seeds", "1",
       "--set", "duration=2ba", "--set", "data={name: digits}", "--set", "model=cifar/resnet8")  # fmt: skip
#: Part -> the share of the time that it may take of what is left when it starts.
PARTS = {"tests": 0.12, "steps": 0.5, "table": 1.0}


# ---- tests and the table


def tests(out: Path, until: float) -> None:
    """All tests that need a GPU; what pytest says stays in tests.txt."""
    marked = [
        str(path) for path in sorted((run.ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()
    ]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rA", "-p", "no:cacheprovider", *marked]
    _limited(command, out / "tests.txt", until)


def table(out: Path, small: bool, until: float, jobs: int) -> None:
    """Cells of table 2, several at once, until the time is over: those that are finished stay, the others go on next time."""
    command = [sys.executable, "-m", "tost_plugins", *(TOY if small else TABLE), "--out", str(out / "table2")]
    _limited([*command, "--jobs", str(jobs)], out / "table2.txt", until)
    found = subprocess.run(
        [*command, "--finished"], env=_wide(), cwd=run.ROOT, capture_output=True, text=True, check=False
    )
    none = "no mask and sparsity is finished both with and without tweaks"
    (out / "table2-finished.txt").write_text(found.stdout if found.returncode == 0 else none)


def _wide() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "130"}


def _limited(command: list[str], log: Path, until: float) -> None:
    """Run a command; when the time is over, ask it to stop, and end it if it does not."""
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=run.ROOT, stdout=file, stderr=subprocess.STDOUT, env=_wide())
        for seconds in (max(1.0, until - time.monotonic()), 20.0):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
                break
            process.send_signal(signal.SIGINT)
        else:
            process.kill()


# ---- the page


def page(out: Path) -> str:
    """All that is there, as a page."""
    sections = [HEAD]
    if (out / "tests.txt").exists():
        lines = (out / "tests.txt").read_text().splitlines()
        told = [line for line in lines if re.match(r"(FAILED|ERROR|SKIPPED) ", line)]
        sections.append("\n".join(["## Tests\n", f"`pytest -m gpu`: {lines[-1] if lines else 'stopped'}", *told, ""]))
    if (out / "gpu.csv").exists():
        about, rows = json.loads((out / "gpu.json").read_text()), run.read(out / "gpu.csv")
        foot = f"`{about['command']}`; {about['machine']}; {about['versions']}. Rows: [gpu.csv](benchmarks/gpu.csv)."
        sections.append(
            "\n".join(["## A training step", gpu_steps.ABOUT, *run.table(rows, gpu_steps.RATIOS)[0], "", foot, ""])
        )
    if (out / "table2-finished.txt").exists():
        text = (out / "table2-finished.txt").read_text().rstrip()
        said = [
            f"## Table 2\n\n`tost {' '.join(TABLE)}`, as far as it came:\n",
            "```",
            text,
            "```",
            "",
            *_under_way(out / "table2"),
        ]
        sections.append("\n".join(said))
    return "\n".join(sections)


def _under_way(folder: Path) -> list[str]:
    """The cells that are not finished, each with the last validation accuracy."""
    found = [path for path in sorted(folder.glob("*/history.jsonl")) if not (path.parent / "cell.json").exists()]
    last = {path.parent.name: json.loads(path.read_text().splitlines()[-1]) for path in found if path.read_text()}
    rows = [f"| {name} | {row['step']:,} | {row['accuracy']:.1f} |" for name, row in last.items()]
    return ["| cell under way | steps | validation accuracy (%) |", "| --- | --- | --- |", *rows, ""] if rows else []


def _write(out: Path, rows: Iterator[Row], device: torch.device, options: str) -> None:
    """Row by row, so that what stops the steps leaves those before."""
    card = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    about = {
        "machine": f"{card}, {run.machine()}",
        "versions": run.versions(),
        "command": f"python benchmarks/gpu.py {options}",
    }
    (out / "gpu.json").write_text(json.dumps(about, indent=1) + "\n")
    with (out / "gpu.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        for row in rows:
            writer.writerow([*row[:3], f"{row.value:.9g}", row.unit])
            file.flush()


def main() -> int:
    """Run the parts that are asked for, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the results go, and earlier ones are")
    parser.add_argument("--data", type=Path, help="the folder that holds cifar10/, for the table")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--jobs", type=int, default=6, help="cells of the table at once")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="tiny settings: does it work?")
    args = parser.parse_args()
    if args.data is not None:
        os.environ["TOST_DATA"] = str(args.data.resolve())
    out, end = args.out.resolve(), time.monotonic() + 60 * args.minutes - 15
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("tost_plugins").addHandler(logging.NullHandler())
    for part in args.parts:
        share = 1.0 if part == args.parts[-1] else PARTS[part]
        until = time.monotonic() + share * (end - time.monotonic())
        print(f"{part}: at most {until - time.monotonic():.0f} s", flush=True)
        if part == "tests":
            tests(out, until)
        elif part == "steps":
            options = f"--minutes {args.minutes:g} --jobs {args.jobs}" + " --small" * args.small
            _write(out, gpu_steps.steps(device, args.small, until), device, options)
        else:
            table(out, args.small, until, args.jobs)
    (out / "gpu.md").write_text(page(out))
    print((out / "gpu.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
