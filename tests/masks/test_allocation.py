"""allocation.py: exact counts per layer, and errors that name what a map gets wrong."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tost_plugins.errors import TostError
from tost_plugins.masks.allocation import allocate, kept_count

SHAPES = {"stem.weight": (4, 3, 3, 3), "body.weight": (16, 4, 3, 3), "head.weight": (10, 16)}
SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}
TOTAL = sum(SIZES.values())  # 108 + 576 + 160 = 844


def test_global_gives_no_layer_a_share() -> None:
    assert allocate("global", SHAPES, 0.9) is None


def test_uniform_by_hand() -> None:
    # 10.8, 57.6 and 16 of 844 would be kept, 84 in all: 83 rounded down, and the largest remainder gets one.
    assert allocate("uniform", SHAPES, 0.9) == {"stem.weight": 11, "body.weight": 57, "head.weight": 16}


def test_ties_of_remainders_go_to_the_first_layer() -> None:
    assert allocate("uniform", {"a": (2, 3), "b": (2, 3), "c": (2, 3)}, 0.75) == {"a": 2, "b": 1, "c": 1}


def test_erk_by_hand() -> None:
    # density ~ sum(shape) / size, so counts ~ 13, 26, 26: 16.8, 33.6, 33.6 of 84.
    assert allocate("erk", SHAPES, 0.9) == {"stem.weight": 17, "body.weight": 34, "head.weight": 33}


def test_er_by_hand() -> None:
    # counts ~ (n_in + n_out) * kernel: 7 * 9, 20 * 9, 26: 84 / 269 of each.
    assert allocate("er", SHAPES, 0.9) == {"stem.weight": 20, "body.weight": 56, "head.weight": 8}


def test_erk_makes_a_layer_dense_and_rescales_the_others_until_none_exceeds_its_size() -> None:
    shapes = {"a": (2, 2), "b": (4, 4), "c": (20, 20)}
    # Kept: 126 of 420, counts ~ 4, 8, 40. 9.7 > 4: a is dense, 122 left; 20.3 > 16: so is b, 106 for c.
    assert allocate("erk", shapes, 0.7) == {"a": 4, "b": 16, "c": 106}


@pytest.mark.parametrize("rule", ["uniform", "er", "erk"])
@given(
    shapes=st.lists(
        st.one_of(
            st.tuples(st.integers(1, 40), st.integers(1, 40)),
            st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5)),
        ),
        min_size=1,
        max_size=8,
    ),
    sparsity=st.floats(0, 1, exclude_max=True),
)
def test_counts_are_exact_and_fit(rule: str, shapes: list[tuple[int, ...]], sparsity: float) -> None:
    layers = {f"layer{i}": shape for i, shape in enumerate(shapes)}
    counts = allocate(rule, layers, sparsity)
    assert list(counts) == list(layers)
    assert sum(counts.values()) == round((1 - sparsity) * sum(math.prod(shape) for shape in shapes))
    assert all(0 <= counts[name] <= math.prod(shape) for name, shape in layers.items())


def test_erk_plus_by_hand() -> None:
    # 253 of 844 stay: the head's 160, and 93 shared 13 : 26 as in erk, 31 and 62.
    assert allocate("erk_plus", SHAPES, 0.7) == {"stem.weight": 31, "body.weight": 62, "head.weight": 160}
    # Where erk makes it dense by itself nothing is different.
    assert allocate("erk_plus", {"a": (20, 20), "b": (2, 2)}, 0.7) == allocate("erk", {"a": (20, 20), "b": (2, 2)}, 0.7)


def test_uniform_plus_by_hand() -> None:
    # 169 of 844 stay: the stem's 108, 61 shared by 576 and 160 would be 48 and 13, but a fifth of the head is 32.
    assert allocate("uniform_plus", SHAPES, 0.8) == {"stem.weight": 108, "body.weight": 29, "head.weight": 32}
    # 422 stay: 314 of 736 are more than a fifth.
    assert allocate("uniform_plus", SHAPES, 0.5) == {"stem.weight": 108, "body.weight": 246, "head.weight": 68}
    # Without a fully-connected layer only the first is spared; a recurrent weight is none.
    assert allocate("uniform_plus", {"a": (2, 2, 3), "rnn.weight_hh_l0": (6, 2)}, 0.25) == {
        "a": 12,
        "rnn.weight_hh_l0": 6,
    }


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8),
    sparsity=st.floats(0, 1, exclude_max=True),
)
@pytest.mark.parametrize("rule", ["erk_plus", "uniform_plus"])
def test_the_rules_with_a_plus_are_exact_or_say_what_they_would_take(
    rule: str, sizes: list[tuple[int, int]], sparsity: float
) -> None:
    layers = {f"layer{i}": shape for i, shape in enumerate(sizes)}
    total = kept_count(sparsity, sum(map(math.prod, sizes)))
    first, last = math.prod(sizes[0]), math.prod(sizes[-1])
    try:
        counts = allocate(rule, layers, sparsity)
    except TostError as error:
        spared = last if rule == "erk_plus" else first + (-(-last // 5) if len(sizes) > 1 else 0)
        assert total < spared and "set a sparsity well below" in str(error)
        return
    assert sum(counts.values()) == total
    assert all(0 <= counts[name] <= math.prod(shape) for name, shape in layers.items())
    kept_first, kept_last = counts["layer0"], counts[f"layer{len(sizes) - 1}"]
    assert kept_last == last if rule == "erk_plus" else (kept_first == first and 5 * kept_last >= last)


@pytest.mark.parametrize(
    ("rule", "shapes", "message"),
    [
        (
            "erk_plus",
            SHAPES,
            "more than the 160 weights of head.weight that it spares, got 84; set a sparsity well below ",
        ),
        ("uniform_plus", SHAPES, "more than the 108 weights of stem.weight that it spares, got 84"),
        ("erk_plus", {"a": (3, 3, 3, 3)}, "expected a fully-connected layer, which stays dense, got none; use erk"),
    ],
)
def test_what_a_rule_with_a_plus_cannot_spare(rule: str, shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(TostError, match=message):
        allocate(rule, shapes, 0.9)


@pytest.mark.parametrize("rule", ["uniform", "er", "erk", "erk_plus", "uniform_plus", {"head": 0.0}, {"*": 0.0}])
def test_sparsity_0_is_dense(rule: object) -> None:
    assert allocate(rule, SHAPES, 0) == SIZES


def test_a_map_gives_exact_sparsities_and_the_rest_shares_what_is_left() -> None:
    counts = allocate({"head": 0.5, "stem.*": 0.0}, SHAPES, 0.7)
    assert counts["head.weight"] == 80
    assert counts["stem.weight"] == 108
    assert counts["body.weight"] == kept_count(0.7, TOTAL) - 188


def test_the_first_glob_that_matches_wins() -> None:
    counts = allocate({"stem": 0.0, "*e*": 0.5}, {**SHAPES, "x": (40, 40)}, 0.7)
    assert (counts["stem.weight"], counts["head.weight"]) == (108, 80)


def test_a_map_of_all_layers_rounds_within_the_total() -> None:
    shapes = {name: (1, 5) for name in "abcd"}
    counts = allocate({"*": 0.5}, shapes, 0.5)
    assert counts == {"a": 3, "b": 3, "c": 2, "d": 2}


@pytest.mark.parametrize(
    ("globs", "sparsity", "message"),
    [
        (
            {"tail": 0.5},
            0.9,
            "expected globs that match a layer, got 'tail'; layers: stem.weight, body.weight",
        ),
        ({"*": 0.9, "head": 0.5}, 0.9, "got 'head' after others that match all of its layers; put it before"),
        (
            {"body": 0.0},
            0.9,
            "0 to 268 weights, got -492; with this map sparsity lies between 0 and 0.317536",
        ),
        ({"body": 0.99}, 0.1, "with this map sparsity lies between 0.675355 and 0.992891"),
        ({"*": 0.5}, 0.9, "whose total is the sparsity 0.9, got 0.5 in total; set sparsity to 0.5"),
    ],
)
def test_a_map_that_does_not_go_with_the_layers_or_the_sparsity(
    globs: dict[str, float], sparsity: float, message: str
) -> None:
    with pytest.raises(TostError) as error:
        allocate(globs, SHAPES, sparsity)
    assert message in str(error.value)


def test_the_total_that_an_error_names_is_accepted() -> None:
    globs = {"stem": 0.123, "*": 0.777}
    with pytest.raises(TostError, match="set sparsity to") as error:
        allocate(globs, SHAPES, 0.9)
    named = float(str(error.value).split("set sparsity to ")[1].split(",")[0])
    assert sum(allocate(globs, SHAPES, named).values()) == round(0.877 * 108 + 0.223 * (576 + 160))


def test_an_unknown_rule_is_an_error() -> None:
    with pytest.raises(TostError, match="got 'erks'; did you mean 'erk'"):
        allocate("erks", SHAPES, 0.9)
