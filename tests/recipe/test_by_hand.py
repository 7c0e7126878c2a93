"""Mask methods and tweaks made by hand, without a recipe: what is wrong with their fields is said in one line."""

from typing import Any

import numpy as np
import pytest
import torch
from command import refused
from pydantic import TypeAdapter
from torch import nn

from tost_plugins import LotteryTicket, Mask, Recipe, Session, TostError, masks
from tost_plugins.masks import MASKS
from tost_plugins.masks.methods.lottery_ticket import LotteryTicket as TicketMethod
from tost_plugins.tweaks import TWEAKS

KNOWN = "er, erk, erk_plus, global, uniform, uniform_plus"
NEEDED = {"sparsity": 0.5, "path": "mask.pt"}
LIKE = "er, erk, erk_plus, global, like:KIND, uniform, uniform_plus"


@pytest.mark.parametrize("settings", [*MASKS.values(), *TWEAKS.values(), LotteryTicket], ids=lambda s: s.__name__)
@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"sparsty": 0.9}, "sparsty: expected no such key, got 'sparsty'; "),
        ({"kind": 3}, "kind: expected '"),
    ],
    ids=["misspelt", "wrong"],
)
def test_every_row_says_it_in_one_line(settings: type, fields: dict[str, Any], wrong: str) -> None:
    fields = fields | {name: value for name, value in NEEDED.items() if name in settings.__dataclass_fields__}
    with pytest.raises(TostError) as caught:
        settings(**fields)
    assert str(caught.value).startswith(f"{settings.__name__}: {wrong}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "fields", "said"),
    [
        (TWEAKS["sharpness"], {"rho": 0}, "Sharpness: rho: expected greater than 0, got 0; correct this value"),
        (MASKS["snip"], {"sparsity": 0.9, "batches": 0}, "Snip: batches: expected greater than or equal to 1, got 0; "),
        (
            MASKS["snip"],
            {"sparsity": 90},
            "Snip: sparsity: expected a sparsity in [0, 1), got 90.0; 90 % is written 0.9",
        ),
        (MASKS["set"], {"sparsity": 0.9, "every": 3}, "Set: every: time: expected a number with a unit, got 3; write "),
        (TicketMethod, {"sparsity": 0.9, "score": "x"}, "LotteryTicket: score: expected 'large_final', "),
        (LotteryTicket, {"sparsity": 0.9, "score": "x"}, "LotteryTicket: score: expected 'large_final', "),
        (MASKS["random"], {}, "Random: sparsity: expected a value, got none; add the key 'sparsity'"),
    ],
)
def test_fields_that_do_not_fit(settings: type, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(TostError) as caught:
        settings(**fields)
    assert str(caught.value).startswith(said)


def test_fields_go_by_name() -> None:
    with pytest.raises(TostError, match=r"^Snip: expected fields by name alone, got 0.9 by place; write FIELD=VALUE"):
        MASKS["snip"](0.9)


@pytest.mark.parametrize(
    ("kind", "allocation", "said"),
    [
        ("snip", "erq", f"rule: expected a known allocation, got 'erq'; did you mean 'er'? known: {KNOWN}"),
        ("snip", "like:magnitude", f"rule: expected a known allocation, got 'like:magnitude'; known: {KNOWN}"),
        (
            "random",
            "unifrom",
            f"rule: expected a known allocation, got 'unifrom'; did you mean 'uniform'? known: {LIKE}",
        ),
        ("random", {"0": 2}, "0: expected a sparsity in [0, 1), got 2.0; 2 % is written 0.02"),
        ("snip", {"0": "half"}, "0: expected a sparsity in [0, 1), got 'half'; 0 is dense, 0.9 keeps 10 %"),
        ("snip", 3, "expected a rule's name or a map, got 3; known: global, uniform, uniform_plus, er, erk, erk_plus"),
    ],
)
def test_an_allocation_that_is_none_is_said_once(kind: str, allocation: Any, said: str) -> None:
    with pytest.raises(TostError) as made:
        MASKS[kind](sparsity=0.5, allocation=allocation)
    assert str(made.value) == f"{MASKS[kind].__name__}: allocation: {said}"
    with pytest.raises(TostError) as found:
        masks.find(nn.Linear(2, 2), kind, 0.5, allocation=allocation)
    assert str(found.value) == f"masks.find({kind}): allocation: {said}"


@pytest.mark.parametrize("given", [3, ["snip"], nn.Linear(2, 2)])
def test_what_is_no_recipe_is_said(given: Any) -> None:
    line = "recipe: expected a Recipe, a dict, a path or a shipped name, got"
    for call in (Recipe.of, lambda value: Session(nn.Linear(2, 2), value)):
        refused(lambda call=call: call(given), line)


@pytest.mark.parametrize("seed", ["a", -1, 0.5, True, 2**64])
def test_seeds_are_whole_numbers(seed: Any) -> None:
    line = "seed: expected a whole number from 0 to 2^64 - 1, got"
    refused(lambda: masks.find(nn.Linear(2, 2), "random", 0.5, seed=seed), f"masks.find(random): {line}")
    refused(lambda: masks.soft(Mask({"w": torch.ones(2)}), seed), f"soft: {line}")


def test_seeds_may_be_numbers_of_numpy() -> None:
    seeds: list[Any] = [3, np.int64(3)]
    found = [masks.find(nn.Linear(4, 4), "random", 0.5, seed=seed) for seed in seeds]
    assert found[0] == found[1]


def numbers(schema: dict[str, Any]) -> list[str]:
    """The fields that are numbers, by what editors are told of them."""
    forms = {name: [field, *field.get("anyOf", ())] for name, field in schema["properties"].items()}
    return [name for name, forms in forms.items() if any(f.get("type") in ("integer", "number") for f in forms)]


@pytest.mark.parametrize("settings", [*MASKS.values(), *TWEAKS.values()], ids=lambda s: s.__name__)
def test_true_is_no_number(settings: type) -> None:
    needed = {name: value for name, value in NEEDED.items() if name in settings.__dataclass_fields__}
    for field in numbers(TypeAdapter[Any](settings).json_schema()):
        refused(
            lambda field=field: settings(**needed | {field: True}), f"{field}: expected a number, got True; YAML reads"
        )


@pytest.mark.parametrize("own", ["hides", "takes_step"])
def test_what_a_class_says_of_itself_is_no_field(own: str) -> None:
    given: dict[str, Any] = {"sparsity": 0.5, own: True}
    calls = (
        lambda: MASKS["dnw"](**given),
        lambda: masks.find(nn.Linear(2, 2), "dnw", **given),
        lambda: Recipe.from_dict({"mask": {"kind": "dnw", **given}}),
    )
    for call in calls:
        said = refused(call, f"{own}: expected no such key, got '{own}'; ")
        assert own not in said.partition("; ")[2]
