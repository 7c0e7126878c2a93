"""budget: live: as many weights as the sparsity says, every one of them on a path."""

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_nets import batches, net
from torch import Tensor, nn

from tost_plugins import masks
from tost_plugins.errors import TostError
from tost_plugins.lab import models
from tost_plugins.masks import Mask
from tost_plugins.masks.allocation import kept_count
from tost_plugins.masks.budget import live_mask
from tost_plugins.masks.methods.synflow import SynFlow
from tost_plugins.masks.paths.connectivity import Paths
from tost_plugins.training.params import prunable
from tost_plugins.training.task import Task

ONE_SHOT: dict[str, dict[str, Any]] = {
    "random": {},
    "magnitude": {},
    "snip": {"batches": 2},
    "grasp": {"per_class": 4},
    "synflow": {"rounds": 5},
}


def images(count: int = 20) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(count, 3, 32, 32), torch.arange(count) % 10)]


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk", {"0": 0.3}])
@pytest.mark.parametrize("kind", ONE_SHOT)
def test_exactly_as_many_as_asked_for_and_all_live(kind: str, allocation: Any) -> None:
    model = net()
    for sparsity in (0, 0.3, 0.8, 0.9, 0.95) if allocation != {"0": 0.3} else (0.6,):
        method = masks.MASKS[kind](sparsity=sparsity, allocation=allocation, budget="live", **ONE_SHOT[kind])
        mask = masks.find(model, method, batches=batches())
        assert mask.kept == kept_count(sparsity, mask.size)
        assert masks.live(model, mask, batches()[0]) == mask


@pytest.mark.parametrize("kind", ONE_SHOT)
def test_where_all_that_is_kept_is_live_it_is_the_same_mask(kind: str) -> None:
    model = net()
    method = masks.MASKS[kind](sparsity=0.3, allocation="uniform", **ONE_SHOT[kind])
    found = masks.find(model, method, batches=batches())
    assert masks.live(model, found, batches()[0]) == found
    again = masks.MASKS[kind](sparsity=0.3, allocation="uniform", budget="live", **ONE_SHOT[kind])
    assert masks.find(model, again, batches=batches()) == found


@pytest.mark.parametrize(
    ("name", "kind", "sparsity"),
    [
        ("mobilenet_v2", "random", 0.995),
        pytest.param("vgg16", "snip", 0.995, marks=pytest.mark.long),
    ],
)
def test_networks_that_lose_every_path_otherwise(name: str, kind: str, sparsity: float) -> None:
    torch.manual_seed(0)
    model, data = models.build(f"cifar/{name}", 10), images()
    with pytest.raises(TostError, match=r"expected a path of kept weights .* budget: live where the method has it"):
        masks.find(model, kind, sparsity, data)
    mask = masks.find(model, kind, sparsity, data, budget="live")
    assert mask.kept == kept_count(sparsity, mask.size) and masks.live(model, mask, data[0]) == mask


def test_synflow_gives_what_would_be_wasted_to_the_most_flow() -> None:
    torch.manual_seed(0)
    model, data = models.build("cifar/resnet8", 10), images(2)
    kept = masks.find(model, "synflow", 0.98, data, rounds=3)
    live = masks.find(model, "synflow", 0.98, data, rounds=3, budget="live")
    on_a_path = masks.live(model, kept, data[0])
    assert on_a_path.kept < kept.kept == live.kept  # else it would show nothing
    assert masks.live(model, live, data[0]) == live and (on_a_path - live).kept == 0
    assert model.stem.conv.weight.grad is None and SynFlow(sparsity=0.98).budget == "kept"


def test_the_same_on_every_call_and_the_model_as_it_was() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    found = [masks.find(model, "snip", 0.9, batches(), budget="live") for _ in range(2)]
    assert found[0] == found[1] and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- the search itself


class Tiny(nn.Module):
    """A residual network of linear layers."""

    def __init__(self, widths: list[int], residual: bool) -> None:
        super().__init__()
        sizes = [2, *widths]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.head, self.residual = nn.Linear(sizes[-1], 2), residual

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            out = layer(x).relu()
            x = x + out if self.residual and out.shape == x.shape else out
        return self.head(x)


@settings(max_examples=60)
@given(
    widths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    residual=st.booleans(),
    share=st.floats(0.05, 1),
    seed=st.integers(0, 10**6),
)
def test_small_networks(widths: list[int], residual: bool, share: float, seed: int) -> None:
    model = Tiny(widths, residual)
    params, paths = prunable(model), Paths(Task.of(model))
    size = sum(param.numel() for param in params.values())
    order, count = torch.randperm(size, generator=torch.Generator().manual_seed(seed)), max(1, round(share * size))
    try:
        mask = live_mask(order, params, count, paths)
    except TostError as error:
        assert "budget: live: expected at least" in str(error) and count <= len(widths)
        return
    assert Mask(paths.live(mask)) == mask and mask.kept <= count
    if mask.kept < count:  # no single weight can be added
        joins = paths.joins(mask)
        assert not any(bool((joins[name] & ~mask[name]).any()) for name in mask)


def test_less_than_a_path_needs_is_an_error() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    with pytest.raises(
        TostError, match=r"budget: live: expected at least \d weights, as many as lie on one path, got 4; set a low"
    ):
        masks.find(model, "random", 1 - 4 / 384, budget="live")
    assert masks.find(model, "random", 1 - 6 / 384, budget="live").kept == 6


def test_a_chain_that_no_single_weight_can_join_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv1d(2, 2, 1, groups=2), nn.Conv1d(2, 2, 1, groups=2), nn.Conv1d(2, 2, 1, groups=2))
    with caplog.at_level("INFO", "tost_plugins"):
        mask = masks.find(model, "random", 1 - 4 / 6, [torch.randn(2, 2, 3)], budget="live")
    assert mask.kept == 3 and "1 of 4 weights are left out" in caplog.text
