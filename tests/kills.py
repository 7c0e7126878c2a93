"""Kill runs of `tost` at random moments, resume them, and compare what they end with to a run that nobody killed.

    python tests/kills.py --trainers torch composer --methods tost rigl dnw compact --kills 50

A run is a process of its own, forked from this one so that it need not import torch again, and its whole process group
gets SIGKILL: after a random time; while a checkpoint is being written; or just before a random one of the run's changes
to its folder (a file opened for writing, a rename, a removal). Then the same command with --resume goes on, until it
comes to its end: every file it leaves, checkpoints apart, must be that of the uninterrupted run, byte for byte.
After each kill every file that stands under its final name must be whole. Prints a row of counts for each case.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from tost_plugins.lab import cli

TRAINERS = ("torch", "composer", "transformers", "accelerate", "lightning")
HOW = ("time", "checkpoint", "file")
TWEAKS = [
    {"kind": "ghost_skip", "until": "0.4dur"},
    {"kind": "soft_activation", "until": "0.75dur"},
    {"kind": "rescaled_init", "iterations": 2},
    {"kind": "label_smoothing", "alpha": 0.1},
]
#: Epochs of 2 steps, with a checkpoint after each; four of the ten steps have ghosts.
RECIPE: dict[str, Any] = {
    "tweaks": [],
    "model": "cifar/resnet8",
    "data": {"name": "digits", "limit": 64, "batch_size": 32},
    "optimizer": {"lr": 0.05, "nesterov": True},
    "schedule": {"kind": "cosine", "warmup": "2ba"},
    "duration": "5ep",
}
METHODS: dict[str, dict[str, Any]] = {
    "tost": {"mask": {"kind": "snip", "sparsity": 0.9}, "tweaks": TWEAKS},
    "rigl": {"mask": {"kind": "rigl", "sparsity": 0.9, "every": "1ba", "until": "8ba"}},
    "dnw": {"mask": {"kind": "dnw", "sparsity": 0.9}},
    "compact": {
        "mask": {"kind": "synflow", "sparsity": 0.95, "rounds": 4},
        "compact": True,
        "tweaks": [{"kind": "multiplicative"}],
    },
    "lottery": {"mask": {"kind": "lottery_ticket", "sparsity": 0.7, "prune": 0.5, "rewind": "3ba"}, "duration": "4ep"},
}
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


class Failed(Exception):
    """A run did not end as it should have."""


def main() -> None:
    """The command line; exit status 1 if any case failed."""
    read = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    read.add_argument("--trainers", nargs="+", choices=TRAINERS, default=[t for t in TRAINERS if installed(t)])
    read.add_argument("--methods", nargs="+", choices=METHODS, default=["tost", "rigl", "dnw", "compact"])
    read.add_argument("--kills", type=int, default=50, help="for each trainer, shared among the methods")
    read.add_argument("--seed", type=int, default=0)
    asked = read.parse_args()
    warm(asked.trainers)
    failed = False
    for trainer in asked.trainers:
        for method, kills in shares(asked.methods, asked.kills).items():
            with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
                try:
                    counts = case(
                        trainer, method, kills, Path(scratch), random.Random(f"{asked.seed}{trainer}{method}")
                    )
                    row = {"trainer": trainer, "method": method, **counts}
                except Failed as error:
                    failed, row = True, {"trainer": trainer, "method": method, "failed": str(error)}
            print(json.dumps(row), flush=True)
    sys.exit(failed)


def installed(trainer: str) -> bool:
    return trainer == "torch" or importlib.util.find_spec(trainer) is not None


def warm(trainers: list[str]) -> None:
    """Import what a run needs, and run nothing: a fork takes no threads along."""
    importlib.import_module("sklearn.datasets")
    for trainer in trainers:
        importlib.import_module(f"tost_plugins.lab.loops.{trainer}")


def shares(methods: list[str], kills: int) -> dict[str, int]:
    """Method -> how many of the kills it gets."""
    return {method: kills // len(methods) + (i < kills % len(methods)) for i, method in enumerate(methods)}


def case(trainer: str, method: str, kills: int, scratch: Path, chance: random.Random) -> dict[str, Any]:
    """Kill runs of one recipe `kills` times; returns how often and how, and how many runs were brought to their end."""
    recipe = scratch / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"name": method, **RECIPE, **METHODS[method], "trainer": trainer}))
    command = ["lottery" if method == "lottery" else "train", str(recipe), "--json", "--resume", "--out"]
    log, whole = scratch / "log", scratch / "whole"
    began = time.monotonic()
    ended(start([*command, str(whole)], whole, log, count_in=scratch / "changes"), log)
    length, changes = time.monotonic() - began, int((scratch / "changes").read_text())
    expected = contents(whole)
    counts = dict.fromkeys(("kills", *HOW, "in a checkpoint", "Ctrl-C", "runs"), 0)
    while counts["kills"] < kills:
        counts["runs"] += 1
        out = scratch / f"run-{counts['runs']}"
        while True:
            how = HOW[counts["kills"] % len(HOW)] if counts["kills"] < kills else "not at all"
            at = chance.randint(1, changes) if how == "file" else 0
            if chance.random() < 0.25:  # an earlier moment, at which Ctrl-C leaves a checkpoint within an epoch
                pid = start([*command, str(out)], out, log)
                if not wait(pid, until=time.monotonic() + chance.uniform(0, length)):
                    os.kill(pid, signal.SIGINT)
                counts["Ctrl-C"] += ended(pid, log, 130)
            left = unfinished(out)
            pid = start([*command, str(out)], out, log, die_at=at)
            if how == "time":
                wait(pid, until=time.monotonic() + chance.uniform(0, length))
            elif how == "checkpoint":
                skip = chance.randrange(3)
                if not wait(pid, when=until_written(out, skip)):
                    time.sleep(chance.uniform(0, 0.005))
            if not killed(pid, log, unharmed=how in ("not at all", "file")):
                break
            counts["kills"] += 1
            counts[how] += 1
            counts["in a checkpoint"] += bool(unfinished(out) - left)
            check_whole(out)
        if (got := contents(out)) != expected:
            differ = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
            raise Failed(f"after {counts}: expected the files of the whole run, got others in {', '.join(differ)}")
        shutil.rmtree(out)
    return counts


def start(command: list[str], out: Path, log: Path, die_at: int = 0, count_in: Path | None = None) -> int:
    """Run `tost` in a new process group; before its `die_at`-th change to the folder `out` it kills itself."""
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # for a moment, until the child is ready for it
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return pid
    status = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        changes = watch(out, die_at)
        sys.argv = ["tost", *command]
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if count_in is not None:
            count_in.write_text(str(changes()))
    except KeyboardInterrupt:  # before the command line was there to see it
        status = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def watch(out: Path, die_at: int) -> Callable[[], int]:
    """Count this process's changes to a folder, and kill it before one of them; returns what tells the number.

    A file that it writes under its final name is an error, but in the checkpoints of a trainer, and the empty lock."""
    number, root = 0, str(out)

    def see(event: str, args: tuple[Any, ...]) -> None:
        nonlocal number
        if event == "open":
            ours = isinstance(args[0], str) and args[0].startswith(root) and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
            if ours and ".tmp" not in args[0] and not {"checkpoints", "lock"} & set(Path(args[0]).parts):
                raise Failed(f"expected a temporary name to write to, got {args[0]}")
        else:  # a folder is removed from within: its files have no path then
            ours = event in _CHANGES and (str(args[0]).startswith(root) or (event == "os.remove" and args[1] != -1))
        number += ours
        if ours and number == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(see)
    return lambda: number


def wait(pid: int, until: float | None = None, when: Callable[[], bool] | None = None) -> bool:
    """Wait for the run's end (True), or for a time or an event (False)."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if when() if when is not None else time.monotonic() >= (until or 0):
            return False
        time.sleep(0.0005)
    return True


def killed(pid: int, log: Path, unharmed: bool) -> bool:
    """Kill the run's process group, unless it is to be left alone; whether it died of a kill. Other ends must be good."""
    if not unharmed and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        while True:  # a child just forked has no group of its own yet
            try:
                os.killpg(pid, signal.SIGKILL)
                break
            except ProcessLookupError:
                time.sleep(0.001)
    return ended(pid, log, -signal.SIGKILL)


def ended(pid: int, log: Path, *other: int) -> bool:
    """Wait for the end; True if it was one of the `other` statuses. Raises Failed unless it was that or a good one."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status and status not in other:
        raise Failed(f"expected the run to end well, got status {status}: {log.read_text()[-2000:]}")
    return status != 0


def until_written(out: Path, skip: int) -> Callable[[], bool]:
    """What tells whether the run writes at its checkpoint number `skip`, from 0 on."""
    seen = unfinished(out)
    skip += len(seen)

    def writing() -> bool:
        seen.update(unfinished(out))
        return len(seen) > skip

    return writing


def unfinished(out: Path) -> set[tuple[str, int]]:
    """What is half a checkpoint: its name, and which file it is (each is a new one)."""
    found = set()
    for folder, folders, files in os.walk(out):  # which bears with what goes away meanwhile
        for path in (Path(folder, name) for name in (*folders, *files)):
            partial = path.name.startswith("checkpoint-") and not (path / "trainer_state.json").exists()
            if {"checkpoints", "checkpoints.tmp", "early.tmp"} & set(path.parts) and (
                partial or path.suffix == ".tmp" or path.stem == "writing"
            ):
                with contextlib.suppress(FileNotFoundError):
                    found.add((str(path), path.stat().st_ino))
    return found


def contents(out: Path) -> dict[str, bytes]:
    """Name -> bytes of all that a run leaves, but its checkpoints, its lock and what was under a temporary name."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not {"checkpoints", "early", "lock"} & set(path.parts) and ".tmp" not in str(path)
    }


def check_whole(out: Path) -> None:
    """Raise Failed if a file under its final name is not whole."""
    readers: dict[str, Callable[[Path], Any]] = {
        ".json": lambda path: json.loads(path.read_text()),
        ".jsonl": lambda path: [json.loads(line) for line in path.read_text().splitlines()],
        ".yaml": lambda path: yaml.safe_load(path.read_text())["mask"],
        ".csv": lambda path: next(csv.DictReader(path.open())),
        ".safetensors": load_file,
        ".md": lambda path: path.read_text().index("weights kept"),
    }
    for name in contents(out):
        try:
            readers[Path(name).suffix](out / name)
        except Exception as error:
            raise Failed(f"expected whole files after a kill, got {name}: {error!r}") from error


if __name__ == "__main__":
    main()
