"""The shipped recipes on the real CIFAR-10, under each trainer: one mask, one network, plain after export."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from command import tost
from safetensors.torch import load_file

from tost_plugins import Mask
from tost_plugins.lab import models

TRAINERS = [name for name in ("torch", "composer", "transformers", "accelerate", "lightning")
            if name == "torch" or importlib.util.find_spec(name)]  # fmt: skip
SHORT = {"data.limit": 192, "data.validation": 64, "data.batch_size": 64, "duration": "5ba", "model": "cifar/resnet20",
         "tweaks.2.iterations": 1}  # fmt: skip


@pytest.mark.parametrize("recipe", ["cifar10_snip_98", "cifar10_rigl_95"])
def test_a_shipped_recipe_under_every_trainer(recipe: str, cifar10: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    moving = {"mask.every": "2ba"} if "rigl" in recipe else {}
    ends = {}
    for trainer in TRAINERS:
        changes = {**SHORT, **moving, "data.path": cifar10, "trainer": trainer}
        sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
        run = tmp_path / trainer
        result = json.loads(tost("train", recipe, *sets, "--out", run, "--json"))
        assert result["tweaks"] == ["ghost_skip", "soft_activation", "rescaled_init", "label_smoothing"]
        tost("export", run, tmp_path / f"{trainer}.safetensors", "--json")
        ends[trainer] = load_file(tmp_path / f"{trainer}.safetensors")
        models.build("cifar/resnet20", 10, 3).load_state_dict(ends[trainer], strict=True)
        mask = Mask.load(run / "mask.safetensors")
        assert mask == Mask.load(tmp_path / "torch/mask.safetensors")
        assert not any(bool(ends[trainer][name][~keep].any()) for name, keep in mask.items())
        assert all(torch.equal(value, ends["torch"][name]) for name, value in ends[trainer].items())
