"""Every study of `tost study`, small, and the page of them."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tost_plugins import Mask, Recipe, TostError
from tost_plugins.lab import grid
from tost_plugins.lab.page import page
from tost_plugins.lab.studies import registry as studies
from tost_plugins.lab.train import prepare

for needed in ("sklearn", "matplotlib", "scipy"):
    pytest.importorskip(needed)

TINY = ["data.limit=96", "data.batch_size=32", "duration=1ep"]


class Done:
    """A study's folder, when it is done."""

    def __init__(self, name: str, out: Path) -> None:
        self.name, self.out = name, out
        self.result = studies.run(name, out, "smoke", TINY, 1)
        self.rows: list[dict[str, Any]] = self.result["rows"]

    def cell(self, start: str) -> Path:
        (found,) = [path for path in self.out.iterdir() if path.is_dir() and path.name.startswith(start)]
        return grid.last_run(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


@pytest.fixture
def done(request: pytest.FixtureRequest, folder: Path) -> Done:
    return Done(request.param, folder / request.param)


def study(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("done", [name], indirect=True)


def masks(folder: Path) -> list[Mask]:
    return [Mask.load(path / "mask.safetensors") for path in sorted(folder.iterdir()) if path.is_dir()]


@study("ablation")
def test_ablation_trains_every_tweak_on_one_mask(done: Done) -> None:
    trainings = ["plain", "ghost_skip", "soft_activation", "rescaled_init", "label_smoothing", "all"]
    accuracy = {row["training"]: row["value"] for row in done.rows if row["quantity"] == "test accuracy (%)"}
    gain = {row["training"]: row["value"] for row in done.rows if row["quantity"] == "gain over plain (points)"}
    assert list(accuracy) == trainings and gain == {name: accuracy[name] - accuracy["plain"] for name in trainings[1:]}
    found = masks(done.out)
    assert len(found) == 6 and all(mask == found[0] for mask in found)
    used = [json.loads((done.cell(f"{name}-") / "result.json").read_text())["tweaks"] for name in trainings]
    assert used[0] == [] and used[1] == ["ghost_skip"] and len(used[-1]) == 4


@study("sparsity-sweep")
def test_the_sweep_reaches_its_sparsities(done: Done) -> None:
    assert len(done.rows) == 6  # four runs, and what two of them gain
    assert all(row["sparsity_reached"] == pytest.approx(row["sparsity"], abs=1e-4) for row in done.rows)


@study("density-benefit")
def test_the_benefit_is_the_difference_to_plain_training(done: Done) -> None:
    assert len(done.rows) == 4
    for row in done.rows:
        plain = json.loads((done.cell(f"{row['sparsity']}-plain") / "result.json").read_text())["test_accuracy"]
        assert row["gain"] == pytest.approx(row["test_accuracy"] - plain)
    assert {row["sparsity_reached"] for row in done.rows if row["sparsity"] == 0} == {0}


@study("ghostliness")
def test_ghosts_that_vanished_make_no_difference_at_the_end(done: Done) -> None:
    found = {(row["training"], row["network"]): row["test_accuracy"] for row in done.rows}
    assert len(found) == 6
    for training in ("no ghosts", "ghosts that vanish"):
        assert found[training, "as trained"] == found[training, "the plain one left"]
    curves = json.loads((done.cell("ghosts_for") / "result.json").read_text())["curves"]
    assert {point["tost/ghost_skip/alpha"] for point in curves} == {1.0}


@study("pswish")
def test_the_curves_need_no_training(done: Done) -> None:
    assert len({row["curve"] for row in done.rows}) == 6 and done.result["recipes"] == {}


@study("activation-sparsity")
def test_the_activation_sparsity_of_relu_is_what_is_counted_afterwards(done: Done) -> None:
    by_training: dict[str, list[float]] = {}
    for row in done.rows:
        by_training.setdefault(row["training"], []).append(row["zeros"])
    assert list(by_training) == ["ReLU", "Swish", "Mish", "PSwish, beta 1 to 10"]
    assert max(sum(by_training[soft]) for soft in ("Swish", "Mish")) < sum(by_training["ReLU"]) / 4
    run = done.cell("ReLU")
    job = prepare(Recipe.load(run / "recipe.yaml"), run)
    job.model.load_state_dict(load_file(run / "model.safetensors"))
    zeros: dict[str, list[float]] = {}  # a module that is called twice is two layers
    for name, module in job.model.named_modules():
        if isinstance(module, torch.nn.ReLU):
            module.register_forward_hook(
                lambda m, x, out, name=name: zeros.setdefault(name, []).append(
                    100 * float((out < 1e-6).double().mean())
                )
            )
    job.evaluate(job.model, job.data.test)  # 360 images: one batch
    counted = sorted(value for values in zeros.values() for value in values)
    assert sorted(by_training["ReLU"]) == pytest.approx(counted)


@study("norms-only")
def test_norms_alone_leave_all_other_weights_at_their_first_values(done: Done) -> None:
    rows = {(row["sparsity"], row["training"]) for row in done.rows}
    assert rows == {(sparsity, training) for sparsity in (0.0, 0.9) for training in ("norms alone", "all")}
    for sparsity in (0.0, 0.9):
        for training, stays in (("norms_alone", True), ("all", False)):
            run = done.cell(f"{sparsity}-{training}")
            first, last = prepare(Recipe.load(run / "recipe.yaml"), run).model, load_file(run / "model.safetensors")
            mask = Mask.load(run / "mask.safetensors")
            assert all(
                torch.equal(last[n], first.get_parameter(n).detach() * keep) == stays for n, keep in mask.items()
            )


@study("curvature")
def test_no_subspace_is_sharper_than_the_whole(done: Done) -> None:
    found = {(row["training"], row["epoch"], row["space"]): row["eigenvalue"] for row in done.rows}
    assert len(found) == 3 * 2 * 2
    for (training, epoch, space), value in found.items():
        if space == "kept weights":
            assert value <= found[training, epoch, "all weights"] * 1.02 + 1e-3


@study("reinit")
def test_structures_are_trained_again_as_they_say(done: Done) -> None:
    assert len(done.rows) == 3 * (1 + 3 + 2)
    for method in ("lottery_ticket", "dnw", "rigl"):
        parent, *_ = found = [
            Mask.load(done.cell(f"{method}-0.9-{start}") / "mask.safetensors")
            for start in (
                "seed0",
                "its_own_first_weights",
                "its_own_first_signs",
                "new_weights",
                "random_structure__new",
            )
        ]
        assert all(mask == parent for mask in found[:4]) and found[4] != parent
        assert found[4].sparsities() == parent.sparsities()
    seeds = {name: content["seed"] for name, content in done.result["recipes"].items() if name.startswith("dnw")}
    assert seeds["dnw-0.9-new_weights-1-seed0"] == 1000 and seeds["dnw-0.9-its_own_first_weights-seed0"] == 0


@study("robustness")
def test_pruning_by_nothing_is_the_trained_network(done: Done) -> None:
    methods = {row["method"] for row in done.rows}
    assert len(methods) == 6 and len(done.rows) == 6 * 4 * 3 * 2
    for method in methods:
        whole = {
            row["accuracy"]
            for row in done.rows
            if row["method"] == method and row["share"] == 0 and row["norms"] == "kept"
        }
        folder = done.cell(method.replace(", ", "__").replace(" ", "_") + "-")
        assert whole == {json.loads((folder / "result.json").read_text())["test_accuracy"]}


@study("in-degree")
def test_a_static_random_mask_keeps_its_binomial_spread(done: Done) -> None:
    spread = [row for row in done.rows if row["quantity"].startswith("spread")]
    static = [row["value"] for row in spread if row["method"] == "random, static"]
    assert len(static) > 1 and set(static) == {static[0]} and static[0] == pytest.approx(1, abs=0.15)
    assert all(row["value"] == 0 for row in done.rows if row["quantity"].startswith("dead") and row["epoch"] == 0)
    assert len({row["method"] for row in spread}) == 5


@study("emergence")
def test_the_last_mask_is_the_final_one(done: Done) -> None:
    final = [row for row in done.rows if row["quantity"].endswith("final mask")]
    assert len({row["method"] for row in final}) == 4
    assert {row["value"] for row in final if row["epoch"] == 1} == {1.0}
    assert all(0 < row["value"] <= 1 for row in final)
    assert min(row["value"] for row in final if row["epoch"] == 0) < 1


@study("freeze")
def test_a_structure_that_is_frozen_at_once_never_moves(done: Done) -> None:
    assert [row["moves_for"] for row in done.rows[::2]] == ["0", "1", "all"]
    with (done.cell("dnw-0ep") / "movement.csv").open() as file:
        assert {row["changed"] for row in csv.DictReader(file)} == {"0.0"}
    with (done.cell("dnw-all") / "movement.csv").open() as file:
        assert {row["changed"] for row in csv.DictReader(file)} != {"0.0"}
    assert all(row["value"] > 0 for row in done.rows)


def test_one_page_holds_every_study_that_was_run(folder: Path) -> None:
    studies.run("pswish", folder / "pswish")
    made = page(folder, folder / "report.html")
    text = (folder / "report.html").read_text()
    names = [path.stem for path in folder.glob("*/*.png")]
    assert made["studies"] == len(names) >= 1
    assert text.count("data:image/png;base64,") == text.count("<img ") == len(names)
    assert all(f"<h2>{name} (smoke)</h2>" in text for name in names)
    assert 'src="http' not in text and "<script" not in text and "<link" not in text
    with pytest.raises(TostError, match="expected a folder with studies"):
        page(folder / "pswish" / "nothing", folder / "other.html")


@pytest.mark.long
@pytest.mark.parametrize("name", list(studies.STUDIES))
def test_every_study_at_its_smoke_size(name: str, tmp_path: Path) -> None:
    result = studies.run(name, tmp_path, "smoke")
    assert result["rows"] and (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
