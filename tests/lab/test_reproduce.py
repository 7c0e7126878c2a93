"""`tost reproduce`: the published numbers, the runs beside them, and what is done of them so far."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import tost

from tost_plugins import Mask, Recipe, TostError
from tost_plugins.lab import reproduce

for needed in ("sklearn", "matplotlib"):
    pytest.importorskip(needed)

DIGITS = ("data={name: digits, limit: 96, batch_size: 32}", "model=cifar/resnet8", "duration=1ep")
SETS = [part for change in DIGITS for part in ("--set", change)]
TINY = ["table2", "--protocol", "cpu", "--masks", "random", "--sparsities", "95", *SETS]


def table(*args: object) -> str:
    return tost("reproduce", *args)


def gains(name: str, training: str = "tost") -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in reproduce.published(name):
        if row["training"] == training:
            found.setdefault(row["mask"], []).append(row["difference"])
    return found


def test_the_published_gains_of_table_2() -> None:
    assert gains("table2") == {
        "random": [1.58, 1.76, 2.07], "snip": [0.57, 0.83, 0.34], "grasp": [0.78, 1.38, 1.22],
        "synflow": [1.38, 0.39, 3.72], "lottery_ticket": [0.87, 0.62, 1.12],
    }  # fmt: skip
    assert gains("table2-cifar100")["random"] == [2.06, 0.06, 14.15]
    assert gains("table2-resnet50")["random"][0] == 7.62


def test_the_published_gains_of_the_other_tables() -> None:
    assert gains("table3") == {"snip": [0.53, 1.04, 2.02], "lottery_ticket": [1.41, 0.50, 1.57]}
    assert gains("table4") == {"lottery_ticket": [1.08, 1.09, 1.99, 2.11, 2.51]}
    assert gains("table4", "ghost_skip") == {"lottery_ticket": [0.56, 0.75, 0.95, 1.05, 2.15]}
    assert gains("table5", "ghost_skip") == {"lottery_ticket": [-0.77, 0.03, 0.56, 2.15]}
    assert gains("table5", "soft_activation") == {"lottery_ticket": [0.11, 0.29, 0.24, 1.28]}


@pytest.mark.parametrize("mask", ["random", "snip", "grasp", "synflow"])
@pytest.mark.parametrize("sparsity", [90, 95, 98])
def test_the_full_protocol_is_the_shipped_recipes(mask: str, sparsity: int) -> None:
    plain, tost = reproduce.cells("table2", "full", [mask], [sparsity], seeds=1)
    shipped, keep_one = Recipe.load(f"cifar10_{mask}_{sparsity}").to_dict(), {"on_collapse": "keep_one"}
    names = {"name": tost.recipe.name, "source": tost.recipe.source, "mask": shipped["mask"] | keep_one}
    assert tost.recipe.to_dict() == shipped | names
    assert plain.recipe.to_dict() == shipped | names | {"name": plain.recipe.name, "tweaks": []}


@pytest.mark.parametrize("name", list(reproduce.TABLES))
@pytest.mark.parametrize("protocol", list(reproduce.PROTOCOLS))
def test_every_published_row_has_its_runs(name: str, protocol: str) -> None:
    made = reproduce.cells(name, protocol, seeds=1)
    names = [cell.name for cell in made]
    assert len(set(names)) == len(names)
    assert all(cell.parent is None or cell.parent in names[: names.index(cell.name)] for cell in made)
    there = {(c.labels["mask"], c.labels["sparsity"], c.labels["training"]) for c in made if c.labels}
    published = {(row["mask"], row["sparsity"], row["training"]) for row in reproduce.published(name)}
    if protocol == "full":
        assert published <= there
    assert {place for place in there if place[2] != "plain"} <= published
    assert {(*place[:2], "plain") for place in there} <= there


def test_tickets_are_found_once_for_all_trainings() -> None:
    made = reproduce.cells("table4", "short", sparsities=[90], seeds=1)
    ticket, *others = made
    assert [cell.labels["training"] for cell in others] == [
        "plain", "ghost_skip", "soft_activation", "rescaled_init", "label_smoothing", "tost",
    ]  # fmt: skip
    assert all(cell.parent == ticket.name for cell in others) and not ticket.labels
    assert reproduce.plan(made, "nowhere")["trainings"] == 6 + len(ticket.recipe.mask.sparsities())


def test_the_command_runs_a_table_and_goes_on_with_it(tmp_path: Path) -> None:
    args = [*TINY, "--masks", "snip", "--out", tmp_path / "r"]
    plan = json.loads(table(*args, "--seeds", "2", "--dry-run", "--json"))
    assert plan == {"cells": 8, "left": 8, "seconds": None, "trainings": 8} and not (tmp_path / "r").exists()
    with pytest.raises(TostError, match="expected finished runs with and without tweaks, got none"):
        table(*args, "--finished")
    one = json.loads(table(*args, "--seeds", "1", "--json"))
    assert [(row["mask"], row["seeds"]) for row in one["summary"]] == [("random", 1), ("snip", 1)] and not one["left"]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert json.loads(table(*args, "--seeds", "2", "--finished", "--json"))["left"] == 4
    assert json.loads(table(*args, "--seeds", "2", "--dry-run", "--json"))["left"] == 4
    both = json.loads(table(*args, "--seeds", "2", "--json"))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps and not both["left"]
    result = json.loads((tmp_path / "r/table2.json").read_text())
    assert result["summary"] == both["summary"] and (tmp_path / "r/table2.png").read_bytes().startswith(b"\x89PNG")
    shown = table(*args, "--seeds", "2")
    assert "+1.76" in shown and "+0.83" in shown and "cifar/resnet8 on digits (96 images), 1ep, 2 seeds" in shown


def test_a_row_is_the_mean_of_paired_differences(tmp_path: Path) -> None:
    result = reproduce.run("table2", tmp_path, "cpu", ["random"], [95], DIGITS, 2)
    accuracies = {
        cell: json.loads((tmp_path / f"random-95-{cell}" / "result.json").read_text())["test_accuracy"]
        for cell in ("plain-seed0", "tost-seed0", "plain-seed1", "tost-seed1")
    }
    first, second = (accuracies[f"tost-seed{n}"] - accuracies[f"plain-seed{n}"] for n in (0, 1))
    (row,) = result["summary"]
    assert row["difference"] == pytest.approx((first + second) / 2)
    assert row["difference_std"] == pytest.approx(abs(first - second) / 2**0.5)
    assert row["difference_of_differences"] == pytest.approx(row["difference"] - 1.76)
    (line,) = csv.DictReader((tmp_path / "table2.csv").open())
    assert float(line["published_plain"]) == 89.68 and float(line["plain"]) == row["plain"]
    masks = [Mask.load(tmp_path / f"random-95-{training}-seed0/mask.safetensors") for training in ("plain", "tost")]
    assert masks[0] == masks[1]


def test_table_5_has_gains_only(tmp_path: Path) -> None:
    result = reproduce.run("table5", tmp_path, "cpu", sparsities=[0], changes=DIGITS, seeds=1)
    assert [row["training"] for row in result["summary"]] == ["ghost_skip", "soft_activation"]
    assert [row["published_difference"] for row in result["summary"]] == [-0.77, 0.11]
    assert {row["paper plain"] for row in reproduce.shown(result["summary"])} == {""}
    assert Mask.load(tmp_path / "lottery_ticket-0-plain-seed0/mask.safetensors").sparsity == 0


def test_what_is_done_is_shown_while_another_process_runs_the_rest(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    command = [
        sys.executable,
        "-m",
        "tost_plugins",
        "reproduce",
        *TINY,
        "--seeds",
        "3",
        "--out",
        str(tmp_path),
        "--json",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    while process.poll() is None and len(list(tmp_path.glob("*/cell.json"))) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)  # in the middle of it
    try:
        shown = json.loads(table(*TINY, "--seeds", "3", "--out", tmp_path, "--finished", "--json"))
        assert 0 < shown["left"] < 6 and shown["summary"][0]["seeds"] >= 1
        with pytest.raises(TostError, match="expected a folder that no other process works in, got one that is in use"):
            table(*TINY, "--seeds", "3", "--out", tmp_path)
    finally:
        process.send_signal(signal.SIGCONT)
    said = process.communicate(timeout=300)
    assert process.returncode == 0 and json.loads(said[0])["summary"][0]["seeds"] == 3, said


def test_what_cannot_be_reproduced_is_one_line() -> None:
    with pytest.raises(TostError, match="expected a known table, got 'tabel2'; did you mean 'table2'"):
        table("tabel2")
    with pytest.raises(TostError, match="--protocol: expected a known protocol, got 'long'"):
        table("table2", "--protocol", "long")
    with pytest.raises(TostError, match="--masks: expected a known mask of table2, got 'rigl'"):
        table("table2", "--masks", "snip,rigl", "--dry-run")
    with pytest.raises(TostError, match="--sparsities: expected a known sparsity of table2, got 97"):
        table("table2", "--sparsities", "97", "--dry-run")
    with pytest.raises(TostError, match="--sparsities: expected percents, got 'many'"):
        table("table2", "--sparsities", "many", "--dry-run")
    with pytest.raises(TostError, match="--seeds: expected at least 1, got 0"):
        table("table2", "--seeds", "0", "--dry-run")
    with pytest.raises(TostError, match="use --masks and --sparsities"):
        table("table2", "--set", "mask.sparsity=0.5", "--dry-run")
