"""The card beside a mask or an export: what it says is true, the unknown is left out, and another mask's is not believed."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import tost
from mask_nets import OPTIONS
from torch import nn

from tost_plugins import Mask, Recipe, Session, masks
from tost_plugins.lab.export import export
from tost_plugins.lab.train import train
from tost_plugins.masks.card import card, text, told


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))


def card_of(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name(f"{path.name}.card.json").read_text())


def test_a_found_mask_says_how_and_what_is_live(tmp_path: Path) -> None:
    model, path = net(), tmp_path / "mask.safetensors"
    mask = masks.find(model, "random", 0.8, allocation="uniform", seed=4)
    mask.save(path)
    found, live = card_of(path), masks.live(model, mask)
    assert (found["of"], found["file"]) == ("mask", "mask.safetensors")
    assert (found["method"], found["seed"], found["budget"]) == ("random", 4, "kept")
    assert found["settings"]["allocation"] == "uniform" and found["versions"]["torch"] == version("torch")
    assert (found["kept"], found["size"], found["live"]) == (mask.kept, mask.size, live.kept)
    assert (found["sparsity"], found["effective_sparsity"]) == (mask.sparsity, live.sparsity)
    assert found["layers"] == [
        {"layer": name, "shape": list(kept.shape), "kept": int(kept.sum()), "size": kept.numel(),
         "live": int(live[name].sum())} for name, kept in mask.items()]  # fmt: skip
    page = path.with_name("mask.safetensors.card.md").read_text()
    assert page.startswith("# mask.safetensors\n") and "| method | random |" in page and "| seed | 4 |" in page
    assert f"{mask.kept} of {mask.size} weights kept" in page and f"{live.kept} of them live" in page


def test_what_is_not_known_is_left_out() -> None:
    found = Mask({"fc.weight": torch.tensor([[1, 0]])}).card()
    assert set(found) == {"card", "of", "file", "kept", "size", "sparsity", "versions", "layers", "checksum"}
    assert set(found["layers"][0]) == {"layer", "shape", "kept", "size"}
    assert "live" not in text(found) and "method" not in text(found)


def test_a_mask_brings_its_card_along_and_another_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    mask = masks.find(net(), "magnitude", 0.5)
    mask.save(path)
    loaded = Mask.load(path)
    assert loaded.card() == mask.card() and loaded == mask
    loaded.save(tmp_path / "copy.safetensors")
    assert card_of(tmp_path / "copy.safetensors") == {**card_of(path), "file": "copy.safetensors"}
    before = path.with_name(f"{path.name}.card.json").read_bytes()
    Mask(dict(mask)).save(path)  # who knows nothing of it takes nothing away
    assert path.with_name(f"{path.name}.card.json").read_bytes() == before
    Mask.dense(mask).save(path, card=False)  # another program writes another mask there
    assert Mask.load(path).about == {}
    for content in ("", "[]", "[" * 100_000, '{"checksum": 1}', json.dumps({"checksum": mask.card()["checksum"]}),
                    json.dumps({**mask.card(), "layers": [{"layer": [], "live": "x"}]})):  # fmt: skip
        mask.save(path, card=False)
        path.with_name("mask.safetensors.card.json").write_text(content)
        assert Mask.load(path) == mask and Mask.load(path).about == {}


def test_the_command_prints_a_card_as_it_is(tmp_path: Path) -> None:
    """Lines as long as they are, and what looks like markup, which a stranger's card may hold."""
    mask = masks.find(net(), "magnitude", 0.5).described(note="[/x] [bold]new[/] " + "long " * 40)
    mask.save(tmp_path / "m.safetensors")
    assert tost("mask", "card", tmp_path / "m.safetensors").strip() == text(mask.card("m.safetensors")).strip()


def test_a_session_s_mask_knows_its_method_and_a_given_one_its_own(tmp_path: Path) -> None:
    def started(given: Mask | None, **recipe: Any) -> Session:
        session = Session(net(), {"tweaks": [], **recipe}, given).attach()
        session.start(torch.optim.SGD(session.model.parameters(), lr=0.1), total_steps=4)
        return session

    found = started(None, mask={"kind": "set", "sparsity": 0.5}, seed=7).mask
    assert (found.card()["method"], found.card()["seed"], found.card()["settings"]["drop"]) == ("set", 7, 0.3)
    given = masks.find(net(), "random", 0.5, seed=3)
    assert started(given, mask={"kind": "magnitude", "sparsity": 0.5}).mask.card()["method"] == "random"
    given.save(tmp_path / "mask.safetensors")
    loaded = masks.find(net(), "file", path=str(tmp_path / "mask.safetensors")).card()
    assert (loaded["method"], loaded["source"]["method"], loaded["source"]["seed"]) == ("file", "random", 3)


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_method_tells_its_settings_as_plain_values(kind: str) -> None:
    found = told(masks.MASKS[kind](**OPTIONS[kind]), seed=1)
    assert json.loads(json.dumps(found)) == found and found["method"] == kind
    assert {**found["settings"], **found}.keys() >= {key for key in OPTIONS[kind] if key != "budget"}


def test_a_run_and_its_exports_have_cards(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    recipe = Recipe.from_dict({
        "mask": {"kind": "random", "sparsity": 0.9}, "tweaks": ["label_smoothing"], "model": "cifar/resnet8", "seed": 5,
        "data": {"name": "digits", "limit": 64, "batch_size": 32}, "duration": "2ba",
    })  # fmt: skip
    result = train(recipe, tmp_path / "run")
    found, mask = card_of(tmp_path / "run/mask.safetensors"), Mask.load(tmp_path / "run/mask.safetensors")
    assert (found["method"], found["seed"], found["model"], found["data"]["name"]) == (
        "random",
        5,
        "cifar/resnet8",
        "digits",
    )
    assert found["data"]["limit"] == 64 and found["training"] == {
        "trainer": "torch", "duration": "2ba", "tweaks": ["label_smoothing"]}  # fmt: skip
    assert (found["live"], found["effective_sparsity"]) == (result["live"], result["effective_sparsity"])
    assert sum(row["live"] for row in found["layers"]) == result["live"]
    for form in ("safetensors", "packed", "pt2"):
        export(tmp_path / "run", tmp_path / f"net.{form}", form=form)  # type: ignore[arg-type]
        out = card_of(tmp_path / f"net.{form}")
        assert (out["of"], out["form"], out["method"], out["seed"]) == ("network", form, "random", 5)
        assert [row["layer"] for row in out["layers"]] == list(mask) and out["kept"] <= mask.kept
        assert (tmp_path / f"net.{form}.card.md").read_text().startswith(f"# net.{form}\n")
    shown = json.loads(tost("mask", "card", tmp_path / "run/mask.safetensors", "--json"))
    assert shown == found and "| model | cifar/resnet8 |" in tost("mask", "card", tmp_path / "run/mask.safetensors")


def test_the_card_of_an_export_without_a_run_says_what_is_there(tmp_path: Path) -> None:
    model = net()
    masks.find(model, "magnitude", 0.5).apply_(dict(model.named_parameters()))
    torch.save(model.state_dict(), tmp_path / "net.pt")
    export(tmp_path / "net.pt", tmp_path / "out.safetensors")
    found = card_of(tmp_path / "out.safetensors")
    assert found["sparsity"] == pytest.approx(0.5) and "method" not in found and "seed" not in found


def test_names_in_a_card_are_shown_and_not_obeyed() -> None:
    mask = Mask({"w": torch.ones(2)}).described(method="a|b\n\x1b[31m", settings={"x": ["1\n2"], "none": None})
    (line,) = [line for line in text(card(mask, mask.about, "f")).splitlines() if "method" in line]
    assert line == r"| method | a\|b \x1b[31m |" and "none" not in text(mask.card())


def test_numbers_of_numpy_and_torch_and_paths_may_be_told(tmp_path: Path) -> None:
    known = {
        "accuracy": np.float32(0.5),
        "loss": torch.tensor(0.25),
        "folder": Path("data"),
        "shares": np.array([1, 2]),
    }
    Mask({"weight": torch.tensor([1, 0])}).described(**known).save(tmp_path / "mask.safetensors")
    about = Mask.load(tmp_path / "mask.safetensors").about
    assert [about[key] for key in known] == [0.5, 0.25, "data", [1, 2]]
