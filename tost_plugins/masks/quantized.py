"""Weights that a file does not hold as numbers to compare with 0: quantized ones, and what PEFT adds to a network."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.files.tensors import comparable

#: What made them, by names: of integers, and of numbers that say how to read them.
_INTEGERS = {
    "GPTQ or AWQ": re.compile(r"\.q(?:weight|zeros)$"),
    "compressed-tensors": re.compile(r"\.(?:weight_packed|(?:weight\.)?bitmask)$"),
    "HQQ": re.compile(r"\.W_q$"),
    "MXFP4": re.compile(r"_blocks$"),
}
_NUMBERS = {
    "bitsandbytes": re.compile(r"\.SCB$|\.weight\.(?:absmax|quant_map|quant_state\..+)$"),
    "torch.ao.quantization": re.compile(r"(?:^|\.)_packed_params\b|^(?!.*(?:quant|process|observer)).*\.zero_point$"),
}
_WEIGHT = re.compile(r"(?:^|[._])weight(?:[._]\w+)?$")
_ADDED = re.compile(r"(?:^|\.)lora_(?:embedding_)?(?:A|B|E|magnitude_vector)(?:\.|$)")


def check_quantized(tensors: Mapping[str, Tensor]) -> None:
    """Raise TostError where weights are quantized: integers, and what it takes to make numbers of them."""
    for name, tensor in tensors.items():
        kinds = _NUMBERS if tensor.is_floating_point() else _INTEGERS | _NUMBERS
        made = next((made for made, ends in kinds.items() if ends.search(name)), "")
        if made == "MXFP4" and f"{name.removesuffix('_blocks')}_scales" not in tensors:
            made = ""
        if not made and not (_WEIGHT.search(name) and _holds_integers(tensor)):
            continue
        raise TostError(
            f"expected weights as numbers, got {name}, which is quantized{f' ({made})' if made else ''}; use the checkpoint that "
            f"it was made of"
        )


def added(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is one of the small matrices that PEFT trains beside a weight, and shows no mask: it is 0 everywhere, as
    one of two begins, or nowhere."""
    return _ADDED.search(name) is not None and len(torch.unique(comparable(tensor) != 0)) == 1


def _holds_integers(tensor: Tensor) -> bool:
    """Whether it has two dimensions and more of integers that are no mask."""
    if tensor.ndim < 2 or tensor.is_floating_point() or tensor.is_complex():
        return False
    values = comparable(tensor)
    return bool(((values != 0) & (values != 1)).any())
