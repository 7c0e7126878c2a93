"""Splits and the loader: what it yields, that it repeats, and what it refuses."""

from typing import Any

import pytest
import torch
from command import refused

from tost_plugins.lab.data import Augment, Loader, Split


def numbered(count: int, channels: int = 1, side: int = 1) -> Split:
    """Image i is filled with i, and its label is i too, so that a batch shows which images it holds."""
    values = torch.arange(count)
    return Split(values.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, channels, side, side).clone(), values)


def loader(split: Split, batch_size: int, **options: Any) -> Loader:
    channels = split.images.shape[1]
    plain = {"seed": 0, "shuffle": True, "augment": None, "mean": (0.0,) * channels, "std": (1.0,) * channels}
    return Loader(split, batch_size, **{**plain, **options})


def labels(batches: Loader) -> list[list[int]]:
    return [batch.tolist() for _, batch in batches]


def images_of(batches: Loader) -> list[int]:
    return [image for batch in labels(batches) for image in batch]


def same(one: Any, other: Any) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


# Loader


def test_normalised_float_batches() -> None:
    split = Split(torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(2, 2, 1, 1), torch.tensor([3, 4]))
    ((images, targets),) = loader(split, 2, shuffle=False, mean=(0.2, 0.5), std=(0.1, 0.25))
    assert images.dtype == torch.float32
    assert targets.tolist() == [3, 4]
    # 0 and 102 are 0.0 and 0.4, less 0.2, over 0.1; 51 and 255 are 0.2 and 1.0, less 0.5, over 0.25
    torch.testing.assert_close(images.view(2, 2), torch.tensor([[-2.0, -1.2], [2.0, 2.0]]))


@pytest.mark.gpu
def test_a_gpu_makes_the_batches_of_the_cpu() -> None:
    options = {"augment": Augment(1, True), "mean": (0.3,), "std": (0.2,)}
    split = numbered(70, side=4)
    for (here, targets), (there, others) in zip(
        loader(split, 16, **options), loader(split.to("cuda"), 16, **options), strict=True
    ):
        assert there.is_cuda and others.is_cuda and others.tolist() == targets.tolist()
        torch.testing.assert_close(there.cpu(), here)


def test_the_split_is_left_alone() -> None:
    split = numbered(6, side=4)
    before = split.images.clone()
    for images, targets in loader(split, 3, augment=Augment(1, True), mean=(0.5,), std=(0.5,)):
        images.zero_(), targets.zero_()
    assert torch.equal(split.images, before)
    assert split.labels.tolist() == list(range(6))


def test_in_order_without_shuffling() -> None:
    batches = loader(numbered(7), 3, shuffle=False)
    assert labels(batches) == [[0, 1, 2], [3, 4, 5], [6]]
    assert len(batches) == 3
    assert (batches.batch_size, len(batches.dataset)) == (3, 7)


def test_shuffled_epochs_hold_every_image_once() -> None:
    batches = loader(numbered(8), 3)
    orders = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        orders.append(images_of(batches))
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_same_seed_and_epoch_same_batches() -> None:
    options = {"augment": Augment(1, True), "mean": (0.3,), "std": (0.2,)}
    split = numbered(64, side=4)
    batches = loader(split, 16, **options)
    batches.set_epoch(2)
    first = list(batches)
    assert same(first, batches)
    again = loader(split, 16, **options)
    again.set_epoch(2)
    assert same(first, again)
    again.set_epoch(3)
    assert not same(first, again)
    other = loader(split, 16, seed=1, **options)
    other.set_epoch(2)
    assert not same(first, other)


def test_seed_and_epoch_do_not_add_up() -> None:
    one, other = loader(numbered(32), 8, seed=1), loader(numbered(32), 8, seed=2)
    one.set_epoch(2), other.set_epoch(1)
    assert labels(one) != labels(other)


def test_two_iterators_at_once() -> None:
    batches = loader(numbered(9), 3)
    assert all(torch.equal(x[1], y[1]) for x, y in zip(batches, batches, strict=True))


def test_an_iterator_keeps_its_epoch() -> None:
    batches = loader(numbered(32), 8)
    expected = labels(batches)
    started = iter(batches)
    batches.set_epoch(1)
    assert [batch.tolist() for _, batch in started] == expected


def test_global_random_state_is_neither_read_nor_moved() -> None:
    batches = loader(numbered(8, side=4), 4, augment=Augment(2, True))
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), list(batches)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first, batches)


def test_start_later() -> None:
    batches = loader(numbered(10, side=4), 3, shuffle=True, augment=Augment(1, True))
    assert same(list(batches)[2:], batches.iterate(start=2))
    assert list(batches.iterate(start=len(batches))) == []
    assert refused(lambda: batches.iterate(start=4)) == (
        "Loader: expected a start in 0..3, got 4; choose the epoch with set_epoch"
    )


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_interleave_to_the_single_rank_batches(world: int, shuffle: bool) -> None:
    options = {"shuffle": shuffle, "augment": Augment(1, True)}
    split = numbered(22, side=4)
    whole = loader(split, 8, **options)
    ranks = [loader(split, 8, rank=rank, world=world, **options) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {len(whole)}
    for (images, targets), *parts in zip(whole, *ranks, strict=True):
        for rank, (some_images, some_targets) in enumerate(parts):
            assert torch.equal(some_images, images[rank::world])
            assert torch.equal(some_targets, targets[rank::world])


@pytest.mark.parametrize(
    ("count", "world", "options", "sizes"),
    [
        (9, 1, {}, [4, 4]),  # a last batch of 1 would break batch norm
        (9, 1, {"shuffle": False}, [4, 4, 1]),
        (10, 1, {}, [4, 4, 2]),
        (10, 1, {"drop_last": True}, [4, 4]),
        (10, 1, {"drop_last": True, "shuffle": False}, [4, 4]),
        (11, 2, {}, [2, 2]),  # rank 1 would get 1 of 3
        (11, 2, {"shuffle": False}, [2, 2, 2]),
        (9, 2, {"shuffle": False, "rank": 1}, [2, 2, 0]),
        (1, 1, {}, [1]),
        (3, 1, {}, [3]),
    ],
)
def test_last_batch(count: int, world: int, options: dict[str, Any], sizes: list[int]) -> None:
    batches = loader(numbered(count), 4, world=world, **options)
    assert [len(batch) for batch in labels(batches)] == sizes
    assert len(batches) == len(sizes)


def test_batches_of_one_are_kept_when_asked_for() -> None:
    assert len(labels(loader(numbered(3), 1))) == 3


def test_a_left_out_image_is_another_one_each_epoch() -> None:
    batches = loader(numbered(9), 4)
    left = set()
    for epoch in range(8):
        batches.set_epoch(epoch)
        left |= set(range(9)) - set(images_of(batches))
    assert len(left) > 2


def test_loader_refuses() -> None:
    split = numbered(5)
    empty = split.take(torch.arange(0))
    cases = [
        (empty, 2, {}, "a split with images, got 0; load more, or hold out some for it"),
        (
            split,
            0,
            {},
            "a batch size and a split of 1 or more, one image per rank, got (0, 5); use larger ones",
        ),
        (
            split,
            1,
            {"world": 2},
            "a batch size and a split of 2 or more, one image per rank, got (1, 5); use larger ones",
        ),
        (
            split,
            8,
            {"world": 6},
            "a batch size and a split of 6 or more, one image per rank, got (8, 5); use larger ones",
        ),
        (split, 2, {"rank": 2, "world": 2}, "a rank in 0..world-1, got (2, 2); ranks count from 0"),
        (
            split,
            6,
            {"drop_last": True},
            "a batch size of at most 5, the whole split, with drop_last, got 6; lower it, or keep the last batch",
        ),
        (
            split,
            2,
            {"std": (1.0,) * 3},
            "1 means and stds, one per channel, got (1, 3); take them from the same Data",
        ),
    ]
    for images, batch_size, options, said in cases:
        assert refused(lambda: loader(images, batch_size, **options)) == f"Loader: expected {said}"  # noqa: B023


def test_split_refuses() -> None:
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    assert refused(lambda: Split(images.float(), torch.zeros(2).long())) == (
        "Split: expected images as uint8 (N, C, H, W), got 'torch.float32 (2, 1, 4, 4)'; convert and stack them"
    )
    assert refused(lambda: Split(images, torch.zeros(3).long())) == (
        "Split: expected labels as int64 (2,), got 'torch.int64 (3,)'; give one class number per image"
    )


# Augment

IMAGE = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.uint8).view(1, 1, 3, 3)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ((1, 1, 0), [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
        ((1, 1, 1), [[3, 2, 1], [6, 5, 4], [9, 8, 7]]),
        ((0, 0, 0), [[0, 0, 0], [0, 1, 2], [0, 4, 5]]),
        ((0, 2, 0), [[0, 0, 0], [2, 3, 0], [5, 6, 0]]),
        ((2, 1, 0), [[4, 5, 6], [7, 8, 9], [0, 0, 0]]),
        ((0, 2, 1), [[0, 0, 0], [0, 3, 2], [0, 6, 5]]),
    ],
)
def test_crop_and_mirror_by_hand(choice: tuple[int, int, int], expected: list[list[int]]) -> None:
    assert Augment(1, True).apply(IMAGE, torch.tensor([choice])).view(3, 3).tolist() == expected


def test_each_image_has_its_own_choice_and_its_channels_share_it() -> None:
    images = torch.cat([IMAGE, IMAGE + 10], dim=1).repeat(3, 1, 1, 1)
    choices = torch.tensor([[0, 0, 0], [2, 1, 1], [1, 1, 0]])
    together = Augment(1, True).apply(images, choices)
    for image, choice, result in zip(images, choices, together, strict=True):
        for channel in (0, 1):
            alone = Augment(1, True).apply(image[None, channel : channel + 1], choice[None])
            assert torch.equal(result[channel], alone[0, 0])


def test_wide_images() -> None:
    image = torch.arange(8, dtype=torch.uint8).view(1, 1, 2, 4)
    assert Augment(1, True).apply(image, torch.tensor([[0, 0, 1]])).tolist() == [[[[0, 0, 0, 0], [2, 1, 0, 0]]]]


@pytest.mark.parametrize("flip", [True, False])
def test_loaded_images_are_windows_of_the_padded_one(flip: bool) -> None:
    split = Split(IMAGE.repeat(400, 1, 1, 1), torch.zeros(400).long())
    ((images, _),) = loader(split, 400, augment=Augment(1, flip))
    padded = torch.nn.functional.pad(IMAGE, (1, 1, 1, 1))[0, 0]
    windows = [padded[r : r + 3, c : c + 3] for r in range(3) for c in range(3)]
    windows += [window.flip(1) for window in windows] if flip else []
    seen = {tuple(image.flatten().tolist()) for image in images.mul(255).round().int()}
    assert seen == {tuple(window.flatten().tolist()) for window in windows}


def test_every_batch_and_epoch_has_its_own_augmentation() -> None:
    split = Split(IMAGE.repeat(64, 1, 1, 1), torch.zeros(64).long())
    batches = loader(split, 32, shuffle=False, augment=Augment(1, True))
    first, second = (images for images, _ in batches)
    batches.set_epoch(1)
    assert not torch.equal(first, second)
    assert not torch.equal(first, next(iter(batches))[0])
