"""Watching runs: the same rows in every trainer, across a stop, and around a loop of one's own."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mask_nets import batches, net
from torch.utils.data import DataLoader, TensorDataset

from tost_plugins import Mask, Recipe, Session, TostError
from tost_plugins.lab.train import train
from tost_plugins.session.watch.activations import activation_sparsity
from tost_plugins.session.watch.in_degree import in_degree
from tost_plugins.training.params import prunable

BASE = {
    "mask": {"kind": "rigl", "sparsity": 0.8, "every": "1ba"}, "tweaks": [], "model": "cifar/resnet8",
    "data": {"name": "digits", "limit": 96, "batch_size": 32}, "duration": "2ep", "optimizer": {"lr": 0.05},
}  # fmt: skip
CHEAP = ["in_degree", "emergence", "activation_sparsity"]


def rows(folder: Path, measure: str) -> list[dict[str, str]]:
    with (folder / f"{measure}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A watched run of the plain loop."""
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("watched") / "run"
    train(Recipe.from_dict(BASE | {"watch": {"measures": CHEAP, "every": "2ba"}}), out)
    return out


def test_a_run_is_seen_from_before_its_first_step_to_after_its_last(plain: Path) -> None:
    seen = rows(plain / "watch", "in_degree")
    assert sorted({int(row["step"]) for row in seen}) == [0, 2, 4, 6]
    final = Mask.load(plain / "mask.safetensors")
    last = [row for row in seen if row["step"] == "6"]
    assert [(row["layer"], float(row["std"])) for row in last] == [(r["layer"], r["std"]) for r in in_degree(final)]
    overlaps = rows(plain / "watch", "emergence")
    assert [float(row["epoch"]) for row in overlaps] == pytest.approx([0, 2 / 3, 4 / 3, 2])
    assert float(overlaps[-1]["with_final"]) == 1 and float(overlaps[0]["with_final"]) < 1
    first = Mask.load(plain / "watch/masks/step-00000000.safetensors")
    assert float(overlaps[0]["with_final"]) == first.overlap(final)
    zeros = [float(row["zeros"]) for row in rows(plain / "watch", "activation_sparsity")]
    assert len(zeros) == 4 * 7 and all(0 < zero < 100 for zero in zeros)


def test_a_run_that_is_not_watched_trains_the_same(plain: Path, tmp_path: Path) -> None:
    train(Recipe.from_dict(BASE), tmp_path / "run")
    assert (tmp_path / "run/model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert not (tmp_path / "run/watch").exists()


@pytest.mark.parametrize("trainer", ["accelerate", "transformers", "composer", "lightning"])
def test_every_trainer_sees_the_same(trainer: str, plain: Path, tmp_path: Path) -> None:
    pytest.importorskip(trainer)
    train(Recipe.from_dict(BASE | {"watch": {"measures": CHEAP, "every": "2ba"}, "trainer": trainer}), tmp_path / "run")
    for measure in CHEAP:
        mine, theirs = rows(tmp_path / "run/watch", measure), rows(plain / "watch", measure)
        assert len(mine) == len(theirs) and [row["step"] for row in mine] == [row["step"] for row in theirs]
        for a, b in zip(mine, theirs, strict=True):
            assert {k: v for k, v in a.items() if k != "layer"} == {k: v for k, v in b.items() if k != "layer"}
            assert a.get("layer", "").endswith(b.get("layer", ""))  # a framework may wrap the network


def test_a_stopped_run_goes_on_watching_where_it_was(plain: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(event: str, values: dict[str, Any]) -> None:
        if event == "step" and values["step"] == 5:
            raise Killed

    recipe = Recipe.from_dict(BASE | {"watch": {"measures": CHEAP, "every": "2ba"}})
    with pytest.raises(Killed):
        train(recipe, tmp_path / "run", listen=kill)
    assert rows(tmp_path / "run/watch", "in_degree")[-1]["step"] == "4"  # after the checkpoint of step 3
    train(recipe, tmp_path / "run", resume=True)
    for path in (plain / "watch").glob("*.csv"):
        assert (tmp_path / "run/watch" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_loop_of_ones_own_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    monkeypatch.chdir(tmp_path)
    data, model = batches(), net()
    recipe = Recipe.of({"mask": {"kind": "random", "sparsity": 0.5}}, watch=["curvature", "activation_sparsity"])
    session = Session(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with session.drive(optimizer, data, F.cross_entropy, total_steps=3):
        for images, labels in data:
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    seen = rows(tmp_path / "tost-watch", "curvature")
    assert [(row["step"], row["space"]) for row in seen] == [
        (step, space) for step in ("0", "3") for space in ("kept weights", "all weights")
    ]
    for step in ("0", "3"):  # a subspace cannot be sharper than the whole; eigsh is asked for one per cent
        kept, whole = (float(row["eigenvalue"]) for row in seen if row["step"] == step)
        assert 0 < kept <= 1.02 * whole
    last = [float(row["zeros"]) for row in rows(tmp_path / "tost-watch", "activation_sparsity") if row["step"] == "3"]
    assert last == [row["zeros"] for row in activation_sparsity(model, data[:1])]


def test_watching_leaves_the_order_of_the_data(tmp_path: Path) -> None:
    def train_on(watch: dict[str, Any] | None) -> torch.Tensor:
        torch.manual_seed(0)
        model = net()
        images = torch.cat([images for images, _ in batches(4)])
        data = DataLoader(TensorDataset(images, torch.arange(len(images)) % 4), 6, shuffle=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        session = Session(model, {"mask": {"kind": "random", "sparsity": 0.5}, "watch": watch})
        with session.drive(optimizer, data, F.cross_entropy, total_steps=len(data)):
            for inputs, labels in data:
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
        return model[0].weight

    watch = {"measures": ["activation_sparsity"], "every": "1ba", "out": str(tmp_path)}
    assert torch.equal(train_on(watch), train_on(None))


@pytest.mark.parametrize(
    ("watch", "said"),
    [
        ({"measures": ["curvature"], "every": "1ba"}, "expected batches"),
        ({"measures": ["in_degree"], "every": "0ba"}, "watch.every: expected at least one step"),
        ({"measures": ["in_degree"]}, "watch.every: .*steps_per_epoch"),
    ],
)
def test_what_cannot_be_watched_is_an_error_that_leaves_the_weights(watch: dict[str, Any], said: str) -> None:
    session = Session(net(), {"mask": {"kind": "random", "sparsity": 0.5}, "watch": watch}).attach()
    with pytest.raises(TostError, match=said):
        session.start(torch.optim.SGD(session.model.parameters(), lr=0.1), total_steps=4)
    before = prunable(net())
    assert all(torch.equal(weight, before[name]) for name, weight in prunable(session.model).items())


def test_an_unknown_measure_is_an_error_that_lists_them() -> None:
    with pytest.raises(TostError, match=r"watch\.measures\.0: expected 'in_degree', 'emergence'.*got 'in_degre'"):
        Recipe.of({"mask": {"kind": "random", "sparsity": 0.5}}, watch="in_degre")


@pytest.mark.parametrize("out", ["/elsewhere", "../elsewhere", "run/../../elsewhere"])
def test_a_recipe_from_a_stranger_watches_within_its_folder(out: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    recipe = Recipe.from_dict(BASE | {"watch": {"measures": ["in_degree"], "out": out}})
    with pytest.raises(TostError, match=r"watch\.out: expected a folder within the run's, "):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    recipe.to_yaml(tmp_path / "recipe.yaml")
    with pytest.raises(TostError, match=r"watch\.out: expected a folder below this one, got"):
        Recipe.load(tmp_path / "recipe.yaml")
