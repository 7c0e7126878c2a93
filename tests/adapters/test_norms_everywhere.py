"""`train: norms` under the five trainers: the same network, nothing but the norms moved, also after a stop."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tost_plugins import Mask
from tost_plugins.lab.job import Stopped
from tost_plugins.lab.train import prepare, train
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.session.norms_alone import norm_parameters

RECIPE: dict[str, Any] = {
    "mask": {"kind": "snip", "sparsity": 0.6, "on_collapse": "keep_one"},
    "tweaks": [{"kind": "ghost_skip", "until": "2ba"}],
    "train": "norms",
    "model": "cifar/resnet8",
    "data": {"name": "digits", "limit": 128, "batch_size": 32},
    "optimizer": {"lr": 0.05, "weight_decay": 0.1},
    "duration": "5ba",
}


def ends(trainer: str, out: Path, stop: int = 0) -> dict[str, Tensor]:
    spec = Recipe.from_dict({**RECIPE, "trainer": trainer})
    if stop:

        def press(event: str, values: dict[str, Any]) -> None:
            if event == "step" and values["step"] == stop:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(Stopped):
            train(spec, out, listen=press)
    train(spec, out, resume=True)
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    pytest.importorskip("sklearn")
    return ends("torch", tmp_path_factory.mktemp("torch") / "run")


@pytest.mark.parametrize("trainer", ["torch", "composer", "transformers", "accelerate", "lightning"])
def test_every_trainer_moves_the_norms_alone(plain: dict[str, Tensor], tmp_path: Path, trainer: str) -> None:
    if trainer != "torch":
        pytest.importorskip(trainer)
    found = ends(trainer, tmp_path / "run", stop=3)
    assert found.keys() == plain.keys() and all(torch.equal(value, plain[name]) for name, value in found.items())
    net = prepare(Recipe.from_dict(RECIPE), tmp_path).model
    mask = Mask.load(tmp_path / "run/mask.safetensors")
    norms = {id(param) for param in norm_parameters(net)}
    for name, param in net.named_parameters():
        same = torch.equal(found[name], param.detach() * mask[name] if name in mask else param.detach())
        assert same == (id(param) not in norms), name
