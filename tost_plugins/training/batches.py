"""What is in a batch, whatever its form: tensors in tuples, lists and dicts, and lists of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tost_plugins.errors import TostError


def walk(change: Callable[..., Any], batch: Any, *others: Any) -> Any:
    """A batch of the same form with `change(part, *those at its place in others)` for whatever is no container.

    Example:
        >>> walk(lambda a, b: a + b, {"x": (1, [2])}, {"x": (10, [20])})
        {'x': (11, [22])}
    """
    if isinstance(batch, Mapping):
        return {key: walk(change, part, *(other[key] for other in others)) for key, part in batch.items()}
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        parts = [walk(change, part, *rest) for part, *rest in zip(batch, *others, strict=True)]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)  # named tuples take them singly
    return change(batch, *others)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with everything in it that can move on `device`."""
    return walk(lambda part: part.to(device) if callable(getattr(part, "to", None)) else part, batch)


def size_of(batch: Any) -> int:
    """How many samples a batch holds: what its entries agree on, or else the first one's; 1 where nothing is counted.

    A tensor counts by its first dimension, a list of dicts by its length, and a list of tensors, which may be inputs
    or samples of many sizes, by what suits the other entries. An input beside one number, its label, is one sample.

    Example:
        >>> images, targets = [torch.rand(3, 8, 8)] * 4, [{"label": torch.tensor(0)}] * 4
        >>> size_of((images, targets)), size_of((torch.rand(5, 8), torch.zeros(5))), size_of((torch.rand(5), 1))
        (4, 5, 1)
    """
    counts = [found for entry in _entries(batch) if (found := _counts(entry))]
    if not counts or _unbatched(batch):
        return 1
    agreed = set(counts[0]).intersection(*counts[1:])
    return next((count for count in counts[0] if count in agreed), counts[0][0])


def is_empty(batch: Any) -> bool:
    """Whether nothing that counts samples in a batch holds any.

    Example:
        >>> is_empty((torch.rand(0, 8), torch.zeros(0))), is_empty((torch.rand(0, 8), torch.zeros(3))), is_empty(("a", 1))
        (True, False, False)
    """
    counts = [found for entry in _entries(batch) if (found := _counts(entry))]
    return bool(counts) and not any(map(any, counts))


def _entries(batch: Any) -> list[Any]:
    if isinstance(batch, (tuple, list)):
        return list(batch)
    return list(batch.values()) if isinstance(batch, Mapping) else [batch]


def _counts(entry: Any) -> list[int]:
    """How many samples an entry may hold, the likeliest first."""
    if isinstance(entry, Tensor):
        return [len(entry)] if entry.ndim else []
    if isinstance(entry, PackedSequence):
        return [int(entry.batch_sizes[0])]
    if _records(entry):
        return [len(entry)]
    inside = next(filter(None, map(_counts, _entries(entry))), []) if isinstance(entry, (Mapping, tuple, list)) else []
    return [*inside, len(entry)] if isinstance(entry, (tuple, list)) and inside else inside


def _records(entry: Any) -> bool:
    """Whether this is a list of dicts, one a sample, as detectors take them."""
    return isinstance(entry, (tuple, list)) and bool(entry) and all(isinstance(part, Mapping) for part in entry)


def _unbatched(batch: Any) -> bool:
    """Whether this is one input and its one label, in no batch: (an image, 3)."""
    entries = _entries(batch)
    numbers = [e for e in entries if isinstance(e, (int, float)) or (isinstance(e, Tensor) and e.ndim == 0)]
    return len(entries) > 1 and len(numbers) == len(entries) - 1


def _counted(part: Any, size: int, records: bool) -> bool:
    """Whether a part of a batch has an entry for each of its `size` samples, in a batch with lists of `records` or without."""
    if isinstance(part, Tensor):
        return part.ndim > 0 and len(part) == size
    if not isinstance(part, (tuple, list) if records else list) or len(part) != size:
        return False
    return records or not all(_counted(entry, size, records) for entry in part)  # else inputs side by side


def pick(batch: Any, index: Sequence[int]) -> Any:
    """The samples `index` of a batch: of whatever counts samples, a tensor or a list, those entries."""
    size, records = size_of(batch), any(map(_records, _entries(batch)))

    def chosen(part: Any) -> Any:
        if isinstance(part, Tensor) and _counted(part, size, records):
            return part[torch.as_tensor(index, device=part.device)]
        if isinstance(part, PackedSequence):
            raise TostError(
                "batch: expected samples that can be taken singly, got a PackedSequence; pass padded tensors and their lengths, "
                "and pack them in the network's forward"
            )
        return [part[i] for i in index] if _counted(part, size, records) else inside(part)

    def inside(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: chosen(entry) for key, entry in part.items()}
        return [chosen(entry) for entry in part] if isinstance(part, (tuple, list)) else part

    if _unbatched(batch):
        return batch
    return chosen(batch) if isinstance(batch, Tensor) else inside(batch)


def joined(batches: Sequence[Any]) -> Any:
    """One batch of all their samples; what counts no samples is the first's. Raises TostError on samples of two shapes."""
    sizes, records = [size_of(batch) for batch in batches], any(map(_records, _entries(batches[0])))

    def together(parts: Sequence[Any]) -> Any:
        counted = all(_counted(part, size, records) for part, size in zip(parts, sizes, strict=True))
        if counted and isinstance(parts[0], Tensor):
            return _concatenated(parts)
        return [entry for part in parts for entry in part] if counted else inside(parts)

    def inside(parts: Sequence[Any]) -> Any:
        first = parts[0]
        if isinstance(first, Mapping):
            return {key: together([part[key] for part in parts]) for key in first}
        return (
            [together(entries) for entries in zip(*parts, strict=True)] if isinstance(first, (tuple, list)) else first
        )

    return together(batches) if isinstance(batches[0], Tensor) else inside(batches)


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    shapes = list(dict.fromkeys(tuple(part.shape[1:]) for part in parts))
    if len(shapes) > 1:
        raise TostError(
            f"expected samples of one shape, got {shapes[0]} and {shapes[1]}; pass batches of one image size"
        )
    return torch.cat(list(parts))


def length(loader: Any) -> int | None:
    """How many batches a loader gives; None where it does not know, such as a DataLoader of an IterableDataset.

    Example:
        >>> length([1, 2]), length(iter([1, 2]))
        (2, None)
    """
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None
