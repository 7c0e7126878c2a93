"""`tost study` and the grid below it: nothing runs twice, and what was killed goes on."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import refused, tost

from tost_plugins import Mask, Recipe, TostError
from tost_plugins.files.atomic import write
from tost_plugins.lab import grid
from tost_plugins.lab.grid.starts import start_with_signs
from tost_plugins.lab.studies import registry as studies
from tost_plugins.lab.superpose import Cycles
from tost_plugins.lab.train import prepare
from tost_plugins.training.clock import Time
from tost_plugins.training.params import prunable

for needed in ("sklearn", "matplotlib", "scipy"):
    pytest.importorskip(needed)

Measure = Callable[..., list[dict[str, Any]]]
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


def tiny(name: str, **rest: Any) -> grid.Cell:
    """A run of two epochs of two steps, which has a checkpoint after each."""
    content = {"name": name, "mask": {"kind": "random", "sparsity": 0.5}, "model": "cifar/resnet8", "duration": "2ep"}
    recipe = Recipe.from_dict({**content, "data": {"name": "digits", "limit": 32, "batch_size": 16}})
    return grid.Cell(name, recipe, {"name": name}, **rest)


def refuses(folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    raise TostError("expected the impossible, got what there is; ask for less")


def breaks(folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    raise ZeroDivisionError("of nothing")


def dies(folder: Path, recipe: Recipe, times: int) -> list[dict[str, Any]]:
    """Kills its process the first `times` times, and then says how often it was here."""
    with (folder / "deaths").open("a") as file:
        file.write("x")
    here = (folder / "deaths").stat().st_size
    if here <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return [{"here": here, "pid": os.getpid()}]


@pytest.mark.parametrize(("jobs", "measure"), [(1, refuses), (1, breaks), (2, breaks)])
def test_a_cell_that_fails_holds_up_its_children_alone(jobs: int, measure: Measure, tmp_path: Path) -> None:
    bad, trace = tiny("bad", measure=measure), tmp_path / "bad/traceback.txt"
    why = "expected the impossible, got what there is"
    if measure is breaks:
        why = f"its run ended with ZeroDivisionError: of nothing; where: {trace}"
    cells, told = [bad, tiny("child", parent="bad"), tiny("good"), tiny("grandchild", parent="child")], []
    text = refused(lambda: grid.run(cells, tmp_path, jobs, listen=lambda event, v: told.append((event, v.get("name")))))
    assert f"expected 4 runs to end well, got 3 that failed (bad: {why}" in text
    assert "the same command runs those again" in text
    assert [record["name"] for record in grid.finished(cells, tmp_path)] == ["good"]
    told = [each for each in told if each[0] in ("failed", "cell")]
    assert sorted(told) == [("cell", "good"), ("failed", "bad"), ("failed", "child"), ("failed", "grandchild")]
    if measure is refuses:
        assert refused(lambda: grid.run([bad], tmp_path)) == f"bad: {why}; ask for less"
    else:
        assert "in breaks" in trace.read_text()
    assert len(grid.run([tiny("bad"), *cells[1:]], tmp_path)) == 4 and not trace.exists()


def test_processes_stay_warm_and_one_that_dies_takes_only_its_cell_along(tmp_path: Path) -> None:
    cells = [tiny(f"c{n}", measure=dies, options={"times": 3 if n == 0 else 0}) for n in range(5)]
    told = []
    text = refused(
        lambda: grid.run(cells, tmp_path, 2, listen=lambda event, values: told.append((event, values["name"])))
    )
    assert text == "c0: its process died"
    others = [("cell", cell.name) for cell in cells[1:]]
    assert sorted(told) == sorted([("again", "c0"), ("again", "c0"), ("failed", "c0"), *others])
    rows = [record["rows"][0] for record in grid.finished(cells, tmp_path)]
    assert [row["here"] for row in rows] == [1, 1, 1, 1]  # each of the others once
    assert len({row["pid"] for row in rows}) < len(rows) and multiprocessing.active_children() == []


def lingers(folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """Stays until it is killed, the first time."""
    if not (folder / "pid").exists():
        write(folder / "pid", str(os.getpid()))
        time.sleep(3600)
    return [{"pid": int((folder / "pid").read_text())}]


def killing(checkpoints: Path, kill: Callable[[], object]) -> threading.Thread:
    """Calls `kill`, once, when the first checkpoint of a run is there."""

    def wait() -> None:
        while not checkpoints.exists() or not list(checkpoints.iterdir()):
            time.sleep(0.005)
        kill()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_process_killed_in_the_middle_of_a_cell_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    cell, again = tiny("c"), []
    cell = dataclasses.replace(cell, recipe=cell.recipe.model_copy(update={"duration": Time.parse("40ep")}))
    (whole,) = grid.run([cell], tmp_path / "whole")
    thread = killing(tmp_path / "killed/c/checkpoints", lambda: multiprocessing.active_children()[0].kill())
    (killed,) = grid.run([cell], tmp_path / "killed", 2, listen=lambda event, v: again.append(event))
    thread.join()
    assert again == ["again", "cell"] and killed["result"] == whole["result"]
    networks = [(record["folder"] / "model.safetensors").read_bytes() for record in (whole, killed)]
    assert networks[0] == networks[1]


def test_a_script_without_a_main_guard_runs_a_grid_whose_processes_end_with_it(tmp_path: Path) -> None:
    lines = ["import sys", "from test_grid import grid, lingers, tiny"]
    (tmp_path / "script.py").write_text("\n".join([*lines, "grid.run([tiny('a', measure=lingers)], sys.argv[1], 2)"]))
    out, path = tmp_path / "out", os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen([sys.executable, tmp_path / "script.py", out], env={**os.environ, "PYTHONPATH": path})
    while process.poll() is None and not (out / "a/pid").exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    inner = int((out / "a/pid").read_text())
    while Path(f"/proc/{inner}/cmdline").exists() and Path(f"/proc/{inner}/cmdline").read_bytes():
        time.sleep(0.02)
    (record,) = grid.run([tiny("a", measure=lingers)], out)  # nothing keeps it out of the folder
    assert record["rows"] == [{"pid": inner}]


def locks(folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """Has a lock among processes until the end, as progress bars have one."""
    global _lock
    _lock = multiprocessing.get_context("spawn").Lock()
    return [{}]


def test_processes_clean_up_behind_their_last_cell(tmp_path: Path) -> None:
    code = "import sys; from test_grid import grid, locks, tiny; grid.run([tiny('a', measure=locks)], sys.argv[1], 2)"
    path = os.pathsep.join(path for path in sys.path if path)
    command, env = [sys.executable, "-c", code, tmp_path / "out"], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def stubborn(folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """Goes on for ever, and notes that it was asked to stop."""
    write(folder / "pid", str(os.getpid()))
    while True:
        try:
            time.sleep(0.02)
        except KeyboardInterrupt:
            write(folder / "asked", "")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_grid_that_is_stopping_does_not_wait_when_it_is_told_again(how: signal.Signals, tmp_path: Path) -> None:
    lines = ["import sys", "from test_grid import grid, stubborn, tiny"]
    (tmp_path / "script.py").write_text("\n".join([*lines, "grid.run([tiny('a', measure=stubborn)], sys.argv[1], 2)"]))
    out, path = tmp_path / "out", os.pathsep.join(path for path in sys.path if path)
    command, env = [sys.executable, tmp_path / "script.py", out], {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    for name, then in (("pid", signal.SIGINT), ("asked", how)):
        while process.poll() is None and not (out / "a" / name).exists():
            time.sleep(0.02)
        process.send_signal(then)
    process.wait(60)
    inner = int((out / "a/pid").read_text())
    while Path(f"/proc/{inner}/cmdline").exists() and Path(f"/proc/{inner}/cmdline").read_bytes():
        time.sleep(0.02)
    assert not (out / "a/cell.json").exists()


def test_a_finished_cell_stays_one_when_its_recipe_gets_another_name(tmp_path: Path) -> None:
    cell = tiny("a")
    (record,) = grid.run([cell], tmp_path)
    renamed = dataclasses.replace(cell, recipe=cell.recipe.model_copy(update={"name": "b", "source": "elsewhere"}))
    assert grid.finished([renamed], tmp_path) == [record]


def test_a_folder_is_for_one_grid_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    cells = [tiny("a"), tiny("b")]
    seen = []

    def meanwhile(event: str, values: dict[str, Any]) -> None:
        if event == "cell":
            refused(
                lambda: grid.run(cells, tmp_path), "--out", tmp_path, "got one that is in use", "choose another folder"
            )
            seen.append(len(grid.finished(cells, tmp_path)))

    assert len(grid.run(cells, tmp_path, listen=meanwhile)) == 2 and seen == [1, 2]
    assert len(grid.run(cells, tmp_path)) == 2


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
