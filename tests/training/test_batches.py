"""What is counted, picked and joined in batches of many forms, and how long loaders are."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tost_plugins.errors import TostError
from tost_plugins.training.batches import joined, length, pick, size_of


def rows(count: int, width: int = 2) -> Tensor:
    return torch.arange(count * width, dtype=torch.float32).view(count, width)


def images(count: int) -> tuple[Tensor, ...]:
    return tuple(torch.full((3, 4 + i, 5), float(i)) for i in range(count))


#: A batch of four samples in each of the usual forms, what of it counts samples, and what does not.
FOUR: dict[str, Any] = {
    "a pair": (rows(4), torch.arange(4)),
    "two inputs": (rows(4), rows(4, 3), torch.arange(4)),
    "two inputs side by side": ([rows(4), rows(4, 3)], torch.arange(4)),
    "a dict": {"x": rows(4), "names": ["a", "b", "c", "d"], "label": torch.arange(4)},
    "a detector's": (images(4), tuple({"labels": torch.arange(i + 1)} for i in range(4))),
    "a detector's lists": [list(images(4)), [{"boxes": rows(3, 4)} for _ in range(4)]],
    "masks of many sizes": {"x": rows(4), "mask_labels": [torch.zeros(i + 1, 2) for i in range(4)]},
    "a tensor": rows(4),
}


def leaves(batch: Any) -> list[Any]:
    if isinstance(batch, dict):
        return [leaf for key, part in batch.items() for leaf in (key, *leaves(part))]
    return [leaf for part in batch for leaf in leaves(part)] if isinstance(batch, (tuple, list)) else [batch]


def same(a: Any, b: Any) -> bool:
    a, b = leaves(a), leaves(b)
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", FOUR)
def test_samples_are_counted_picked_and_joined_again(name: str) -> None:
    batch = FOUR[name]
    assert size_of(batch) == 4
    parts = [pick(batch, index) for index in ([0, 1, 2], [3])]
    assert [size_of(part) for part in parts] == [3, 1]
    assert same(joined(parts), batch)
    assert not same(joined(parts[::-1]), batch)


def test_three_images_of_three_channels_are_three_images() -> None:
    found = pick((list(images(3)), [{"labels": torch.tensor(i)} for i in range(3)]), [2])
    assert [image.shape for image in found[0]] == [(3, 6, 5)] and int(found[1][0]["labels"]) == 2


@pytest.mark.parametrize("label", [torch.tensor(1), 1])
def test_a_sample_in_no_batch_is_one_sample(label: Any) -> None:
    batch = (torch.rand(3, 8, 8), label)
    assert size_of(batch) == 1 and pick(batch, [0]) is batch


def test_what_counts_no_samples_is_the_firsts() -> None:
    first, second = ({"x": rows(n), "weight": torch.full((7,), float(n)), "note": "kept"} for n in (4, 2))
    found = joined([first, second])
    assert found["x"].shape == (6, 2) and found["weight"].tolist() == [4.0] * 7 and found["note"] == "kept"


def test_samples_of_two_shapes_are_an_error() -> None:
    with pytest.raises(TostError, match=r"expected samples of one shape, got \(2,\) and \(3,\); pass"):
        joined([(rows(4), torch.arange(4)), (rows(4, 3), torch.arange(4))])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows(4))


class Unsaid(Stream):
    def __len__(self):
        raise NotImplementedError


def test_a_stream_has_no_length() -> None:
    assert length(DataLoader(TensorDataset(rows(5)), 2)) == 3
    assert [length(DataLoader(data)) for data in (Stream(), Unsaid())] == [None, None]
    assert length(iter([1])) is None and length(None) is None
