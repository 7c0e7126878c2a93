"""The kind of a run's mask, in the model: a checkpoint that belongs to another kind is refused, or said."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from tost_plugins.errors import TostError
from tost_plugins.masks.base import MaskMethod, Moving
from tost_plugins.session.link import session_of

KIND = "tost_kind"  # the buffer of a model: the name, in bits, which averaging cannot change

_LONGEST = 16  # letters of it


def written(kind: str) -> Tensor:
    """A kind's name in bits, always as many.

    Example:
        >>> written("set").shape, read(written("set"))
        (torch.Size([128]), 'set')
    """
    letters = kind.encode()[:_LONGEST].ljust(_LONGEST, b"\0")
    return torch.tensor([letter >> place & 1 for letter in letters for place in range(8)], dtype=torch.bool)


def read(bits: Tensor) -> str:
    """The name in such bits."""
    rows = bits.detach().cpu().view(_LONGEST, 8).tolist()
    letters = bytes(sum(bool(bit) << place for place, bit in enumerate(row)) for row in rows)
    return letters.rstrip(b"\0").decode(errors="replace")


def check(model: nn.Module, state_dict: dict[str, Any], prefix: str, beside: re.Pattern[str]) -> None:
    """Raise TostError where a run's checkpoint has other things beside its weights (names that `beside` finds) than this recipe's
    mask asks for, or is that of a mask that moves in another way. One from before kinds were written has any."""
    session = session_of(model)
    here, key = None if session is None else session.recipe.mask, f"{prefix}{KIND}"
    state_dict.setdefault(key, getattr(model, KIND))
    if here is not None:
        check_moving(here, read(state_dict[key]))
    own = {found[1] for name in model.state_dict() if (found := beside.search(name))}
    there = {found[1] for name in state_dict if name.startswith(prefix) and (found := beside.search(name))}
    if there and there != own:
        raise _of_another(f"beside each weight {_listed(own)}", f"with {_listed(there)}")


def check_moving(method: MaskMethod, kind: str) -> None:
    """Raise TostError where a run whose mask moves by this method is to go on from a checkpoint of another kind."""
    if isinstance(method, Moving) and kind != read(written(method.kind)):
        raise _of_another(method.kind, f"of {kind}")


def _of_another(own: str, there: str) -> TostError:
    return TostError(
        f"checkpoint: expected one of a run with the recipe's kind of mask ({own}), got one {there}; resume with the recipe that "
        f"the run was started with, or load the plain network's weights"
    )


def _listed(kinds: set[str]) -> str:
    return " ".join(sorted(kind.lstrip("_") for kind in kinds))
