"""The optimizers of benchmarks/optimizers.py: by package, how each is made from parameters."""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Made = Callable[[Any], Any]


def of(package: str, name: str, **settings: Any) -> Made:
    """One that a package has under this name."""
    return lambda params: getattr(importlib.import_module(package), name)(params, **settings)


def po(name: str, **settings: Any) -> Made:
    return lambda params: importlib.import_module("pytorch_optimizer").load_optimizer(name)(params, **settings)


def timm(name: str, lr: float = 1e-3) -> Made:
    return lambda params: importlib.import_module("timm.optim").create_optimizer_v2(list(params), opt=name, lr=lr)


def grouped(make: Made, **settings: Any) -> Made:
    """One whose groups say what it does with them."""
    return lambda params: make([{"params": list(params), **settings}])


def lookahead(package: str) -> Made:
    def make(params: Any) -> Any:
        return importlib.import_module(package).Lookahead(torch.optim.AdamW(params, lr=1e-2))

    return make


def sam(params: Any) -> Any:
    return importlib.import_module("pytorch_optimizer").SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9)


def zero(params: Any) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    if not torch.distributed.is_initialized():
        store = torch.distributed.FileStore(str(Path(tempfile.mkdtemp()) / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return ZeroRedundancyOptimizer(params, torch.optim.Adam, lr=1e-2)


def adam_mini(params: Any) -> Any:
    named = [(f"layer{i}.weight", param) for i, param in enumerate(params)]
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module("adam_mini").Adam_mini(named, lr=1e-2, dim=16, n_heads=1)


def heavy(name: str) -> Made:
    def make(params: Any) -> Any:
        heavyball = importlib.import_module("heavyball")
        heavyball.utils.compile_mode = None
        return getattr(heavyball, name)(params, lr=1e-2)

    return make


PACKAGES = {
    "torch": "torch",
    "timm": "timm",
    "pytorch_optimizer": "pytorch_optimizer",
    "heavyball": "heavyball",
    "schedulefree": "schedulefree",
    "prodigyopt": "prodigyopt",
    "lion_pytorch": "lion-pytorch",
    "adam_mini": "adam-mini",
}
LOW_RANK = {"rank": 4, "update_proj_gap": 20, "scale": 1.0, "projection_type": "std"}
ROWS: dict[str, dict[str, Made]] = {
    "torch": {
        **{
            name: of("torch.optim", name)
            for name in (
                "ASGD",
                "Adadelta",
                "Adafactor",
                "Adagrad",
                "Adam",
                "AdamW",
                "Adamax",
                "NAdam",
                "RAdam",
                "RMSprop",
                "Rprop",
            )
        },
        "SGD, momentum 0.9": of("torch.optim", "SGD", lr=0.1, momentum=0.9),
        "L-BFGS, strong Wolfe": of("torch.optim", "LBFGS", line_search_fn="strong_wolfe", max_iter=4),
        "ZeroRedundancyOptimizer of Adam": zero,
    },
    "timm": {
        "cautious AdamW": timm("cadamw", 1e-2),
        "cautious Lion": timm("clion", 1e-3),
        "AdafactorBigVision": timm("adafactorbv"),
        "Muon": timm("muon", 1e-2),
        "Lookahead of AdamW": lookahead("timm.optim"),
        "LAMB": timm("lamb", 1e-2),
        "MADGRAD": timm("madgrad"),
        "Kron": timm("kron"),
    },
    "pytorch_optimizer": {
        "Muon": grouped(po("muon"), use_muon=True),
        "AdaMuon": grouped(po("adamuon"), use_muon=True),
        "SOAP": po("soap"),
        "Shampoo": po("shampoo"),
        "SPlus": po("splus"),
        "Conda": po("conda"),
        "Alice, rank 4": po("alice", rank=4, leading_basis=2),
        "GaLore, rank 4": grouped(po("galore", lr=1e-2), **LOW_RANK),
        "Fira, rank 4": grouped(po("fira", lr=1e-2), **LOW_RANK),
        "VSGD": po("vsgd"),
        "DAdaptAdaGrad": po("dadaptadagrad"),
        "DAdaptSGD": po("dadaptsgd"),
        "Adai": po("adai"),
        "AdamS": po("adams"),
        "AdaHessian": po("adahessian"),
        "SophiaH": po("sophiah"),
        "Magma of AdamW": lambda params: importlib.import_module("pytorch_optimizer").Magma(torch.optim.AdamW(params)),
        "Lookahead of AdamW": lookahead("pytorch_optimizer"),
        "SAM of SGD": sam,
        "Ranger (gradient centralisation)": po("ranger"),
        "cautious Lion": po("lion", cautious=True),
        "Yogi": po("yogi"),
        "CAME": po("came"),
        "FlashAdamW (8 bits)": po("flashadamw"),
        "Adan": po("adan"),
        "AvaGrad": po("avagrad"),
    },
    "heavyball": {"SOAP": heavy("SOAP"), "PSGDKron": heavy("PSGDKron"), "Muon": heavy("Muon")},
    "schedulefree": {
        "AdamWScheduleFree": of("schedulefree", "AdamWScheduleFree", lr=1e-2),
        "SGDScheduleFree": of("schedulefree", "SGDScheduleFree", lr=1.0),
    },
    "prodigyopt": {"Prodigy": of("prodigyopt", "Prodigy")},
    "lion_pytorch": {"Lion": of("lion_pytorch", "Lion", lr=1e-3)},
    "adam_mini": {"Adam-mini": adam_mini},
}
