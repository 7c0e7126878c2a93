"""Where in what scripts save their weights and masks lie: under any key, beside each other, as arrays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import refused
from safetensors.torch import load_file
from torch import Tensor, nn

from tost_plugins import Mask, masks
from tost_plugins.lab.export import export


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


def network() -> tuple[dict[str, Tensor], Mask, dict[str, Tensor]]:
    """A dense network's weights, a mask for it, and the weights under the mask."""
    mask, sparse = masks.find(net(), "magnitude", 0.6), net()
    mask.apply_(dict(sparse.named_parameters()))
    return net().state_dict(), mask, sparse.state_dict()


DENSE, MASK, SPARSE = network()
PLAIN = {name: kept.float() for name, kept in MASK.items()}
LAYERS = {name.removesuffix(".weight"): kept for name, kept in MASK.items()}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}


def test_masks_beside_the_weights_are_the_masks(tmp_path: Path) -> None:
    """Not the zeros of the weights, which a forward pass masks."""
    for saved in (
        {"state_dict": DENSE, "masks": PLAIN},
        {"model": DENSE, "mask": dict(MASK), "optimizer": OPTIMIZER},
        {"epoch": 3, "checkpoint": {"net": DENSE, "masks": LAYERS}},
        {"model": {f"module._orig_mod.{name}": value for name, value in DENSE.items()}, "masks": LAYERS},
        {"network": DENSE, "masks": {f"{name}_mask": kept for name, kept in MASK.items()}},
    ):
        assert_exact(saved, tmp_path)


def test_the_only_dict_of_tensors_is_the_network(tmp_path: Path) -> None:
    average = {"n_averaged": torch.tensor(3), **{f"module.{name}": value for name, value in SPARSE.items()}}
    for saved in (
        {"weights": SPARSE, "optimizer": OPTIMIZER, "best": torch.tensor(0.5)},
        {"network": {"encoder": SPARSE}, "lr_scheduler": {"gamma": torch.ones(1)}},
        {"module": SPARSE},
        {"params": {name: value.numpy() for name, value in SPARSE.items()}},
        average,
        {"ema": average, "args": {"table": torch.ones(2)}},
    ):
        assert_exact(saved, tmp_path)


def assert_exact(saved: Any, folder: Path) -> None:
    torch.save(saved, folder / "saved.pt")
    assert Mask.load(folder / "saved.pt") == MASK
    export(folder / "saved.pt", folder / "out.safetensors")
    found = load_file(folder / "out.safetensors")
    assert found.keys() == SPARSE.keys() and all(torch.equal(found[name], value) for name, value in SPARSE.items())


def test_masks_alone_under_a_key_and_as_arrays(tmp_path: Path) -> None:
    path = tmp_path / "masks.pt"
    for saved in (
        {"masks": PLAIN, "density": torch.tensor(0.4)},
        {name: kept.numpy() for name, kept in MASK.items()},
        {"masks": {name: np.asfortranarray(kept.numpy().astype(">i4")) for name, kept in MASK.items()}},
    ):
        torch.save(saved, path)
        assert Mask.load(path) == MASK
        assert "got masks, and no weights" in refused(lambda: export(path, tmp_path / "out.safetensors"))


def test_masks_in_layers_of_ones_own(tmp_path: Path) -> None:
    """Whatever they are called, as long as the word is in it: a tensor of the weight's shape in its layer."""
    for key in ("pruning_mask", "mask_weight", "Mask", "kernel_mask", "mask"):
        assert_exact({**DENSE, **{name.replace("weight", key): kept.float() for name, kept in MASK.items()}}, tmp_path)
    assert_exact(
        {"model": DENSE, "masks": {"layers": {name: kept.numpy().astype("u1") for name, kept in MASK.items()}}},
        tmp_path,
    )
    for front, dtype in (("mask_", torch.bool), ("masks.", torch.float32)):
        strange = {f"{front}{name}": kept.to(dtype) for name, kept in MASK.items()}
        torch.save({**DENSE, **strange}, tmp_path / "saved.pt")
        for call in (Mask.load, lambda path: export(path, tmp_path / "out.safetensors")):
            line = f"by the names of their weights, got {front}0.weight, {front}3.weight beside weights without zeros"
            refused(lambda call=call: call(tmp_path / "saved.pt"), line)
        torch.save({**SPARSE, **strange}, tmp_path / "saved.pt")
        assert Mask.load(tmp_path / "saved.pt") == MASK


@pytest.mark.parametrize(
    ("saved", "line"),
    [
        ({"student": DENSE, "teacher": SPARSE}, "expected one state dict, got several (student, teacher); save one of them"),
        ({"model": DENSE, "masks": [*MASK.values()]}, "got a list of 2 under 'masks'; save a dict name -> mask"),
        ({"model": DENSE, "masks": {"0.weight": MASK["0.weight"], "fc": torch.ones(2)}},
         "expected masks of the weights beside them, got fc, which fit none"),
        ({"model": DENSE, "masks": {"0.weight": torch.ones(4, 6)}}, "got 0.weight, which fit none"),
        ({"optimizer": OPTIMIZER}, "expected a dict of tensors, got dict without any"),
    ],
)  # fmt: skip
def test_what_could_be_read_in_two_ways_is_refused(saved: Any, line: str, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "saved.pt")
    assert line in refused(lambda: Mask.load(tmp_path / "saved.pt"))
    assert line in refused(lambda: export(tmp_path / "saved.pt", tmp_path / "out.safetensors"))


def test_a_dict_that_holds_itself_ends(tmp_path: Path) -> None:
    saved: dict[str, Any] = {f"key{number}": {} for number in range(30)}
    for inner in [*saved.values()]:
        inner.update(saved)
    torch.save(saved, tmp_path / "saved.pt")
    assert "without any" in refused(lambda: Mask.load(tmp_path / "saved.pt"))


def test_the_best_and_the_last_are_several(tmp_path: Path) -> None:
    torch.save(SPARSE, tmp_path / "last.pt")
    assert Mask.load(tmp_path) == MASK
    torch.save(DENSE, tmp_path / "best.pt")
    refused(lambda: Mask.load(tmp_path), "got several (best.pt, last.pt); pass one of them")
