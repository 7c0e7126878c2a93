"""Mask: which weights are kept. Immutable, on the CPU, and readable from every format people keep masks in."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from tost_plugins.errors import TostError, shown
from tost_plugins.files import packed
from tost_plugins.files.atomic import check_end, replacing
from tost_plugins.files.containers import read
from tost_plugins.files.renamed import names_beside, renamed
from tost_plugins.files.tensors import by_clean_name, comparable
from tost_plugins.masks.card import card, read_card, write_card
from tost_plugins.masks.layouts import mask_of, only_0_and_1
from tost_plugins.training.params import some
from tost_plugins.training.sharding import whole

#: What the metadata of a safetensors file with a mask say under "format".
FORMAT = "tost_mask"


class Mask(Mapping[str, Tensor]):
    """Parameter name -> bool tensor, True where the weight is kept. Never aliased to a model, never changed in place.

    `mask.sparsity` is the share of removed weights in [0, 1): 0 is dense. `a - b` keeps what a keeps and b does not.

    Example:
        >>> mask = Mask({"fc.weight": torch.tensor([[1, 0], [0, 0]])})
        >>> mask.sparsity, mask.kept
        (0.75, 1)
    """

    #: What is known of how it was made, for its card: method, settings, seed; {} where nothing is. Equal masks may differ in it.
    about: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        _check_named(tensors)
        if not tensors:
            raise TostError("mask: expected at least one layer, got none; check the source of the mask")
        self._tensors = {name: _as_bool(name, tensor) for name, tensor in by_clean_name(tensors).items()}

    @classmethod
    def dense(cls, params: Mapping[str, Tensor]) -> Mask:
        """All True, in the shapes of `params`."""
        _check_named(params)
        return cls({name: torch.ones(param.shape, dtype=torch.bool) for name, param in params.items()})

    @classmethod
    def from_zeros(cls, params: Mapping[str, Tensor]) -> Mask:
        """False where a weight is exactly 0, True elsewhere."""
        _check_named(params)
        return cls({name: _numbers(name, param) != 0 for name, param in params.items()})

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read any mask, from a file or a folder of any kind that docs/formats.md names: our own file, masks beside their
        weights, a dict of 0/1 tensors, or the zeros of a checkpoint.

        Of a folder that transformers has written names are the network's own, also where those in the file are others.
        Raises TostError when there is nothing, when it is torn or a part of something, more than plain tensors, or no mask.
        """
        _check_path(path)
        found = read(path, first=("mask.safetensors",))
        if found is None:
            raise TostError(
                f"mask file {Path(path)}: expected an existing file, or a folder with weights, got none; check the path"
            )
        path, tensors, metadata = found.path, found.tensors, found.metadata
        if metadata.get("format") == FORMAT:
            mask = _unpack(path, tensors, metadata)
            return mask.described(**read_card(path, mask))
        try:
            tensors = packed.unpacked(path, tensors, metadata).tensors if packed.FORMAT in metadata else tensors
            masks = mask_of(by_clean_name(tensors))
            return cls(renamed(masks, names_beside(path, tensors)))
        except TostError as error:
            raise error.at(f"mask file {path}") from None

    def save(self, path: str | Path, card: bool = True) -> None:
        """Write one safetensors file of packed bits (1 bit a weight), to a temporary name first, then renamed; and its card
        beside it (PATH.card.json, PATH.card.md), unless `card` is False. Raises TostError for a name that ends as other
        kinds of files do."""
        _check_path(path)
        path = Path(path)
        check_end(path, ".safetensors")
        bits = {name: torch.from_numpy(np.packbits(mask.numpy().reshape(-1))) for name, mask in self.items()}
        shapes = json.dumps({name: list(mask.shape) for name, mask in self.items()})
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(_ordered(save(bits, metadata={"format": FORMAT, "shapes": shapes})))
        if card:  # one of this very mask may know more of it already
            write_card(path, self.described(**{**read_card(path, self), **self.about}).card(path.name))

    def card(self, file: str = "mask.safetensors") -> dict[str, Any]:
        """What the card beside a file of this name says: counts, sparsity, layers, and what is known of how it was made.

        Example:
            >>> mask = Mask({"weight": torch.tensor([[1, 0]])}).described(method="random", seed=0)
            >>> found = mask.card()
            >>> found["method"], found["seed"], found["kept"], found["sparsity"]
            ('random', 0, 1, 0.5)
        """
        return card(self, self.about, file)

    def described(self, **about: Any) -> Mask:
        """The same mask, of which this is known too; `live` is the number of live weights of each layer."""
        found = copy.copy(self)
        found.about = {**self.about, **about}
        return found

    @property
    def kept(self) -> int:
        """How many weights are kept."""
        return sum(int(mask.sum()) for mask in self.values())

    @property
    def size(self) -> int:
        """How many weights the mask covers."""
        return sum(mask.numel() for mask in self.values())

    @property
    def sparsity(self) -> float:
        """Share of removed weights over all layers, 0 (dense) to 1."""
        return 1 - self.kept / self.size if self.size else 0.0

    def sparsities(self) -> dict[str, float]:
        """Share of removed weights, layer by layer."""
        return {name: 1 - density(mask) for name, mask in self.items()}

    def overlap(self, other: Mapping[str, Tensor]) -> float:
        """Intersection over union of the kept weights: 1 for equal masks, 0 for disjoint ones."""
        other = self._same_layers(other)
        both = sum(int((mask & other[name]).sum()) for name, mask in self.items())
        either = sum(int((mask | other[name]).sum()) for name, mask in self.items())
        return both / either if either else 1.0

    def fit(self, params: Mapping[str, Tensor], known: Mapping[str, Tensor] | None = None) -> Mask:
        """This mask cut to the layers of `params`; raises TostError on a missing or misshapen layer, and on a layer
        with zeros that is in neither `params` nor `known` (other tensors of the same model that need no mask)."""
        _check_named(params)
        for name, param in params.items():
            if name not in self._tensors:
                raise TostError(
                    f"mask: expected a layer {name}, got none; add it to the mask or to `ignore` "
                    f"(the mask has {some(list(self))})"
                )
            if self[name].shape != param.shape:
                raise TostError(
                    f"mask: expected shape {tuple(param.shape)} for {name}, got "
                    f"{tuple(self[name].shape)}; use a mask made for this network"
                )
        for name, mask in self.items():
            if name not in params and not bool(mask.all()) and name not in (known or ()):
                raise TostError(
                    f"mask: expected only layers that may be pruned, got zeros for {name}; "
                    f"take it off `ignore`, or use a mask made for this network"
                )
        if list(self) == list(params):
            return self
        about = {key: value for key, value in self.about.items() if key != "live"}
        return Mask({name: self[name] for name in params}).described(**about)

    @torch.no_grad()
    def apply_(self, tensors: Mapping[str, Tensor]) -> None:
        """Set to exactly 0, in place, what the mask removes from the tensors of the same names."""
        _check_named(tensors)
        for name, mask in self.items():
            if name not in tensors or tensors[name].shape != mask.shape:
                raise TostError(
                    f"mask: expected a tensor {name} of shape {tuple(mask.shape)}, got "
                    f"{tuple(tensors[name].shape) if name in tensors else None}; "
                    f"pass the model's weights, dict(model.named_parameters(remove_duplicate=False))"
                )
        for name, mask in self.items():
            tensors[name].masked_fill_(~mask.to(tensors[name].device), 0)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __sub__(self, other: Mapping[str, Tensor]) -> Mask:
        other = self._same_layers(other)
        return Mask({name: mask & ~other[name] for name, mask in self.items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask) or set(self) != set(other):
            return NotImplemented if not isinstance(other, Mask) else False
        return all(torch.equal(mask, other[name]) for name, mask in self.items())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Mask({len(self)} layers, {self.kept:,} of {self.size:,} weights kept, sparsity {self.sparsity:.4f})"

    def _same_layers(self, other: Mapping[str, Tensor]) -> Mask:
        other = other if isinstance(other, Mask) else Mask(other)
        if {n: m.shape for n, m in self.items()} != {n: m.shape for n, m in other.items()}:
            raise TostError("mask: expected two masks of the same layers, got different ones; compare like with like")
        return other


def density(mask: Tensor) -> float:
    """Share of kept weights, 0 to 1; a layer without any weights is dense."""
    return int(mask.sum()) / mask.numel() if mask.numel() else 1.0


def _check_named(tensors: Any) -> None:
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        got = f"the keys {some([repr(name) for name in tensors])}" if isinstance(tensors, Mapping) else shown(tensors)
        raise TostError(
            f"mask: expected names and their tensors, got {got}; pass dict(model.named_parameters()), or a mask"
        )
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TostError(
                f"mask {name}: expected a tensor, got {type(tensor).__name__}; convert it with torch.as_tensor"
            )


def _check_path(path: Any) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise TostError(f"mask file: expected a path, got {shown(path)}; write 'mask.safetensors', say")


def _numbers(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise TostError(
            f"mask {name}: expected numbers, got a tensor on the device meta, which has none; load them first"
        )
    return tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()


def _as_bool(name: str, tensor: Tensor) -> Tensor:
    tensor = _numbers(name, tensor)
    if tensor.dtype != torch.bool and not only_0_and_1(tensor):
        raise TostError(
            f"mask {name}: expected only 0 and 1, got other values; pass the mask, not the weights "
            f"(Mask.from_zeros takes weights)"
        )
    return (comparable(whole(tensor)) != 0).to(device="cpu", copy=True).contiguous()


def _ordered(file: bytes) -> bytes:
    """A safetensors file whose metadata are in order: its library puts them in another one each time."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the numbers that follow are aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text + file[end:]


def _unpack(path: Path, bits: dict[str, Tensor], metadata: dict[str, str]) -> Mask:
    try:
        shapes = json.loads(metadata["shapes"])
        masks = {}
        for name, shape in shapes.items():
            if not all(type(side) is int and side >= 0 for side in shape):
                raise ValueError(f"in {name}")
            size = math.prod(shape)
            if bits[name].dtype != torch.uint8 or bits[name].numel() != (size + 7) // 8:
                raise ValueError(f"in {name}")
            kept = np.unpackbits(bits[name].numpy(), count=size)
            masks[name] = torch.from_numpy(kept).bool().reshape(shape)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise TostError(
            f"mask file {path}: expected bits that fit the shapes it names, got a mismatch ({error}); "
            f"save the mask again"
        ) from None
    return Mask(masks)
