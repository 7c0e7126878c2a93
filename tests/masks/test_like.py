"""like.py: as many weights in each layer as another method keeps there, at places that are drawn."""

from pathlib import Path

import pytest
import torch
from mask_nets import batches, net
from torch import nn

from tost_plugins import Recipe, Session, TostError
from tost_plugins.masks import Mask, find

ONE_SHOT = ("magnitude", "snip", "grasp", "synflow")


def counts(mask: Mask) -> list[int]:
    return [int(keep.sum()) for keep in mask.values()]


@pytest.mark.parametrize("kind", ONE_SHOT)
@pytest.mark.parametrize("taker", ["random", "set", "rigl"])
def test_the_counts_are_the_methods_and_the_places_are_drawn(taker: str, kind: str) -> None:
    scored = find(net(), kind, 0.8, batches())
    first, again, other = (
        find(net(), taker, 0.8, batches(), allocation=f"like:{kind}", seed=seed) for seed in (0, 0, 1)
    )
    assert counts(first) == counts(scored)
    assert first == again != other
    assert first.overlap(scored) < 0.7 and first.overlap(other) < 0.7  # the same places would be 1
    drawn = find(net(), "random", 0.8, allocation="uniform")
    assert counts(drawn) != counts(scored)


def test_places_are_drawn_as_they_are_for_any_other_allocation() -> None:
    """Layers whose count is the same under two rules get the same weights: the shares take no numbers of the draw."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.arange(1.0, 37).view(6, 6))
    like = find(model, "random", 0.5, allocation="like:magnitude")
    assert counts(like) == [18, 18]
    assert like == find(model, "random", 0.5, allocation="uniform")


def test_keep_one_reaches_the_method_whose_shares_are_taken() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    nn.init.constant_(model[2].weight, 1e-4)
    assert counts(find(model, "random", 0.75, allocation="like:magnitude", on_collapse="keep_one")) == [31, 1]
    with pytest.raises(TostError, match="got none: the last one ends at"):
        find(model, "random", 0.75, allocation="like:magnitude")


def test_with_a_live_budget_the_counts_are_live_ones() -> None:
    mask = find(net(), "random", 0.9, batches(), allocation="like:snip", budget="live")
    assert mask.kept == find(net(), "snip", 0.9, batches()).kept


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        ("like:snipp", "expected a known mask method, got 'snipp'; did you mean 'snip'"),
        ("like:rigl", "finds a mask of a given sparsity at once, got 'like:rigl'; known: random, magnitude, snip"),
        ("like:file", "at once, got 'like:file'"),
        ("like:lottery_ticket", "at once, got 'like:lottery_ticket'"),
        ("likely", "rule: expected a known allocation, got 'likely'; known: er"),
    ],
)
def test_what_has_no_shares_is_refused_when_the_recipe_is_read(allocation: str, message: str) -> None:
    with pytest.raises(TostError, match=message):
        Recipe.from_dict({"mask": {"kind": "random", "sparsity": 0.9, "allocation": allocation}})


def test_a_method_that_looks_at_batches_asks_for_them() -> None:
    with pytest.raises(TostError, match="allocation like:snip: snip: expected batches to look at, got None"):
        find(net(), "random", 0.8, allocation="like:snip")


def test_only_masks_that_are_drawn_take_others_shares() -> None:
    with pytest.raises(TostError, match="expected a known allocation, got 'like:magnitude'"):
        find(net(), "snip", 0.8, batches(), allocation="like:magnitude")


def test_a_recipe_with_it_is_written_trains_and_resumes(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(
        {"mask": {"kind": "set", "sparsity": 0.8, "allocation": "like:snip", "every": "2ba"}, "tweaks": []}
    )
    recipe.to_yaml(tmp_path / "mine.yaml")
    assert Recipe.load(str(tmp_path / "mine.yaml")).to_dict() == recipe.to_dict()
    model, data = net(), batches(6)
    session = Session(model, recipe)
    session.attach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with session.drive(optimizer, batches=data, total_steps=6):
        started = counts(session.mask)
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert counts(session.mask) == started == counts(find(net(), "snip", 0.8, data))
