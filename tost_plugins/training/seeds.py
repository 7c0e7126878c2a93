"""Randomness from explicit seeds alone, so that nothing depends on what ran before."""

from __future__ import annotations

import hashlib
import operator
from typing import Any

import torch

from tost_plugins.errors import TostError, shown

_BELOW = 2**64  # what torch's generators take


def given(seed: Any) -> int:
    """A seed that somebody gives; raises TostError for what is no whole number from 0 to 2^64 - 1.

    Example:
        >>> given(3)
        3
    """
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < _BELOW:
        raise TostError(f"seed: expected a whole number from 0 to 2^64 - 1, got {shown(seed)}; write seed=0")
    return number


def generator(*key: int) -> torch.Generator:
    """A generator on the CPU for each key; hashed, since it takes 32 bits of a seed and like seeds begin alike.

    Example:
        >>> a, b = (torch.rand(2, generator=generator(0, 100)) for _ in range(2))
        >>> torch.equal(a, b)
        True
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
