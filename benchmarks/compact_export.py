"""What a network to give away takes: its file, and the time of a forward pass, dense, sparse and compact, by several programs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from interleave import Contender, Ratio, Row, timed
from torch import Tensor, nn

from tost_plugins import compact, masks
from tost_plugins.channels.sizes import changed
from tost_plugins.files.packed import save_packed
from tost_plugins.files.tensors import write_tensors
from tost_plugins.lab import models
from tost_plugins.lab.export_formats import write_onnx
from tost_plugins.training.task import Task

TITLE = "A network to give away"
ABOUT = """
`cifar/` networks for 10 classes as freshly initialised, images of 32 pixels; "sparse": with SynFlow's mask of 98 %, its zeros
stored; "compact": what `tost_plugins.compact` makes of that, the same outputs without the channels that no path runs through.
"eager" is PyTorch, "compiled" `torch.compile`; ONNX Runtime and OpenVINO run the files of `tost export --onnx`, on as many
threads. "packed" files are those of `tost export --packed`.

Why the latency falls by less than the operations do: of the forward pass's operations VGG-16, ResNet-18, ResNet-32, ResNet-20 and
MobileNetV2 have 0.31, 0.43, 0.32, 0.29 and 0.24 left, of its maps 0.74, 0.80, 0.69, 0.66 and 0.46. The widest maps, those of
the first layers, lose the fewest channels, and few channels on many places are bound by memory, as depthwise convolutions are.
"""

SPARSITY = 0.98
MODELS = ("vgg16", "resnet18", "resnet32", "resnet20", "mobilenet_v2")
BATCHES = (1, 32)
RUNTIMES = ("eager", "compiled", "ONNX Runtime", "OpenVINO")
KINDS = ("dense", "sparse", "compact")
FILES = ("compact", "packed", "compact, packed", "compact, ONNX")


def _name(runtime: str, kind: str, batch: int) -> str:
    return f"{runtime}, {kind}, {batch} image{'s' * (batch > 1)}"


def _limit(runtime: str, kind: str, batch: int) -> float | None:
    return 0.6 if (runtime, kind, batch) == ("ONNX Runtime", "compact", 32) else None


RATIOS = [
    *(
        Ratio(_name(runtime, kind, batch), _name(runtime, kind, batch), _name(runtime, "dense", batch),
              most=_limit(runtime, kind, batch))
        for runtime in RUNTIMES for batch in BATCHES for kind in KINDS[1:]
    ),
    *(Ratio(f"file: {kind}, to dense", f"file: {kind}", "file: dense", unit="B") for kind in FILES),
    Ratio("parameters: compact, to dense", "parameters: compact", "parameters: dense", unit=""),
]  # fmt: skip


def measure(small: bool) -> Iterator[Row]:
    """The rows of all networks."""
    for name in ("resnet8",) if small else MODELS:
        networks = _networks(f"cifar/{name}")
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            yield from _sizes(name, networks, Path(folder))
            for batch in BATCHES:
                images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))
                contenders = {
                    _name(runtime, kind, batch): _contender(runtime, network, images, Path(folder) / f"{kind}.onnx")
                    for runtime in _installed(small)
                    for kind, network in networks.items()
                }
                yield from timed(name, contenders, 3 if small else 25, warm_up=3)
        torch.compiler.reset()


def _networks(name: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    dense = models.build(name, 10).eval()
    torch.manual_seed(0)
    sparse = models.build(name, 10).eval()
    mask = masks.find(sparse, "synflow", SPARSITY, input_shape=(3, 32, 32), on_collapse="keep_one")
    mask.apply_(Task.of(sparse).params)
    return {"dense": dense, "sparse": sparse, "compact": compact(sparse, mask, torch.randn(8, 3, 32, 32))}


def _sizes(case: str, networks: dict[str, nn.Module], folder: Path) -> Iterator[Row]:
    """Bytes of the files, and counts of parameters; the ONNX files stay for the runtimes."""
    small, changes = networks["compact"], changed(networks["sparse"], networks["compact"])
    for kind, network in networks.items():
        write_onnx(folder / f"{kind}.onnx", network, torch.randn(4, 3, 32, 32))
    write_tensors(folder / "dense", networks["dense"].state_dict())
    save_packed(folder / "packed", networks["sparse"].state_dict())
    save_packed(folder / "compact", small.state_dict(), changes, pack=False)
    save_packed(folder / "compact, packed", small.state_dict(), changes)
    for kind, file in {"dense": "dense", **{kind: kind for kind in FILES[:3]}, FILES[3]: "compact.onnx"}.items():
        yield Row(case, f"file: {kind}", 0, os.path.getsize(folder / file), "B")
    for kind in ("dense", "compact"):
        yield Row(case, f"parameters: {kind}", 0, sum(param.numel() for param in networks[kind].parameters()), "")


def _installed(small: bool) -> list[str]:
    """The runtimes that are there: torch.compile needs a compiler, and is left out where only little is to be done."""
    compiler = not small and any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    there = {"compiled": compiler, "OpenVINO": importlib.util.find_spec("openvino") is not None}
    return [name for name in RUNTIMES if there.get(name, True)]


def _contender(runtime: str, network: nn.Module, images: Tensor, file: Path) -> Contender:
    """A function that runs one forward pass."""
    run: Callable[[], Any]
    threads = torch.get_num_threads()
    if runtime == "eager":
        run = lambda: network(images)  # noqa: E731
    elif runtime == "compiled":
        compiled = torch.compile(network)
        run = lambda: compiled(images)  # noqa: E731
    elif runtime == "ONNX Runtime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        run = lambda: session.run(None, {"images": images.numpy()})  # noqa: E731
    else:
        import openvino

        model = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_NUM_THREADS": threads})
        run = lambda: model([images.numpy()])  # noqa: E731

    def contender() -> None:
        run()

    return contender
