"""keep.py and best.py: exact counts whatever the ties, and layers that would lose everything."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.topk import count_true, kth_lowest, revive, top_k, top_mask

SCORES = {"a": torch.tensor([[0.9, 0.8], [0.7, 0.1]]), "b": torch.tensor([0.6, 0.5, 0.4, 0.3])}


def as_lists(mask: Mask) -> dict[str, list[int]]:
    return {name: tensor.flatten().int().tolist() for name, tensor in mask.items()}


def test_global_and_per_layer_by_hand() -> None:
    assert as_lists(top_mask(SCORES, 0.5)) == {"a": [1, 1, 1, 0], "b": [1, 0, 0, 0]}
    assert as_lists(top_mask(SCORES, 0.5, "uniform")) == {"a": [1, 1, 0, 0], "b": [1, 1, 0, 0]}
    assert as_lists(top_mask(SCORES, 0.5, {"b": 0.25})) == {"a": [1, 0, 0, 0], "b": [1, 1, 1, 0]}


def test_sparsity_0_keeps_all() -> None:
    assert top_mask(SCORES, 0) == Mask.dense(SCORES)


def test_ties_go_to_the_lower_index() -> None:
    equal = {"a": torch.zeros(2, 2), "b": torch.zeros(4)}
    assert as_lists(top_mask(equal, 0.25)) == {"a": [1, 1, 1, 1], "b": [1, 1, 0, 0]}
    assert as_lists(top_mask(equal, 0.25, "uniform")) == {"a": [1, 1, 1, 0], "b": [1, 1, 1, 0]}


@given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    share=st.floats(0, 1),
)
def test_best_is_a_stable_sort(values: list[int], share: float) -> None:
    row, count = torch.tensor(values, dtype=torch.float64), round(share * len(values))
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert top_k(row, count).nonzero().flatten().tolist() == sorted(order[:count])


@given(start=st.integers(0, 20), size=st.integers(16_000, 20_000), share=st.sampled_from([0, 0.1, 0.9, 1]))
def test_counts_wherever_a_row_begins_and_ends(start: int, size: int, share: float) -> None:
    mask = torch.rand(20_100, generator=torch.Generator().manual_seed(size)) < share
    part = mask[start : start + size]
    assert int(count_true(part)) == sum(part.tolist())
    assert int(count_true(mask[:20_000].view(200, 100).t())) == int(mask[:20_000].sum())


@pytest.mark.parametrize(
    "kind", ["spread", "few values", "mostly -1", "half 0", "in step", "sorted", "misleading", "constant"]
)
def test_a_long_row_gives_the_very_value_that_kthvalue_gives(kind: str) -> None:
    size = (1 << 17) + 12345
    row = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if kind == "few values":
        row = (row * 5).floor()
    elif kind == "mostly -1":
        row[row < 0.97] = -1
    elif kind == "half 0":
        row[row < 0.5] = 0
        row[row > 0.95] = 0.95
    elif kind == "in step":  # kernels of 3 by 3 of which the middle alone has scores
        row[torch.arange(size) % 9 != 4] = 0
    elif kind == "sorted":
        row = row.sort().values
    elif kind == "misleading":  # the sample sees nothing but the lowest values
        row[:: size // (1 << 17)] = -1
    elif kind == "constant":
        row = torch.zeros(size)
    for k in (1, 2, size // 10, size // 2, int(size * 0.97) + 5, size - 1, size):
        assert kth_lowest(row, k) == row.kthvalue(k).values
    assert int(top_k(row, 54321).sum()) == 54321


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_names_its_layer(bad: float) -> None:
    with pytest.raises(TostError, match="expected finite scores, got NaN or infinity in b;"):
        top_mask({"a": torch.ones(3), "b": torch.tensor([1.0, bad])}, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_of_any_float_type(dtype: torch.dtype) -> None:
    assert as_lists(top_mask({n: t.to(dtype) for n, t in SCORES.items()}, 0.5))["a"] == [1, 1, 1, 0]


def test_a_layer_may_lose_all_its_weights() -> None:
    scores = {"a": torch.ones(9), "b": torch.zeros(3), "c": torch.zeros(3)}
    assert [int(kept.sum()) for kept in top_mask(scores, 0.5).values()] == [8, 0, 0]


def test_keep_one_takes_the_best_and_drops_the_worst_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    scores = {"a": torch.tensor([9.0, 8, 7, 6]), "b": torch.tensor([1.0, 2.0]), "c": torch.tensor([5.0, 3])}
    with caplog.at_level(logging.WARNING, "tost_plugins"):
        mask = top_mask(scores, 0.5, on_collapse="keep_one")
    assert as_lists(mask) == {"a": [1, 1, 0, 0], "b": [0, 1], "c": [1, 0]}
    assert "2 layers would have lost all weights" in caplog.text
    assert "b, c" in caplog.text


def test_keep_one_leaves_a_layer_its_last_weight() -> None:
    scores = {"a": torch.tensor([9.0, 8, 7]), "b": torch.tensor([6.0, 0, 0]), "c": torch.tensor([1.0, 0.5])}
    assert as_lists(top_mask(scores, 0.5, on_collapse="keep_one")) == {"a": [1, 1, 0], "b": [1, 0, 0], "c": [1, 0]}


def test_keep_one_leaves_dense_layers_dense() -> None:
    scores = {"a": torch.full((2,), 0.1), "b": torch.arange(1.0, 9), "c": torch.arange(2.0)}
    mask = top_mask(scores, 0.5, {"a": 0.0, "c": 0.9}, on_collapse="keep_one")
    assert as_lists(mask) == {"a": [1, 1], "b": [0, 0, 0, 0, 0, 1, 1, 1], "c": [0, 1]}


def test_keep_one_needs_a_weight_per_layer() -> None:
    with pytest.raises(TostError, match="got 1 where 2 are needed; set a lower sparsity"):
        top_mask({"a": torch.ones(4), "b": torch.ones(4)}, 0.9, on_collapse="keep_one")


def test_everything_removed_is_an_error_where_one_is_to_be_kept() -> None:
    assert top_mask({"a": torch.ones(4), "b": torch.ones(4)}, 0.99).kept == 0
    with pytest.raises(TostError, match="got 0 where 2 are needed"):
        top_mask({"a": torch.ones(4), "b": torch.ones(4)}, 0.99, on_collapse="keep_one")


def weights() -> dict[str, Tensor]:
    return {"a": torch.tensor([1.0, -3.0, 2.0]), "b": torch.tensor([1.0, 1.0])}


def test_a_given_mask_with_an_empty_layer() -> None:
    empty = Mask({"a": torch.zeros(3), "b": torch.ones(2)})
    assert revive(empty, weights(), "error") is empty
    assert as_lists(revive(empty, weights(), "keep_one")) == {"a": [0, 1, 0], "b": [1, 1]}


def test_a_given_mask_without_empty_layers_stays() -> None:
    mask = Mask({"a": torch.tensor([0, 1, 0]), "b": torch.ones(2)})
    assert revive(mask, weights(), "error") is mask


@pytest.mark.parametrize("moved", [0.0, 1e-4, 0.1, 10.0])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.9])
def test_what_was_highest_a_moment_ago_changes_nothing_but_the_time(moved: float, share: float) -> None:
    for size in (1 << 17, (1 << 18) + 5):
        scores = torch.randn(size).abs()
        count = int(share * size)
        before = top_k(scores, count)
        after = scores + moved * torch.randn(size)
        assert torch.equal(top_k(after, count, before), top_k(after, count))
        ties = (after * 8).round()
        assert torch.equal(top_k(ties, count, before), top_k(ties, count))
        assert torch.equal(top_k(after, count, ~before), top_k(after, count))  # a hint that is wrong costs time
