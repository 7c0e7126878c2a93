"""`compact: true` in every trainer: the same network as in the plain loop, also where a run stops and goes on, and nearly that
of a run which computes all channels of the same mask."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_same_everywhere import TRAINERS, recipe, same, stop_at, weights

from tost_plugins import Mask
from tost_plugins.lab.job import Stopped
from tost_plugins.lab.train import train

COMPACT: dict[str, Any] = {"mask": {"kind": "synflow", "sparsity": 0.95}, "compact": True, "optimizer": {"lr": 0.01}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compact")
    train(recipe("torch", **COMPACT), out)
    return out


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_compact_run_stops_and_goes_on_in_every_trainer(plain: Path, tmp_path: Path, trainer: str) -> None:
    with pytest.raises(Stopped):
        train(recipe(trainer, **COMPACT), tmp_path, listen=stop_at(5))
    train(recipe(trainer, **COMPACT), tmp_path, resume=True)
    assert same(weights(tmp_path), weights(plain))
    assert Mask.load(tmp_path / "mask.safetensors") == Mask.load(plain / "mask.safetensors")


def test_it_ends_near_the_run_that_computes_all(plain: Path, tmp_path: Path) -> None:
    mask = {"kind": "file", "path": str(plain / "mask.safetensors")}
    train(recipe("torch", **COMPACT | {"mask": mask, "compact": False}), tmp_path)
    whole, compact = weights(tmp_path), weights(plain)
    assert whole.keys() == compact.keys()
    for name, value in whole.items():
        torch.testing.assert_close(
            compact[name], value, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
