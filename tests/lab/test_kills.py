"""Runs that are killed, checkpoints that are torn, files that are not ours: it goes on, or says in one line why not."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refused, tost
from kills import HOW, TRAINERS, TWEAKS, installed
from safetensors.torch import load_file, save_file

from tost_plugins.lab.job import Stopped
from tost_plugins.lab.lottery import lottery
from tost_plugins.lab.train import train
from tost_plugins.recipe.recipe import Recipe

pytest.importorskip("sklearn")

SCRIPT = Path(__file__).parents[1] / "kills.py"
#: Two epochs of two steps, with a checkpoint after each.
RECIPE: dict[str, Any] = {
    "name": "torn",
    "mask": {"kind": "random", "sparsity": 0.8, "allocation": "erk"},
    "model": "cifar/resnet8",
    "data": {"limit": 32, "batch_size": 16},
    "duration": "2ep",
}


def recipe(trainer: str, **changes: Any) -> Recipe:
    """The recipe for a trainer; skips the test where that is not installed."""
    if trainer != "torch":
        pytest.importorskip(trainer)
    return Recipe.from_dict({**RECIPE, "trainer": trainer, **changes})


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tear(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_of_four_steps_stops_and_goes_on(trainer: str, tmp_path: Path) -> None:
    """0.1dur of four steps is one: ghosts that never trained would have no optimizer state, which Composer misses."""
    short = recipe(trainer, tweaks=[{"kind": "ghost_skip", "until": "0.1dur"}])

    def stop(event: str, values: dict[str, Any]) -> None:
        if event == "step" and values["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    whole = train(short, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(short, tmp_path / "run", listen=stop)
    assert train(short, tmp_path / "run", resume=True) == whole
    left = "model.safetensors"
    assert (tmp_path / "run" / left).read_bytes() == (tmp_path / "whole" / left).read_bytes()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """trainer -> the folder of a run that came to its end; it is not to be changed."""
    done: dict[str, Path] = {}

    def run(trainer: str) -> Path:
        if trainer not in done:
            out = tmp_path_factory.mktemp(trainer) / "run"
            earlier = out.with_name("earlier")
            copy = {"step": lambda step: step == 3 and shutil.copytree(out / "checkpoints", earlier)}
            train(recipe(trainer), out, listen=lambda event, v: copy.get(event, bool)(v.get("step")))
            done[trainer] = out
        return done[trainer]

    return run


def died(whole: Path, out: Path) -> Path:
    """A copy of a run's folder as it is when it dies after its last checkpoint."""
    shutil.copytree(whole, out)
    for name in ("result.json", "model.safetensors", "mask.safetensors"):
        (out / name).unlink()
    return out


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_compact_run_that_dies_behind_its_last_step_says_what_the_whole_one_says(
    trainer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = recipe(trainer, mask={"kind": "synflow", "sparsity": 0.95, "rounds": 4}, compact=True)
    whole = train(spec, tmp_path / "whole")
    caplog.clear()
    with caplog.at_level(logging.INFO, "tost_plugins"):
        assert train(spec, died(tmp_path / "whole", tmp_path / "run"), resume=True) == whole
    assert "compact: 11 modules compute a part of their channels" in caplog.text and whole["left_out"] == []


# ---- killed, again and again


def rows_of(*args: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *args],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}, capture_output=True, text=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (rows, done.stderr[-2000:])
    return rows


def test_killed_runs_end_as_if_nothing_had_happened() -> None:
    trainers = [trainer for trainer in TRAINERS if installed(trainer)]
    rows = rows_of("--trainers", *trainers, "--methods", "tost", "--kills", "3")
    assert [row["trainer"] for row in rows] == trainers
    assert all(row["kills"] == 3 and [row[how] for how in HOW] == [1, 1, 1] for row in rows)


@pytest.mark.long
@pytest.mark.parametrize("trainer", TRAINERS)
def test_killed_fifty_times(trainer: str) -> None:
    recipe(trainer)
    rows = rows_of("--trainers", trainer, "--kills", "50")
    assert sum(row["kills"] for row in rows) == 50 and sum(row["in a checkpoint"] for row in rows) > 0


@pytest.mark.long
def test_lottery_rounds_killed_twenty_times() -> None:
    (row,) = rows_of("--trainers", "torch", "--methods", "lottery", "--kills", "20")
    assert row["kills"] == 20


def test_the_loss_of_an_epoch_survives_a_kill_in_the_checkpoint_after_a_stop(tmp_path: Path) -> None:
    spec, out = recipe("torch", duration="1ep", data={"limit": 64, "batch_size": 16}), tmp_path / "run"
    result = train(spec, tmp_path / "whole")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Stopped, match="stopped at step 2 of 4"):
            train(spec, out, listen=lambda e, v: os.kill(os.getpid(), signal.SIGINT) if v.get("step") == 2 else None)
    finally:
        signal.signal(signal.SIGINT, before)
    shutil.copytree(out / "checkpoints", tmp_path / "step-2")
    assert train(spec, out, resume=True) == result
    # the end of the epoch is written down, and its checkpoint is not there yet
    (out / "result.json").unlink()
    shutil.rmtree(out / "checkpoints")
    (tmp_path / "step-2").rename(out / "checkpoints")
    assert json.loads((out / "progress.json").read_text())["step"] == 4
    assert train(spec, out, resume=True) == result


# ---- torn and foreign checkpoints


@pytest.mark.parametrize("trainer", TRAINERS)
def test_torn_and_foreign_checkpoints_are_named_and_nothing_is_overwritten(
    ended: Callable[[str], Path], tmp_path: Path, trainer: str
) -> None:
    spec = recipe(trainer)
    out = died(ended(trainer), tmp_path / "run")
    files = [path for path in (out / "checkpoints").rglob("*") if path.is_file()]
    torn = [path for path in files if path.name != "trainer_state.json"]  # that one is written last: see below
    assert torn

    def go_on() -> None:
        train(spec, out, resume=True)

    for path in torn:
        whole = path.read_bytes()
        tear(path)
        before = contents(out)
        refused(go_on, "--resume", "expected a whole checkpoint", path, "remove", "to start anew")
        assert contents(out) == before
        if path.parent.name != "checkpoints" and path.name != "training_args.bin":
            path.unlink()
            refused(go_on, "--resume", "expected a whole checkpoint", path.parent, f"got one without {path.name}")
        path.write_bytes(whole)
    weights = next(path for path in files if path.name in ("last.pt", "model.safetensors"))
    save: Any = torch.save if weights.suffix == ".pt" else save_file
    for other in ({"fc.weight": torch.ones(2, 2)}, load_file(ended(trainer) / "model.safetensors")):
        save(other, weights)  # of another network, and of this network before it was sparse
        before = contents(out)
        refused(go_on, "--resume", weights, "expected a checkpoint of this run")
        assert contents(out) == before
    shutil.rmtree(out / "checkpoints")
    go_on()
    assert contents(out).keys() >= {out / name for name in ("result.json", "model.safetensors", "mask.safetensors")}
    assert (out / "model.safetensors").read_bytes() == (ended(trainer) / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("trainer", "last", "torn", "named"),
    [
        ("transformers", "checkpoint-4", "model.safetensors", True),
        ("transformers", "checkpoint-4", "optimizer.pt", True),
        ("transformers", "checkpoint-4", "trainer_state.json", False),
        ("accelerate", "step-4", "random_states_0.pkl", True),
    ],
)
def test_where_the_newest_is_torn_the_one_before_is_taken(
    ended: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    trainer: str, last: str, torn: str, named: bool,
) -> None:  # fmt: skip
    spec = recipe(trainer)
    out = died(ended(trainer), tmp_path / "run")
    shutil.copytree(ended(trainer).with_name("earlier"), out / "checkpoints", dirs_exist_ok=True)
    tear(out / "checkpoints" / last / torn)
    steps: list[int] = []
    with caplog.at_level(logging.WARNING, "tost_plugins"):
        result = train(
            spec, out, resume=True, listen=lambda event, v: steps.append(v["step"]) if event == "step" else None
        )
    assert steps == [3, 4] and result == json.loads((ended(trainer) / "result.json").read_text())
    said = [record.getMessage() for record in caplog.records if "damaged file" in record.getMessage()]
    assert [last in text and torn in text and "going on from" in text for text in said] == [True] * named
    assert (out / "model.safetensors").read_bytes() == (ended(trainer) / "model.safetensors").read_bytes()
    assert [path.name for path in (out / "checkpoints").iterdir()] == [last]


@pytest.mark.parametrize("name", ["result.json", "progress.json", "history.jsonl", "recipe.yaml"])
def test_torn_notes_of_a_run_are_named(ended: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    shutil.copytree(ended("torch"), out)
    if name in ("progress.json", "history.jsonl"):
        (out / "result.json").unlink()
    tear(out / name)
    before = contents(out)
    refused(lambda: train(recipe("torch"), out, resume=True), out / name if name != "recipe.yaml" else name)
    assert contents(out) == before


def test_torn_rounds_of_a_lottery_are_named(tmp_path: Path) -> None:
    spec = recipe("torch", mask={"kind": "lottery_ticket", "sparsity": 0.5, "prune": 0.5, "rewind": "1ba"})
    lottery(spec, tmp_path)
    for path, where in (("round-00/model.safetensors", "round 0"), ("round-00/early/last.pt", "round 1")):
        whole, file = (tmp_path / path).read_bytes(), tmp_path / path
        if "early" in path:  # the second round is about to begin with it
            shutil.rmtree(tmp_path / "round-01")
        tear(file)
        before = contents(tmp_path)
        refused(lambda: lottery(spec, tmp_path, resume=True), where, "last.pt" if "early" in path else path)
        after = contents(tmp_path)
        assert {path: after.get(path) for path in before if path.name != "lottery.csv"}.items() <= before.items()
        file.write_bytes(whole)


def test_masks_and_exports_of_torn_and_foreign_files_write_nothing(
    ended: Callable[[str], Path], tmp_path: Path
) -> None:
    run, old = ended("torch"), tmp_path / "old.safetensors"
    old.write_bytes(b"of value")
    for name in ("mask.safetensors", "model.safetensors", "checkpoints/last.pt"):
        torn = tmp_path / Path(name).name
        shutil.copy(run / name, torn)
        tear(torn)
        refused(lambda torn=torn: tost("mask", "convert", torn, old), torn)
        refused(lambda torn=torn: tost("mask", "inspect", torn), torn)
        refused(lambda torn=torn: tost("export", torn, old), torn)
    (tmp_path / "notes.pt").write_text("hello")
    refused(lambda: tost("mask", "convert", tmp_path / "notes.pt", old), "notes.pt")
    refused(lambda: tost("export", tmp_path / "notes.pt", old), "notes.pt")
    refused(lambda: tost("export", run / "mask.safetensors", old), "expected a checkpoint, got a mask file")
    refused(lambda: tost("export", run / "model.safetensors", run / "model.safetensors"), "the checkpoint itself")
    assert old.read_bytes() == b"of value"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last.pt", "mask.safetensors", "model.safetensors", "notes.pt", "old.safetensors",
    ]  # fmt: skip


# ---- another recipe


def test_a_changed_recipe_is_refused_with_what_has_changed(ended: Callable[[str], Path], tmp_path: Path) -> None:
    out = died(ended("torch"), tmp_path / "run")
    changes: Iterator[tuple[dict[str, Any], str]] = iter(
        [
            ({"trainer": "composer"}, "(trainer 'composer', there 'torch'); no trainer reads another's checkpoints"),
            ({"mask": {**RECIPE["mask"], "sparsity": 0.5}}, "(mask.sparsity 0.5, there 0.8); use"),
            ({"tweaks": TWEAKS[:1]}, "tweaks.0.kind 'ghost_skip', there None"),
            ({"duration": "3ep", "seed": 1}, "(seed 1, there 0, duration '3ep', there '2ep')"),
        ]
    )
    before = contents(out)
    for change, text in changes:
        spec = Recipe.from_dict({**RECIPE, **change})
        refused(lambda spec=spec: train(spec, out, resume=True), "expected the recipe that", out, text)
        assert contents(out) == before
    # a name changes nothing that is trained
    assert train(recipe("torch", name="another"), out, resume=True)["name"] == "another"
