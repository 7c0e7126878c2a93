"""The language model with an LSTM, small: its text, its perplexity, its cells and its tables."""

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tost_plugins import TostError
from tost_plugins.training.clock import Clock

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = ["--steps", "52", "--hidden", "8", "--limit", "16000"]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


def test_each_paragraph_of_the_text_is_there_once() -> None:
    lines = importlib.import_module("letters").paragraphs().split("\n")
    assert len(lines) > 1000 and len(set(lines)) == len(lines) and all(lines)


def test_rare_letters_are_one_and_the_parts_follow_each_other() -> None:
    letters = importlib.import_module("letters")
    found = letters.Text.of("ab" * 40 + "c" * 20)
    assert found.letters == 3
    assert found.train.tolist() == [1, 2] * 40 and found.validation.tolist() == found.test.tolist() == [0] * 10


def test_pieces_go_on_where_the_last_one_ended() -> None:
    letters = importlib.import_module("letters")
    ids = torch.arange(letters.COLUMNS * 120 + 3)
    cut = letters.pieces(ids)
    assert [len(x) for x, _ in cut] == [50, 50, 19]
    assert torch.cat([x for x, _ in cut])[:, 1].tolist() == list(range(120, 239))
    assert all(torch.equal(y, x.flatten() + 1) for x, y in cut)
    assert [first for _, (*_, first) in zip(range(5), letters.endlessly(cut), strict=False)] == [1, 0, 0, 1, 0]


def test_who_knows_nothing_is_as_perplexed_as_there_are_letters() -> None:
    letters = importlib.import_module("letters")
    net = letters.Letters(7, hidden=4)
    for param in net.parameters():
        param.data.zero_()
    ids = torch.randint(7, (4000,), generator=torch.Generator().manual_seed(0))
    assert letters.perplexity(net, ids) == pytest.approx(7)
    net.head.bias.data[0] = math.log(6.0)  # half of its trust is in the first
    right = float(torch.cat([y for _, y in letters.pieces(ids)]).eq(0).float().mean())
    assert letters.perplexity(net, ids) == pytest.approx(2**right * 12 ** (1 - right), rel=1e-4)


def run(recurrent: Any, out: Path, system: str, optimizer: str, *more: str) -> dict[str, Any]:
    args = recurrent.parser().parse_args(["--out", str(out), *SMALL, *more])
    return recurrent.cell(args, recurrent.Place(system, 0.0 if system == "dense" else 0.67, optimizer, 0))


@pytest.mark.parametrize("optimizer", ["sgd", "asgd"])
def test_a_cell_learns_and_is_kept(optimizer: str, tmp_path: Path) -> None:
    recurrent = importlib.import_module("recurrent")
    record = run(recurrent, tmp_path, "selfish", optimizer)
    chance = recurrent.text(16000).letters
    assert set(record["test"]) == ({"last"} if optimizer == "sgd" else {"averaged", "usual", "last"})
    assert all(1 < value < 0.9 * chance for part in ("validation", "test") for value in record[part].values())
    if optimizer == "asgd":
        assert len(set(record["test"].values())) == 3  # what has come back is averaged otherwise
    before = (tmp_path / f"selfish-67-{optimizer}-seed0.json").stat().st_mtime_ns
    assert run(recurrent, tmp_path, "selfish", optimizer) == record
    assert (tmp_path / f"selfish-67-{optimizer}-seed0.json").stat().st_mtime_ns == before
    with pytest.raises(TostError, match="expected results of these settings"):
        run(recurrent, tmp_path, "selfish", optimizer, "--steps", "60")


def test_a_mask_that_stands_still_averages_alike_and_says_what_finds_nothing(tmp_path: Path) -> None:
    recurrent = importlib.import_module("recurrent")
    record = run(recurrent, tmp_path, recurrent.TOST, "asgd")
    assert record["test"]["averaged"] == pytest.approx(record["test"]["usual"], rel=1e-4)
    assert [why.split()[0] for why in record["left_out"]] == ["ghost_skip", "soft_activation", "masks"]


def test_only_gates_that_stand_apart_keep_their_counts(tmp_path: Path) -> None:
    recurrent = importlib.import_module("recurrent")
    apart, shared = (run(recurrent, tmp_path, system, "sgd") for system in (recurrent.APART, "selfish"))
    assert apart["kept"] == shared["kept"]
    assert all(max(counts) - min(counts) <= 1 for counts in apart["gates"].values())
    assert any(max(counts) - min(counts) > 1 for counts in shared["gates"].values())
    method = recurrent.GatesApart(sparsity=0.5, drop=0.5)
    mask = {"lstm.w": torch.tensor([[1, 1, 0, 0]] * 4).bool(), "head.w": torch.tensor([[1, 0, 0, 0]] * 2).bool()}
    weights = {"lstm.w": torch.tensor([[2.0, 1.0, 0, 0]] * 4), "head.w": torch.tensor([[1.0, 0, 0, 0], [3.0, 0, 0, 0]])}
    new = method.update(mask, weights, {}, Clock(0, 100), torch.Generator().manual_seed(1))
    assert new["lstm.w"].sum(1).tolist() == [2] * 4 and new["lstm.w"][:, 0].all() and not mask["lstm.w"][:, 2:].any()
    assert new["head.w"].shape == (2, 4) and int(new["head.w"].sum()) == 2 and bool(new["head.w"][1, 0])


def test_the_tables_are_of_what_is_there() -> None:
    recurrent = importlib.import_module("recurrent")
    place = recurrent.Place
    reached = {
        (place("dense", 0.0, "sgd", 0), "last"): 3.0,
        (place("set", 0.67, "sgd", 0), "last"): 5.0,
        (place("set", 0.67, "sgd", 1), "last"): 5.5,
        (place("selfish", 0.67, "sgd", 0), "last"): 4.0,
        (place("selfish", 0.67, "sgd", 1), "last"): 5.0,
        (place("selfish", 0.67, "asgd", 1), "averaged"): 4.0,
        (place("selfish", 0.67, "asgd", 1), "usual"): 4.5,
        (place("selfish", 0.67, "asgd", 1), "last"): 6.0,
    }
    lines = recurrent.tables(reached)
    assert lines[2:5] == [
        "| 0 % | dense | 3.000 (-, 1) | - | - | - |",
        "| 67 % | set | 5.250 (0.354, 2) | - | - | - |",
        "| 67 % | selfish | 4.500 (0.707, 2) | 4.000 (-, 1) | 6.000 (-, 1) | -0.500 (-, 1) |",
    ]
    assert lines[-2:] == [
        "| 67 % | selfish less set | -0.750 (0.250, 2) | - | - |",
        "| 67 % | selfish less dense | +1.000 (-, 1) | - | - |",
    ]
