"""What a script saw and what came out of it, for the test that runs it; asks the library nothing."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = ("Linear", "Conv1d", "Conv2d", "ConvTranspose2d", "Conv1D", "LSTM")  # the fifth one is GPT-2's


class Notes:
    """`saw(batch)` at every training step, `write(folder, model, ...)` at the end: FOLDER/notes.<rank>.json."""

    def __init__(self) -> None:
        self.data, self.steps = hashlib.sha256(), 0

    def saw(self, *tensors: Tensor) -> None:
        """One batch as it is trained on: its samples, their order, and what augmentation made of them."""
        self.steps += 1
        for tensor in tensors:
            self.data.update(_bytes(tensor))

    def write(self, folder: str, model: nn.Module, **found: Any) -> None:
        state = model.state_dict()
        layers = [module for module in model.modules() if type(module).__name__ in LAYERS]
        weights = [param for layer in layers for name, param in layer._parameters.items() if name.startswith("weight")]
        everything = hashlib.sha256(b"".join(_bytes(state[name]) for name in state if "running_" not in name))
        note = {
            "data": self.data.hexdigest(),
            "steps": self.steps,
            "zeros": sum(int((weight == 0).sum()) for weight in weights),
            "of": sum(weight.numel() for weight in weights),
            "keys": list(state),
            "modules": [f"{name}: {type(module).__qualname__}" for name, module in model.named_modules()],
            "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
            "weights": everything.hexdigest(),
            **found,
        }
        rank = os.environ.get("RANK", "0")
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"notes.{rank}.json").write_text(json.dumps(note))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
