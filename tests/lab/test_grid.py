"""`tost study` and the grid below it: nothing runs twice, and what was killed goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import tost

from tost_plugins import Mask, Recipe, TostError
from tost_plugins.lab import grid
from tost_plugins.lab.grid.starts import start_with_signs
from tost_plugins.lab.studies import registry as studies
from tost_plugins.lab.superpose import Cycles
from tost_plugins.lab.train import prepare
from tost_plugins.training.params import prunable

for needed in ("sklearn", "matplotlib", "scipy"):
    pytest.importorskip(needed)

TINY = ["data.limit=96", "data.batch_size=32", "duration=1ep"]


def sets(*changes: str) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def test_the_command_counts_runs_then_runs_what_is_left(tmp_path: Path) -> None:
    args = ("study", "freeze", *sets(*TINY, "duration=1ep"), "--out", tmp_path / "f", "--json")
    before = json.loads(tost(*args, "--dry-run"))
    assert before == {"cells": 3, "left": 3, "seconds": None} and not (tmp_path / "f").exists()
    summary = json.loads(tost(*args))["summary"]
    assert json.loads(tost(*args, "--dry-run"))["left"] == 0
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    (tmp_path / "f/dnw-1ep-seed0/cell.json").unlink()
    plan = json.loads(tost(*args, "--dry-run"))
    assert plan["left"] == 1 and plan["seconds"] > 0
    accuracies = [row["value"] for row in summary if row["quantity"].startswith("test")]
    again = json.loads(tost(*args))["summary"]
    assert [row["value"] for row in again if row["quantity"].startswith("test")] == accuracies
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert {path.name for path in (tmp_path / "f").glob("freeze*")} == {
        "freeze.csv", "freeze-summary.csv", "freeze.json", "freeze.png",
    }  # fmt: skip
    with pytest.raises(TostError, match="got dnw-0ep-seed0 of others"):
        tost("study", "freeze", *sets(*TINY, "optimizer.lr=0.2"), "--out", tmp_path / "f")


def test_what_cannot_be_studied_is_one_line() -> None:
    with pytest.raises(TostError, match="tost study: expected a known study, got 'ablatoin'; did you mean 'ablation'"):
        tost("study", "ablatoin")
    with pytest.raises(TostError, match="--size: expected a known size"):
        tost("study", "freeze", "--size", "huge")
    with pytest.raises(TostError, match="--seeds: expected at least 1"):
        tost("study", "freeze", "--seeds", "0")
    assert {row["name"] for row in json.loads(tost("study", "list", "--json"))} == set(studies.STUDIES)


def test_side_by_side_gives_what_one_after_another_gives(tmp_path: Path) -> None:
    cells = [cell for cell in studies.cells("reinit", "smoke", TINY, 1) if cell.name.startswith("dnw")]
    cells = [cell for cell in cells if "random_structure__new" in cell.name or cell.parent is None]
    one, two = (grid.run(cells, tmp_path / str(jobs), jobs) for jobs in (1, 2))
    assert [r["name"] for r in one] == [r["name"] for r in two] == [cell.name for cell in cells] and len(cells) == 2
    for a, b in zip(one, two, strict=True):
        assert a["result"]["history"] == b["result"]["history"]
        assert (a["folder"] / "model.safetensors").read_bytes() == (b["folder"] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cell_that_another_process_runs_is_left_for_later(jobs: int, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    cells = studies.cells("reinit", "smoke", TINY, 1)
    parent, child, other = (
        next(cell for cell in cells if start in cell.name)
        for start in ("dnw-0.9-seed", "dnw-0.9-its_own_first_weights", "rigl-0.9-seed")
    )
    (tmp_path / parent.name).mkdir()
    order = []
    with (tmp_path / parent.name / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another process would

        def listen(event: str, values: dict[str, Any]) -> None:
            if event == "cell":
                order.append(values["name"])
                fcntl.flock(file, fcntl.LOCK_UN)

        records = grid.run([parent, child, other], tmp_path, jobs, listen=listen)
    assert order == [other.name, parent.name, child.name]
    assert [record["name"] for record in records] == [parent.name, child.name, other.name]


def test_a_ticket_is_found_once_and_then_trained_with_every_tweak(tmp_path: Path) -> None:
    ticket = ["mask={kind: lottery_ticket, sparsity: 0.9, prune: 0.7, on_collapse: keep_one}", "duration=2ba"]
    cells = studies.cells("ablation", "smoke", [*TINY, *ticket], 1)
    assert [cell.name for cell in cells if cell.parent is None] == ["ticket-seed0"] and len(cells) == 7
    records = grid.run([cells[0], cells[1], cells[3]], tmp_path)
    found = [Mask.load(record["folder"] / "mask.safetensors") for record in records]
    assert found[0] == found[1] == found[2] and found[0].sparsity == pytest.approx(0.9, abs=0.02)
    assert records[0]["folder"].name.startswith("round-") and not records[0]["labels"]
    rows = studies.STUDIES["ablation"].rows(records, "smoke")
    assert [row["training"] for row in rows] == ["plain", "soft_activation", "soft_activation"]


def test_cycles_make_one_network_of_the_tickets_of_a_run(tmp_path: Path) -> None:
    content = {"mask": {"kind": "set", "sparsity": 0.8, "every": "2ba"}, "model": "cifar/resnet8", "duration": "4ep",
               "data": {"name": "digits", "limit": 96, "batch_size": 32}}  # fmt: skip
    made = [grid.Cell("sup", Recipe.from_dict(content), {"seed": 0}, cycles=Cycles(count=2, share=0.5))]
    (record,) = grid.run(made, tmp_path)
    assert len(list((tmp_path / "sup").glob("ticket-*.pt"))) == 2 and grid.finished(made, tmp_path) == [record]
    mask = Mask.load(record["folder"] / "mask.safetensors")
    assert record["result"]["kept_weights"] == mask.kept == round(0.2 * mask.size)
    assert 0 < record["result"]["live"] <= mask.kept
    with pytest.raises(TostError, match="got sup of others"):
        grid.finished([replace(made[0], cycles=Cycles(count=3, share=0.5))], tmp_path)


def test_constant_signs_start_a_run(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(
        {"mask": {"kind": "random", "sparsity": 0.5}, "model": "cifar/resnet8", "duration": "1ba"}
    )
    own = prunable(prepare(recipe, tmp_path).model)
    model = prepare(recipe, tmp_path).model
    start_with_signs(model, None)
    for name, weight in prunable(model).items():
        assert weight.abs().unique().numel() == 1 and bool((weight.sign() == own[name].sign()).all())


@pytest.mark.long
@pytest.mark.parametrize(("jobs", "how"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGINT)])
def test_a_killed_study_goes_on(jobs: int, how: signal.Signals, tmp_path: Path) -> None:
    changes = ["data.limit=128", "data.batch_size=16", "duration=3ep"]
    command = [sys.executable, "-m", "tost_plugins", "study", "ablation", *sets(*changes), "--json"]
    command += ["--jobs", str(jobs), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(list((tmp_path / "killed").glob("*/cell.json"))) < 2:
        time.sleep(0.02)
    process.send_signal(how)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == (130 if how == signal.SIGINT else -how), said
    finished = {path: path.read_text() for path in (tmp_path / "killed").glob("*/cell.json")}
    assert 2 <= len(finished) < 6
    subprocess.run(command, env=os.environ, check=True, timeout=300, capture_output=True)
    assert all(path.read_text() == text for path, text in finished.items())
    whole = studies.run("ablation", tmp_path / "whole", "smoke", changes)
    killed = json.loads((tmp_path / "killed/ablation.json").read_text())
    assert killed["rows"] == whole["rows"]
