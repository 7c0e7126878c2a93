"""Recipes: what is read is what is written, overrides, and errors in one line that say what to do."""

import copy
import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import refused
from torch import nn

from tost_plugins import Mask, Recipe, Session, TostError
from tost_plugins.masks import MASKS
from tost_plugins.recipe.recipe import apply_changes, shipped
from tost_plugins.training.clock import Time
from tost_plugins.tweaks import TWEAKS

#: A value that is not the default, for every name of a field; those without one here keep it.
OTHER: dict[str, Any] = {
    "sparsity": 0.25, "path": "some/mask.safetensors", "allocation": {"layer1.*": 0.1, "fc": 0.0}, "ignore": ["fc", "*.bn"],
    "on_collapse": "keep_one", "batches": 3, "input_shape": [1, 8, 8], "rounds": 7, "per_class": 2, "temperature": 9.5,
    "optional": True, "until": "17ep", "schedule": "cosine", "layers": ["layer2.*", "*.conv1"], "shape": "mish",
    "beta": [2.0, 50.5], "iterations": 3, "learning_rate": 0.005, "look_ahead": 0.25, "norm": 2.5, "min_scale": 0.5,
    "clip": 0.75, "alpha": 0.3, "every": "70ba", "begin": "2ep", "freeze": "1ep", "drop": 0.4, "initial": 0.1,
    "prune": 0.5, "rewind": "500ba", "strength": 20.0, "decay": 0.01, "most": 0.1, "warmup": "3ep",
}  # fmt: skip
#: Where a method's field of that name takes other values.
OTHER_OF = {"LotteryTicket": {"allocation": "uniform"}}
PLAIN = {"mask": {"kind": "random", "sparsity": 0.5}}


def required(cls: type) -> dict[str, Any]:
    fields = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    return {name: OTHER[name] for name in fields}


def changed(cls: type) -> dict[str, Any]:
    other = OTHER | OTHER_OF.get(cls.__name__, {})
    return {field.name: other[field.name] for field in dataclasses.fields(cls) if field.name in other}


def error_of(content: Any, **overrides: Any) -> str:
    """The one line that a wrong recipe gives."""
    with pytest.raises(TostError) as error:
        Recipe.of(content, **overrides) if overrides else Recipe.from_dict(content)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600, text
    return text


# ---- there and back


def there_and_back(recipe: Recipe, tmp_path: Path) -> None:
    content = recipe.to_dict()
    assert json.loads(json.dumps(content)) == content
    assert Recipe.from_dict(content) == recipe
    assert yaml.safe_load(recipe.to_yaml()) == content
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    assert (
        Recipe.of(str(tmp_path / "recipe.yaml")) == Recipe.of(tmp_path / "recipe.yaml") == Recipe.of(content) == recipe
    )
    assert copy.deepcopy(recipe) == recipe


@pytest.mark.parametrize("fill", [required, changed], ids=["defaults", "changed"])
@pytest.mark.parametrize("kind", MASKS)
def test_every_mask_goes_there_and_back(kind: str, fill: Any, tmp_path: Path) -> None:
    wanted = fill(MASKS[kind])
    recipe = Recipe.from_dict({"mask": {"kind": kind, **wanted}})
    assert type(recipe.mask) is MASKS[kind] and recipe.mask.kind == kind
    for name, value in wanted.items():
        found = getattr(recipe.mask, name)
        found = list(found) if isinstance(found, tuple) else str(found) if isinstance(found, Time) else found
        assert found == value and recipe.to_dict()["mask"][name] == value
    there_and_back(recipe, tmp_path)


@pytest.mark.parametrize("fill", [required, changed], ids=["defaults", "changed"])
@pytest.mark.parametrize("kind", TWEAKS)
def test_every_tweak_goes_there_and_back(kind: str, fill: Any, tmp_path: Path) -> None:
    wanted = fill(TWEAKS[kind])
    recipe = Recipe.from_dict({**PLAIN, "tweaks": [{"kind": kind, **wanted}]})
    (tweak,) = recipe.tweaks
    assert type(tweak) is TWEAKS[kind]
    assert {name: recipe.to_dict()["tweaks"][0][name] for name in wanted} == wanted
    there_and_back(recipe, tmp_path)
    if not wanted:
        assert (
            Recipe.from_dict({**PLAIN, "tweaks": [kind]}) == recipe == Recipe.from_dict({**PLAIN, "tweaks": (tweak,)})
        )


def test_everything_else_goes_there_and_back(tmp_path: Path) -> None:
    content = {
        "name": "all of it", "source": "Ünïcode, 2022: a \"quoted\" one", "seed": 7,
        "mask": "from_zeros", "tweaks": ["label_smoothing", {"kind": "ghost_skip", "until": "0.1234567dur"}],
        "model": "torchvision/resnet18", "duration": "1234567ba", "trainer": "composer",
        "data": {"name": "cifar10", "path": "/data", "limit": 100, "validation": 10, "batch_size": 3, "augment": False,
                 "image_size": 64},
        "optimizer": {"kind": "adamw", "lr": 1e-3, "weight_decay": 0},
        "schedule": {"kind": "steps", "at": ["91ep", "0.75dur"], "factor": 0.1, "warmup": "10ba"},
    }  # fmt: skip
    recipe = Recipe.from_dict(content)
    assert recipe.to_dict()["tweaks"][1]["until"] == "0.1234567dur" and recipe.duration == Time(1234567, "ba")
    there_and_back(recipe, tmp_path)


def test_every_shipped_recipe_loads() -> None:
    assert {"tost_any_mask", "quickstart"} <= set(shipped())
    for name, path in shipped().items():
        recipe = Recipe.load(name)
        assert recipe.name == name and recipe.source, name
        assert Recipe.load(path) == recipe == Recipe.from_dict(recipe.to_dict())


def test_a_file_without_a_name_is_called_by_its_own(tmp_path: Path) -> None:
    path = tmp_path / "my run.yaml"
    path.write_text("mask: {kind: random, sparsity: 0.5}\n", encoding="utf-8")
    for recipe in (Recipe.load(path), Recipe.of(path), Recipe.of(str(path), sparsity=0.25)):
        assert recipe.name == "my run"
    path.write_text("name: given\nmask: {kind: random, sparsity: 0.5}\n", encoding="utf-8")
    assert Recipe.load(path).name == "given"
    assert Recipe.from_dict({"mask": {"kind": "random", "sparsity": 0.5}}).name == "unnamed"


def test_the_default_is_tost_on_any_mask() -> None:
    recipe = Recipe.of(None)
    assert recipe == Recipe.load("tost_any_mask") and recipe.mask.kind == "auto" and recipe.seed == 0
    assert [tweak.kind for tweak in recipe.tweaks] == [
        "ghost_skip",
        "soft_activation",
        "rescaled_init",
        "label_smoothing",
        "multiplicative",
    ]
    assert all(tweak.optional for tweak in recipe.tweaks)


def test_a_recipe_does_not_change() -> None:
    content = {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": ["ghost_skip"]}
    recipe = Recipe.from_dict(content)
    content["tweaks"].append("label_smoothing")
    content["mask"]["sparsity"] = 0.9
    assert recipe.mask.sparsity == 0.5 and len(recipe.tweaks) == 1
    for target, name in (
        (recipe, "seed"),
        (recipe.mask, "sparsity"),
        (recipe.tweaks[0], "until"),
        (recipe.data, "limit"),
    ):
        with pytest.raises((ValueError, dataclasses.FrozenInstanceError)):
            setattr(target, name, 1)


def test_build_makes_a_session_for_a_model() -> None:
    net = nn.Linear(4, 2)
    session = Recipe.from_dict(PLAIN).build(net)
    assert isinstance(session, Session) and session.model is net and session.state == "new"


# ---- overrides


def test_overrides_of_the_mask(tmp_path: Path) -> None:
    base = {"mask": {"kind": "snip", "sparsity": 0.9, "batches": 3}, "tweaks": ["ghost_skip"], "seed": 4}
    file = tmp_path / "mask.safetensors"
    Mask({"weight": torch.ones(2, 4)}).save(file)

    def mask_of(**overrides: Any) -> dict[str, Any]:
        recipe = Recipe.of(base, **overrides)
        assert recipe.seed == 4 and len(recipe.tweaks) == 1
        return recipe.to_dict()["mask"]

    assert mask_of(mask="synflow", sparsity=0.8)["kind"] == "synflow"
    assert mask_of(mask="synflow", sparsity=0.8)["sparsity"] == 0.8
    assert mask_of(mask="from_zeros")["kind"] == "from_zeros"
    for path in (file, str(file), "not/there/yet.safetensors", "mask.pt"):
        found = mask_of(mask=path)
        assert (found["kind"], found["path"]) == ("file", str(path))
    found = mask_of(mask={"kind": "random", "sparsity": 0.3, "ignore": ["fc"]}, sparsity=0.6)
    assert (found["kind"], found["sparsity"], found["ignore"]) == ("random", 0.6, ["fc"])
    found = mask_of(sparsity=0.5)
    assert (found["kind"], found["sparsity"], found["batches"]) == ("snip", 0.5, 3)
    assert Recipe.of(None, sparsity=0.7).to_dict()["mask"]["sparsity"] == 0.7
    assert Recipe.of({"mask": "auto"}, sparsity=0.7).mask.sparsity == 0.7
    assert mask_of(mask=None, sparsity=None) == Recipe.from_dict(base).to_dict()["mask"]
    assert base["mask"] == {"kind": "snip", "sparsity": 0.9, "batches": 3}  # the caller's dict stays


def test_overrides_of_tweaks_and_seed() -> None:
    recipe = Recipe.of(PLAIN, tweaks=["label_smoothing", {"kind": "ghost_skip", "until": "3ep"}], seed=9)
    assert [tweak.kind for tweak in recipe.tweaks] == ["label_smoothing", "ghost_skip"] and recipe.seed == 9
    assert Recipe.of(recipe, tweaks=[]).tweaks == () and Recipe.of(recipe, tweaks=[]).seed == 9
    assert Recipe.of(recipe, seed=0).seed == 0 and Recipe.of(recipe, seed=0).tweaks == recipe.tweaks
    assert Recipe.of(recipe) is recipe
    assert Recipe.of("quickstart", seed=3).to_dict() == {**Recipe.load("quickstart").to_dict(), "seed": 3}


def test_wrong_overrides() -> None:
    assert error_of(PLAIN, sparsty=0.9) == (
        "overrides: expected a known override, got 'sparsty'; did you mean 'sparsity'? "
        "known: compact, mask, seed, sparsity, train, tweaks, watch"
    )
    assert (
        "recipe unnamed: mask: kind: expected a known mask method, got 'synflo'; did you mean 'synflow'?"
        in error_of(PLAIN, mask="synflo", sparsity=0.9)
    )
    assert "mask: expected a kind, a path or a dict, got 3" in error_of(PLAIN, mask=3)
    given = error_of(PLAIN, mask=Mask({"layer.weight": torch.ones(30, 30)}))
    assert "mask: expected a kind, a path or a dict, got Mask(1 layers" in given
    assert "mask.sparsity: expected no such key, got 'sparsity'" in error_of(PLAIN, mask="from_zeros", sparsity=0.9)
    assert "mask.sparsity: expected a value, got none; add the key 'sparsity'" in error_of(PLAIN, mask="snip")
    assert "tweaks" in error_of(PLAIN, tweaks="ghost_skip") and "seed" in error_of(PLAIN, seed=-1)


# ---- errors


@pytest.mark.parametrize(
    ("path", "near"),
    [(("sed",), "seed"), (("mask", "sparsty"), "sparsity"), (("data", "batchsize"), "batch_size"), (("optimizer", "lrr"), "lr"),
     (("schedule", "gamma"), None), (("tweaks", 0, "untill"), "until"), (("tweaks", 1, "smoothing"), None),
     (("watch", "evry"), "every")],
    ids=str,
)  # fmt: skip
def test_an_unknown_key_is_an_error_at_every_level(path: tuple[Any, ...], near: str | None) -> None:
    content: Any = {**copy.deepcopy(PLAIN), "name": "mine", "tweaks": [{"kind": "ghost_skip"}, {"kind": "label_smoothing"}],
                    "data": {}, "optimizer": {}, "schedule": {}, "watch": {"measures": ["in_degree"]}}  # fmt: skip
    Recipe.from_dict(content)
    place = content
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = 1
    where = ".".join(map(str, path))
    hint = f"did you mean {near!r}? known: " if near else "known: "
    assert error_of(content).startswith(f"recipe mine: {where}: expected no such key, got {path[-1]!r}; {hint}")


@pytest.mark.parametrize("kind", MASKS)
def test_an_unknown_key_of_every_mask(kind: str) -> None:
    text = error_of({"mask": {"kind": kind, **required(MASKS[kind]), "percent": 90}})
    known = ", ".join(sorted(field.name for field in dataclasses.fields(MASKS[kind])))
    assert text == f"recipe unnamed: mask.percent: expected no such key, got 'percent'; known: {known}"


@pytest.mark.parametrize("kind", TWEAKS)
def test_an_unknown_key_of_every_tweak(kind: str) -> None:
    text = error_of(
        {**PLAIN, "tweaks": ["ghost_skip" if kind != "ghost_skip" else "label_smoothing", {"kind": kind, "x": 1}]}
    )
    known = ", ".join(sorted(TWEAKS[kind].__dataclass_fields__))
    assert text == f"recipe unnamed: tweaks.1.x: expected no such key, got 'x'; known: {known}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mask": {"kind": "synflo", "sparsity": 0.9}},
         r"mask: kind: expected a known mask method, got 'synflo'; did you mean 'synflow'\? known: ac_dc, auto, "),
        ({"mask": "mangitude"}, "mask: kind: expected a known mask method, got 'mangitude'; did you mean 'magnitude'"),
        ({"mask": {"kind": 3}}, "mask: kind: expected a known mask method, got 3; known: ac_dc, auto"),
        ({"mask": {"kind": ["snip"]}}, r"mask: kind: expected a known mask method, got \['snip'\]; "),
        ({"mask": {"sparsity": 0.9}}, "mask: expected a key 'kind', got the keys sparsity; known: ac_dc, auto, "),
        ({"mask": {}}, "mask: expected a key 'kind', got the keys none; known: ac_dc, auto, "),
        ({}, "mask: expected a value, got none; add the key 'mask'"),
        ({"mask": None}, "mask: expected .*got None"),
        ({**PLAIN, "tweaks": ["ghostskip"]},
         r"tweaks.0: kind: expected a known tweak, got 'ghostskip'; did you mean 'ghost_skip'\? known: ghost_skip, "),
        ({**PLAIN, "tweaks": [{"until": "3ep"}]}, "tweaks.0: expected a key 'kind', got the keys until; known: ghost_skip, "),
        ({**PLAIN, "tweaks": [3]}, r"tweaks.0: expected .*got 3"),
        ({**PLAIN, "tweaks": "ghost_skip"}, "tweaks: expected .*got 'ghost_skip'"),
        ({"mask": {"kind": "random", "sparsity": 1.0}}, r"mask.sparsity: expected a sparsity in \[0, 1\), got 1.0; 0 is dense"),
        ({"mask": {"kind": "random", "sparsity": 98}},
         r"mask.sparsity: expected a sparsity in \[0, 1\), got 98.0; 98 % is written 0.98"),
        ({"mask": {"kind": "random", "sparsity": -0.1}}, r"mask.sparsity: expected a sparsity in \[0, 1\), got -0.1"),
        ({"mask": {"kind": "random", "sparsity": float("nan")}}, r"mask.sparsity: expected a sparsity in \[0, 1\), got nan"),
        ({"mask": {"kind": "random", "sparsity": "most"}}, "mask.sparsity: expected .*valid number.*got 'most'"),
        ({**PLAIN, "tweaks": [{"kind": "ghost_skip", "until": 60}]},
         r"tweaks.0.until: time: expected a number with a unit, got 60; write a number with a unit: '0.4dur' "),
        ({**PLAIN, "tweaks": [{"kind": "soft_activation", "until": 0.4}]}, "time: expected a number with a unit, got 0.4"),
        ({**PLAIN, "tweaks": [{"kind": "soft_activation", "until": "60 epochs"}]}, "with a unit, got '60 epochs'"),
        ({**PLAIN, "tweaks": [{"kind": "soft_activation", "until": "40dur"}]}, "expected at most 1dur, .*, got '40dur'"),
        ({**PLAIN, "duration": 10}, "duration: time: expected a number with a unit, got 10"),
        ({**PLAIN, "duration": "1dur"}, "duration: expected epochs or steps, got '1dur'; write '182ep' or '5000ba'"),
        ({**PLAIN, "schedule": {"at": ["91ep", 136]}}, "schedule.at.1: time: expected a number with a unit, got 136"),
        ({**PLAIN, "tweaks": ["ghost_skip", "label_smoothing", {"kind": "ghost_skip", "until": "1ep"}]},
         "tweaks: expected each kind once, got 'ghost_skip' twice; merge the two entries"),
        ({**PLAIN, "tweaks": [{"kind": "label_smoothing", "alpha": 1}]}, "tweaks.0.alpha: expected .*less than 1, got 1"),
        ({**PLAIN, "tweaks": [{"kind": "ghost_skip", "layers": []}]}, "tweaks.0.layers: expected .*at least 1 item"),
        ({**PLAIN, "tweaks": [{"kind": "ghost_skip", "schedule": "step"}]}, "tweaks.0.schedule: expected .*'cubic', got 'step'"),
        ({**PLAIN, "seed": -1}, "seed: expected .*got -1"),
        ({**PLAIN, "seed": 1.5}, "seed: expected .*got 1.5"),
        ({**PLAIN, "trainer": "keras"}, "trainer: expected .*'torch', got 'keras'"),
        ({**PLAIN, "optimizer": {"lr": 0, "momentum": 2}}, r"optimizer.lr: expected .*greater than 0, got 0; .*\(and 1 more\)"),
        ({**PLAIN, 3: 4}, "3: expected keys should be strings, got 3"),
    ],
)  # fmt: skip
def test_an_error_says_where_what_and_what_to_do(content: dict[str, Any], message: str) -> None:
    assert re.search(f"^recipe unnamed: {message}", error_of(content)) or re.search(
        f"^recipe unnamed: [a-z0-9.]+: (time: )?.*{message}", error_of(content)
    )


@pytest.mark.parametrize("wrong", [3, "text", ["mask"], None])
def test_a_recipe_is_a_dict(wrong: Any) -> None:
    assert error_of(wrong).startswith(f"recipe: expected keys and values, got {wrong!r}")


def test_a_name_that_is_no_recipe() -> None:
    for load in (Recipe.load, Recipe.of):
        with pytest.raises(
            TostError, match="recipe: expected a known recipe name or file, got 'quikstart'; did you mean 'quick"
        ):
            load("quikstart")
        with pytest.raises(TostError, match=r"recipe: expected an existing file, got 'no/such.yaml'; check the path"):
            load("no/such.yaml")


def bomb(merge: bool) -> str:
    """Nine names, each nine times the one before: a few hundred bytes that stand for a billion."""
    lines = ["a0: &a0 {x0: lol}" if merge else "a0: &a0 [lol]"]
    for i in range(1, 10):
        aliases = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} {{<<: [{aliases}], x{i}: lol}}" if merge else f"a{i}: &a{i} [{aliases}]")
    return "\n".join([*lines, "mask: {kind: random, sparsity: 0.5}"])


@pytest.mark.parametrize(
    "text",
    [
        "mask: [unclosed",
        "mask: {kind: random, sparsity: 0.5}\n\tseed: 1",
        "!!python/object/apply:os.system ['touch HERE']",
        "mask: !!python/object/new:tost_plugins.masks.random.Random {sparsity: 0.5}",
        "mask: !!python/name:os.system",
        "name: !own thing",
        "- a list",
        "just text",
        "",
        "a: 1\n---\nb: 2",
        "[" * 800,
        "seed: " + "9" * 5000,
        "mask: &m {kind: random, sparsity: 0.5}\ndata: *m",
        "mask: &m {again: *m}",
        bomb(merge=False),
        bomb(merge=True),
    ],
    ids=["torn", "tab", "apply", "new", "name", "own tag", "list", "text", "empty", "two", "deep", "long", "alias", "recursive",
         "bomb", "merge bomb"],
)  # fmt: skip
def test_a_file_that_is_no_plain_yaml_is_an_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("HERE", str(tmp_path / "touched")))
    started = time.process_time()
    with pytest.raises(TostError) as error:
        Recipe.load(path)
    assert time.process_time() - started < 5
    assert not (tmp_path / "touched").exists()
    assert str(error.value).startswith(f"recipe {path}: expected ") and "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00name: x")
    with pytest.raises(TostError, match="expected YAML, got something unreadable"):
        Recipe.load(path)


def test_a_key_without_a_value_is_to_be_left_away(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("mask: {kind: snip, sparsity: 0.5}\ndata:\n")
    said = "data: expected keys and values, got None; write one, or leave the key away"
    refused(lambda: Recipe.load(path), f"recipe {path}: {said}")


@pytest.mark.parametrize("word", ["true", "yes", "on", "no"])
@pytest.mark.parametrize(
    "key",
    ["seed", "data.batch_size", "data.limit", "optimizer.lr", "schedule.factor", "watch.batches", "mask.sparsity", "mask.batches",
     "mask.allocation.0"],
)  # fmt: skip
def test_a_yes_is_no_number(word: str, key: str) -> None:
    content = {"mask": {"kind": "snip", "sparsity": 0.5}, "watch": {"measures": ["in_degree"]}}
    changed = apply_changes(content, [f"{key}={word}"])
    refused(
        lambda: Recipe.from_dict(changed), f"recipe unnamed: {key}: ".replace(".0:", ": 0:"), f"got {word != 'no'}; "
    )
