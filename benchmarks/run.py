"""The benchmarks: raw rows to docs/benchmarks/PART.csv, and all of them as tables to docs/benchmarks.md.

    make bench                                   # every part, each in a process of its own
    python benchmarks/run.py step startup        # these parts; the page is made from what is there of all
    python benchmarks/run.py --page              # the page alone
    TOST_OLDER_BUILD=FOLDER python benchmarks/run.py builds      # this checkout beside an older one

A part that fails leaves the others and its own earlier rows alone. Minutes on 2 CPU cores: see --help.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import builds
import torch
from interleave import Ratio, Row, quartiles

from tost_plugins.lab.train import environment

ROOT = Path(__file__).resolve().parent.parent
#: Part -> the script that measures it, and about how many minutes it takes on 2 cores.
PARTS = {"step": ("step", 13), "trainers": ("trainers", 7), "finding": ("finding", 12), "memory": ("memory", 3),
         "growth": ("growth", 3), "export": ("compact_export", 6), "startup": ("startup", 1), "train": ("end_to_end", 4),
         "builds": ("builds", 8), "compact": ("compact", 8), "grid": ("grid", 12)}  # fmt: skip
HEAD = """# What it costs

Written by `make bench`; the raw rows, one for each contender and round, are in `docs/benchmarks/`. Contenders take turns, in a
new order in every round, so that what the machine does beside them falls on all alike. A number is the median over the rounds of
the ratio to the other contender in the same round, with its quartiles. "held" and "missed" say on which side of its limit the
median lies; where "untouched again", the same contender a second time, is as far from 1, that says little.
"""


def measure(part: str, out: Path, small: bool) -> None:
    """Write the rows of a part, and what they were measured on."""
    module, started = importlib.import_module(PARTS[part][0]), time.time()
    rows = list(module.measure(small))
    about = {"machine": machine(), "versions": versions(), "command": f"python benchmarks/run.py {part}" + " --small" * small,
             "minutes": round((time.time() - started) / 60, 1)}  # fmt: skip
    folder = out / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{part}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows([*row[:3], f"{row.value:.9g}", row.unit] for row in rows)
    (folder / f"{part}.json").write_text(json.dumps(about, indent=1) + "\n")


def read(path: Path) -> list[Row]:
    """The rows of a part."""
    with path.open(newline="") as file:
        return [
            Row(r["case"], r["contender"], int(r["round"]), float(r["value"]), r["unit"]) for r in csv.DictReader(file)
        ]


def page(out: Path) -> str:
    """The page, from the rows that are there."""
    sections, held = [], []
    for part, (script, _) in PARTS.items():
        path, module = out / "benchmarks" / f"{part}.csv", importlib.import_module(script)
        if not path.exists():
            sections.append(f"## {module.TITLE}\n\nNot measured yet: `python benchmarks/run.py {part}`.\n")
            continue
        about, rows = json.loads(path.with_suffix(".json").read_text()), read(path)
        lines, verdicts = table(rows, module.RATIOS)
        held += verdicts
        lacks = part == "step" and not any(row.contender == "sparsimony" for row in rows)
        head = f"## {module.TITLE}\n{module.ABOUT}\n" + "sparsimony was not installed.\n\n" * lacks
        foot = f"`{about['command']}`, {about['minutes']} minutes; {about['machine']}; {about['versions']}."
        sections.append(head + "\n".join(lines) + f"\n\n{foot} Rows: [{part}.csv](benchmarks/{part}.csv).\n")
    summary = f"Of {len(held)} limits {held.count(True)} are held and {held.count(False)} missed.\n"
    return "\n".join([HEAD, summary, *sections])


def table(rows: list[Row], ratios: Iterable[Ratio]) -> tuple[list[str], list[bool]]:
    """The lines of a part's table, and for each limit whether it is held."""
    lines = [
        "| case | what | median (quartiles) | the other takes | limit | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    verdicts = []
    for case in dict.fromkeys(row.case for row in rows):
        own = [row for row in rows if row.case == case]
        for ratio in ratios:
            values = ratio.values(own)
            if not values:
                continue
            low, median, high = quartiles(values)
            spread = f" ({low:.3f} to {high:.3f})" if len(values) > 1 else ""
            base = [row.value for row in own if (row.contender, row.unit) == (ratio.to, ratio.unit)]
            holds = ratio.holds(median)
            verdicts += [] if holds is None else [holds]
            side, number = ("at most", ratio.most) if ratio.most is not None else ("at least", ratio.least)
            limit = "" if holds is None else f"{side} {number:g}"
            verdict = {None: "", True: "held", False: "**missed**"}[holds]
            shown = amount(statistics.median(base), ratio.unit) if base else ""
            lines.append(f"| {case} | {ratio.name} | {median:.3f}{spread} | {shown} | {limit} | {verdict} |")
    return lines, verdicts


def amount(value: float, unit: str) -> str:
    """A time, a size or a number, for people."""
    if unit != "s":
        return f"{value / 2**20:,.2f} MiB" if unit == "B" else f"{value:,.0f}"
    return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:,.2f} s"


def machine() -> str:
    """The processor, what it has, and how much of it is used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    return (f"{found[0] if found else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
            f"{memory:.0f} GiB, load before {load:.1f}")  # fmt: skip


def versions() -> str:
    """Python and the packages that a result depends on."""
    found = {key: value for key, value in environment().items() if key != "platform"}
    for name in ("sparsimony", "onnxruntime", "openvino"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return ", ".join(f"{name} {version}" for name, version in found.items())


def main() -> int:
    """Measure the parts that are asked for, then make the page."""
    takes = ", ".join(f"{part} {minutes}" for part, (_, minutes) in PARTS.items())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=f"minutes: {takes}")  # fmt: skip
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--small", action="store_true", help="tiny settings: does it work?")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where benchmarks.md and benchmarks/ go")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"expected parts of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    logging.getLogger("tost_plugins").addHandler(logging.NullHandler())  # hundreds of runs, a line each
    usual = [part for part in PARTS if part != "builds" or builds.OLD in os.environ]
    failed = [] if args.page else _all(args.parts or usual, args)
    (args.out / "benchmarks.md").write_text(page(args.out))
    for part in failed:
        print(f"{part}: failed", file=sys.stderr)
    return int(bool(failed))


def _all(parts: list[str], args: Any) -> list[str]:
    """The parts that failed: of several each runs in a process of its own."""
    if len(parts) == 1:
        measure(parts[0], args.out, args.small)
        return []
    options = ["--out", str(args.out), *["--small"] * args.small]
    return [
        part for part in parts if subprocess.run([sys.executable, __file__, part, *options], check=False).returncode
    ]


if __name__ == "__main__":
    sys.exit(main())
