"""Functions that a network calls, and others in their place: what modules cannot show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Every spelling of a functional relu -> its cap (None: without).
RELUS: dict[Callable[..., Any], float | None] = {
    F.relu: None, F.relu_: None, torch.relu: None, torch.relu_: None, Tensor.relu: None, Tensor.relu_: None,
    F.relu6: 6.0,
}  # fmt: skip
