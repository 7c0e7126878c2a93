"""The benchmarks run, their page says what their rows say, and their plain restatements compute what the library does."""

import copy
import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mask_nets import net
from torch import Tensor

from tost_plugins import masks
from tost_plugins.lab.reproduce import runs as reproduce
from tost_plugins.masks.methods.grasp import Grasp
from tost_plugins.masks.methods.snip import Snip
from tost_plugins.training.task import Task
from tost_plugins.tweaks.rescaled_init import rescale

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)  # as if run from their folder: the scripts find each other


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 3, 8, 8, dtype=torch.float64), torch.arange(12) % 4


def test_a_part_leaves_rows_and_a_page(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    run, step = importlib.import_module("run"), importlib.import_module("step")
    run.measure("step", tmp_path, small=True)
    rows = run.read(tmp_path / "benchmarks" / "step.csv")
    contenders = {row.contender for row in rows}
    assert {"untouched", "untouched again", *step.RECIPES, "prune", "parametrize"} <= contenders
    assert all(sorted(row.round for row in rows if row.contender == name) == [0, 1, 2] for name in contenders)
    assert all(row.value > 0 for row in rows)
    page = run.page(tmp_path)
    assert "| resnet8, 8 images of 16 px | static |" in page
    assert "Not measured yet: `python benchmarks/run.py growth`" in page
    (line,) = [line for line in page.splitlines() if "| static |" in line]
    _, median, _ = importlib.import_module("interleave").quartiles(step.Ratio("", "static", "untouched").values(rows))
    assert f" {median:.3f} (" in line
    assert line.endswith("at most 1.02 | held |" if median <= 1.02 else "at most 1.02 | **missed** |")


def test_the_part_about_networks_to_give_away(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    run, part = importlib.import_module("run"), importlib.import_module("compact_export")
    # in a process of its own: the threads that these programs leave behind are not for a process that forks later
    command = [sys.executable, FOLDER / "run.py", "export", "--small", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    rows = run.read(tmp_path / "benchmarks" / "export.csv")
    contenders = {row.contender for row in rows}
    assert {
        "eager, compact, 1 image",
        "ONNX Runtime, dense, 32 images",
        "file: packed",
        "parameters: dense",
    } <= contenders
    assert all(row.value > 0 for row in rows)
    assert {ratio.of for ratio in part.RATIOS} >= {name for name in contenders if "dense" not in name}
    assert "| resnet8 | ONNX Runtime, compact, 32 images |" in run.page(tmp_path)


def test_ratios_are_those_of_the_same_round() -> None:
    interleave = importlib.import_module("interleave")
    times = {"a": [2.0, 3.0], "b": [1.0, 1.5], "rare": [5.0, 7.5]}
    rows = [interleave.Row("case", name, i, v, "s") for name, values in times.items() for i, v in enumerate(values)]
    ratio = interleave.Ratio
    assert ratio("", "a", "a").values(rows) == [1.0, 1.0]
    assert ratio("", "a", "b").values(rows) == [2.0, 2.0]
    assert ratio("", "a").values(rows) == [2.0, 3.0]
    assert ratio("", "rare", "b", share=0.25, rest="a").values(rows) == [0.25 * 5 + 0.75 * 2] * 2
    assert ratio("", "a", "b", unit="B").values(rows) == []
    assert [ratio("", "a", most=1.0).holds(v) for v in (1.0, 1.1)] == [True, False]
    assert [ratio("", "a", least=0.9).holds(v) for v in (0.9, 0.8)] == [True, False]
    assert ratio("", "a").holds(9.0) is None


def test_contenders_take_turns_and_may_count_for_themselves() -> None:
    interleave, seen = importlib.import_module("interleave"), []
    found = interleave.rounds({"a": lambda: seen.append("a"), "b": lambda: seen.append("b") or 7.0}, 3, warm_up=1)
    assert [sorted(seen[i : i + 2]) for i in range(0, 8, 2)] == [["a", "b"]] * 4
    assert (len(found["a"]), found["b"]) == (3, [7.0] * 3)


def test_plain_restatements_are_the_librarys_scores_and_masks() -> None:
    plain, model, given = importlib.import_module("plain"), net().double(), batch()
    model[6].p = 0.0
    task = Task.of(model, batches=[given], loss_fn=F.cross_entropy)
    for mine, other in (
        (plain.snip(copy.deepcopy(model), given), Snip(sparsity=0.5).scores(task)),
        (plain.grasp(copy.deepcopy(model), given), {n: -s for n, s in Grasp(sparsity=0.5).scores(task).items()}),
    ):
        assert any(score.abs().max() > 0 for score in mine)
        for score, expected in zip(mine, other.values(), strict=True):
            torch.testing.assert_close(score, expected, rtol=1e-9, atol=1e-15)
    kept = plain.synflow(copy.deepcopy(model), (3, 8, 8), 0.1, 20)
    found = masks.find(model, "synflow", 0.9, rounds=20, input_shape=(3, 8, 8))
    assert all(torch.equal(mask, other) for mask, other in zip(kept, found.values(), strict=True))


@pytest.mark.parametrize(("size", "above"), [(1.0, 3), (0.01, 0)])
def test_the_plain_rescaled_initialisation_is_the_librarys(
    size: float, above: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tost_plugins")
    plain, model, given = importlib.import_module("plain"), net().double(), batch()
    model[6].p = 0.0
    for param in model.parameters():
        param.data.mul_(size)
    mask = masks.find(model, "random", 0.5)
    mine = plain.rescaled_init(copy.deepcopy(model), itertools.repeat(given), mask, 3)
    other = rescale(Task.of(model, batches=[given], loss_fn=F.cross_entropy), mask, iterations=3, learning_rate=0.003)
    torch.testing.assert_close(mine, list(other.values()), rtol=1e-4, atol=1e-4)
    assert mine != [1.0] * len(mine)
    assert f"above 1 in {above} of 3 iterations" in caplog.text  # either objective


def test_what_is_run_on_a_gpu_runs_small_anywhere(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    command = [
        sys.executable,
        FOLDER / "gpu.py",
        "--small",
        "--minutes",
        "4",
        "--parts",
        "steps",
        "table",
        "--out",
        tmp_path,
    ]
    subprocess.run(command, check=True, capture_output=True)
    rows = importlib.import_module("run").read(tmp_path / "gpu.csv")
    steps = importlib.import_module("gpu_steps")
    assert {row.contender for row in rows} >= set(steps.CONTENDERS) and all(row.value > 0 for row in rows)
    page = (tmp_path / "gpu.md").read_text()
    assert "| resnet8, 8 images of 16 px, bf16, eager | compact |" in page
    assert "98 %" in page.partition("## Table 2")[2]


def test_methods_are_compared_on_the_protocol_of_the_published_tables() -> None:
    methods = importlib.import_module("methods")
    args = methods.parser().parse_args(["--protocol", "cpu"])
    made = [methods.cell(m, s, v, 0, args) for m in methods.METHODS for s in (0.95, 0.98) for v in methods.VARIANTS]
    assert len({cell.name for cell in made}) == len(made) and args.seeds == 3
    for cell in made:
        assert cell.parent is None or cell.parent in {other.name for other in made}
    kinds = {cell.recipe.mask.kind for cell in made}
    assert kinds >= {"snfs", "top_kast", "ac_dc", "edge_popup", "dnw", "set", "rigl", "gradual", "lottery_ticket"}
    rewound = {str(cell.recipe.mask.rewind) for cell in made if cell.recipe.mask.kind == "lottery_ticket"}
    assert rewound == {"0ba", "learning_rate"} and any(cell.cycles for cell in made)
    theirs = [cell.recipe for cell in reproduce.cells("table2", "cpu", ["random"], [95], seeds=1)]
    ours = [
        cell.recipe for cell in made if cell.labels["method"] == "random, static" and cell.labels["sparsity"] == 0.95
    ]
    assert [{**r.to_dict(), "name": "", "source": ""} for r in ours] == [
        {**r.to_dict(), "name": "", "source": ""} for r in theirs
    ]


def test_the_table_of_methods_is_of_what_is_there() -> None:
    methods = importlib.import_module("methods")
    row = {"method": "set", "sparsity": 0.95, "kept": 100, "live": 80}
    rows = [
        {**row, "training": "plain", "seed": 0, "test_accuracy": 40.0},
        {**row, "training": "tost", "seed": 0, "test_accuracy": 43.0},
        {**row, "training": "plain", "seed": 1, "test_accuracy": 42.0},
        {**row, "method": "random, static", "training": "plain", "seed": 0, "test_accuracy": 39.0},
        {**row, "method": "random, static", "training": "plain", "seed": 1, "test_accuracy": 39.0},
        {**row, "method": "dnw", "training": "plain", "seed": 0, "test_accuracy": 30.0, "live": None},
    ]
    assert methods.table(rows)[2:] == [
        "| 95 % | set | 41.00 (1.41, 2) | 43.00 (0.00, 1) | +3.00 | +2.00 (1.00) | 100 | 80 |",
        "| 95 % | random, static | 39.00 (0.00, 2) | - | - | - | 100 | 80 |",
        "| 95 % | dnw | 30.00 (0.00, 1) | - | - | -9.00 | 100 | - |",
    ]
