"""Networks for other programs: ONNX and torch.export files, each compared with PyTorch before it gets its name."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tost_plugins.errors import TostError
from tost_plugins.files.atomic import replacing
from tost_plugins.training.optional import package

#: How far the logits of another program may lie from PyTorch's, as a share of the largest.
_CLOSE = 1e-4


def write_onnx(path: Path, model: nn.Module, images: Tensor) -> float:
    """Write an ONNX file of any batch size, input "images", output "logits", and return the largest difference of ONNX
    Runtime's logits from PyTorch's on these images. Needs onnx, onnxscript and onnxruntime."""
    for name in ("onnx", "onnxscript"):  # torch asks for them
        package(name, "export --onnx", "tost_plugins[export]")
    runtime = package("onnxruntime", "export --onnx", "tost_plugins[export]")
    followed = _exported(model, images, "--onnx")  # torch.onnx by itself would trace what this refuses
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    program = torch.onnx.export(followed, (), dynamo=True, verbose=False, **names)
    assert program is not None
    with replacing(path) as temporary:
        program.save(str(temporary), external_data=False)
        session = runtime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        return _compared(
            model, images, lambda x: torch.from_numpy(np.asarray(session.run(None, {"images": x.numpy()})[0]))
        )


def write_pt2(path: Path, model: nn.Module, images: Tensor) -> float:
    """Write a file of torch.export of any batch size, and return the largest difference of its logits on these images."""
    program = _exported(model, images, "--pt2")
    content = io.BytesIO()
    torch.export.save(program, content)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())
        with temporary.open("rb") as file:
            loaded = torch.export.load(io.BytesIO(file.read())).module()
        return _compared(model, images, loaded)


def _exported(model: nn.Module, images: Tensor, option: str) -> Any:
    """The network as torch.export has followed it, for any number of images."""
    try:
        with torch.no_grad():
            return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # it raises many kinds
        raise TostError(
            f"{option}: expected a network that torch.export can follow, got {type(error).__name__} ({error}); export the weights"
        ) from None


@torch.no_grad()
def _compared(model: nn.Module, images: Tensor, other: Callable[[Tensor], Tensor]) -> float:
    """The largest difference on all of the images, and on the first alone."""
    largest = 0.0
    for batch in (images, images[:1]):
        wanted, found = model(batch), other(batch)
        apart = float((found - wanted).abs().max()) if found.shape == wanted.shape else float("nan")
        if not apart <= _CLOSE * max(float(wanted.abs().max()), 1e-30):
            raise TostError(
                f"expected the logits of PyTorch, got others, apart by {apart:.1e}; please report this as a bug"
            )
        largest = max(largest, apart)
    return largest
