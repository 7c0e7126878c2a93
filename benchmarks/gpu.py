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
import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import run
import torch
import torch.nn.functional as F
from interleave import Contender, Ratio, Row, timed
from step import tweaks
from torch.nn.utils import prune

from tost_plugins import Mask, Session, masks
from tost_plugins.lab import models
from tost_plugins.session import compaction
from tost_plugins.training.params import prunable

HEAD = """# On a GPU

Written by `python benchmarks/gpu.py`. Contenders take turns, in a new order in every round; a number is the median over the
rounds of the ratio to the other contender in the same round, with its quartiles. The device is waited for before and after the
steps that are timed, so what the CPU adds counts too.
"""
ABOUT = """
SGD with momentum on random images. "static": SynFlow's mask of 98 %; "compact" the same with `compact: true`, which on a GPU
fills its counts of channels up to multiples of 8, and "counts as they come" without that; "all tweaks": ghost skips and soft
activations at work, and label smoothing; "after the ghosts": the same recipe when its schedules have ended; "over a run": a
tenth of its steps with all tweaks, nine tenths after. "prune" is `torch.nn.utils.prune` with that mask. Each compiled contender
is a network of its own that goes through `torch.compile` after the session is attached. float32 is as PyTorch comes:
convolutions in TF32.
"""
SPARSITY = 0.98
_AS_THEY_COME = "compact, counts as they come"
RECIPES: dict[str, dict[str, Any]] = {
    "static": {},
    "compact": {"compact": True},
    _AS_THEY_COME: {"compact": True},
    "all tweaks": {"tweaks": tweaks("1dur")},
    "after the ghosts": {"tweaks": tweaks("1ba")},
}
CONTENDERS = ("dense", "dense again", *RECIPES, "prune")
RATIOS = [
    Ratio("dense again", "dense again", "dense"),
    Ratio("static", "static", "dense", most=1.01),
    Ratio("compact", "compact", "dense", most=0.6),
    Ratio(_AS_THEY_COME, _AS_THEY_COME, "dense"),
    Ratio("all tweaks", "all tweaks", "dense", most=1.25),
    Ratio("over a run", "all tweaks", "dense", most=1.03, share=0.1, rest="after the ghosts"),
    Ratio("prune", "prune", "dense"),
    Ratio("peak memory of a compact step", "memory, compact", "memory, dense", unit="B"),
    Ratio("peak memory of a static step", "memory, static", "memory, dense", unit="B"),
    *(Ratio(f"waits for the device in a step: {name}", f"waits, {name}", unit="") for name in ("dense", *RECIPES)),
]
TABLE = ("reproduce", "table2", "--protocol", "short", "--masks", "random,snip,grasp,synflow")
TOY = ("reproduce", "table2", "--protocol", "cpu", "--masks", "random", "--sparsities", "98", "--seeds", "1",
       "--set", "duration=2ba", "--set", "data={name: digits}", "--set", "model=cifar/resnet8")  # fmt: skip
#: Part -> the share of the time that it may take of what is left when it starts.
PARTS = {"tests": 0.12, "steps": 0.5, "table": 1.0}


@dataclass(frozen=True)
class Case:
    """A network, its batch, and how its steps are computed."""

    model: str
    batch: int
    size: int
    precision: str
    compiled: bool
    only: tuple[str, ...] = CONTENDERS

    def __str__(self) -> str:
        how = f"{self.precision}, {'compiled' if self.compiled else 'eager'}"
        return f"{self.model.rpartition('/')[2]}, {self.batch} images of {self.size} px, {how}"


_FEW = ("dense", "static", "compact")  # compilation takes most of the time
CASES = [
    Case("torchvision/resnet50", 256, 224, "bf16", False),
    Case("torchvision/resnet50", 256, 224, "float32", False),
    Case("torchvision/resnet50", 64, 224, "bf16", False),
    Case("torchvision/resnet50", 256, 224, "bf16", True, _FEW),
    Case("torchvision/resnet50", 256, 224, "float32", True, _FEW),
]
SMALL = [Case("cifar/resnet8", 8, 16, "bf16", False), Case("cifar/resnet8", 8, 16, "float32", False)]


# ---- steps


def steps(device: torch.device, small: bool, until: float) -> Iterator[Row]:
    """The rows of one case after another, while there is time."""
    for case in SMALL if small else CASES:
        if time.monotonic() > until:
            print(f"no time was left for {case}", flush=True)
            continue
        began, mask = time.monotonic(), _mask(case.model, case.size, device)
        with ExitStack() as stack:
            made = {name: _step(name, case, mask, device, stack) for name in case.only}
            for name, step in made.items():
                yield from _first(case, name, step, device)
            print(f"{case}: ready after {time.monotonic() - began:.0f} s", flush=True)
            contenders = {name: _several(step, 2 if small else 4, device) for name, step in made.items()}
            yield from timed(str(case), contenders, 3 if small else 7, warm_up=1)
            stack.pop_all()  # the runs are not finished: leave without a word
        torch.compiler.reset()


@functools.cache
def _mask(model: str, size: int, device: torch.device) -> Mask:
    torch.manual_seed(0)
    return masks.find(models.build(model, 10).to(device), "synflow", SPARSITY, input_shape=(3, size, size))


def _step(name: str, case: Case, mask: Mask, device: torch.device, stack: ExitStack) -> Callable[[], None]:
    """A function that takes one training step."""
    torch.manual_seed(0)
    model = models.build(case.model, 10).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    images = torch.randn(case.batch, 3, case.size, case.size, device=device)
    images, labels = (
        images.contiguous(memory_format=torch.channels_last),
        torch.randint(10, (case.batch,), device=device),
    )
    loss_fn: Callable[..., torch.Tensor] = F.cross_entropy
    if name == "prune":
        modules = dict(model.named_modules())
        for weight in prunable(model):
            prune.custom_from_mask(modules[weight.removesuffix(".weight")], "weight", mask[weight].float().to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    if name in RECIPES:
        spec = {"mask": {"kind": "random", "sparsity": SPARSITY}, **RECIPES[name]}
        session = Session(model, spec, mask).attach()
        loss_fn = session.criterion(loss_fn)
        together = {} if name == _AS_THEY_COME else compaction.TOGETHER
        with mock.patch.object(compaction, "TOGETHER", together):
            stack.enter_context(session.drive(optimizer, [(images[:2], labels[:2])], total_steps=10**9))
    forward = torch.compile(model) if case.compiled else model
    half = case.precision == "bf16"

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = loss_fn(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _first(case: Case, name: str, step: Callable[[], None], device: torch.device) -> Iterator[Row]:
    """The first steps, compilation and all; on a GPU, the most memory that one adds, and how often the CPU waits for the GPU."""
    for _ in range(2):
        step()
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        yield Row(str(case), f"memory, {name}", 0, torch.cuda.max_memory_allocated() - before, "B")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            step()
            torch.cuda.set_sync_debug_mode("default")
        yield Row(str(case), f"waits, {name}", 0, sum("synchroniz" in str(wait.message) for wait in waits), "")


def _several(step: Callable[[], None], count: int, device: torch.device) -> Contender:
    """The seconds of a step, in the mean over some."""

    def contender() -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            step()
        _wait(device)
        return (time.perf_counter() - start) / count

    return contender


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
    with (out / "table2-finished.txt").open("w") as file:
        subprocess.run([*command, "--finished"], env=_wide(), stdout=file, stderr=subprocess.STDOUT, check=False)


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
        sections.append("\n".join(["## A training step", ABOUT, *run.table(rows, RATIOS)[0], "", foot, ""]))
    if (out / "table2-finished.txt").exists():
        text = (out / "table2-finished.txt").read_text().rstrip()
        sections.append(f"## Table 2\n\n`tost {' '.join(TABLE)}`, as far as it came:\n\n```\n{text}\n```\n")
    return "\n".join(sections)


def _write(out: Path, rows: Iterator[Row], device: torch.device) -> None:
    """Row by row, so that what stops the steps leaves those before."""
    card = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    about = {"machine": f"{card}, {run.machine()}", "versions": run.versions(), "command": "python benchmarks/gpu.py"}
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
    parser.add_argument("--jobs", type=int, default=12, help="cells of the table at once")
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
            _write(out, steps(device, args.small, until), device)
        else:
            table(out, args.small, until, args.jobs)
    (out / "gpu.md").write_text(page(out))
    print((out / "gpu.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
