"""Functions that a network calls, and others in their place: what modules cannot show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Every spelling of a functional relu -> its cap (None: without).
RELUS: dict[Callable[..., Any], float | None] = {
    F.relu: None, F.relu_: None, torch.relu: None, torch.relu_: None, Tensor.relu: None, Tensor.relu_: None,
    F.relu6: 6.0,
}  # fmt: skip
#: Those that write into their input without being asked to.
IN_PLACE = (F.relu_, torch.relu_, Tensor.relu_)


class Instead(TorchFunctionMode):
    """Within: a function of torch that is in `table` is answered by the one beside it there."""

    def __init__(self, table: Mapping[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.table.get(func, func)(*args, **(kwargs or {}))
