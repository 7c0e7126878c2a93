"""A mask that somebody gives: what it says of tensors that have no mask is named in one line."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tost_plugins import Mask, Session, TostError, masks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn = nn.Embedding(20, 8), nn.LSTMCell(8, 16)
        self.norm, self.body, self.fc = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 4)


PRUNED = ["table.weight", "rnn.weight_hh", "norm.weight", "fc.bias"]


def pruned(names: list[str], path: Path) -> tuple[Net, str]:
    """A network pruned as torch does it, and the file of its state dict."""
    net = Net()
    places = [(net.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    for module, name in places:
        prune.random_unstructured(module, name, 0.5)
    torch.save(net.state_dict(), path / "pruned.pt")
    for module, name in places:
        prune.remove(module, name)
    return net, str(path / "pruned.pt")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "may come back" in r.getMessage()]


@pytest.mark.parametrize("way", ["find", "recipe", "given"])
@pytest.mark.parametrize("other", [*PRUNED, None])
def test_zeros_that_no_mask_keeps_are_named(
    way: str, other: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net, path = pruned(["body.weight", "fc.weight", *([other] if other else [])], tmp_path)
    optimizer, file = torch.optim.SGD(net.parameters(), lr=0.1), {"kind": "file", "path": path, "ignore": []}
    with caplog.at_level(logging.INFO, "tost_plugins"):
        if way == "find":
            mask = masks.find(net, "file", path=path)
        else:
            recipe = {"mask": file if way == "recipe" else {"kind": "random", "sparsity": 0.5}, "tweaks": []}
            session = Session(net, recipe, mask=Mask.load(path) if way == "given" else None).attach()
            session.start(optimizer, total_steps=1)
            mask = session.mask
    assert list(mask) == ["body.weight", "fc.weight"] and mask.sparsity == 0.5
    assert lines(caplog) == (
        [f"mask: zeros of 1 tensors that have no mask here may come back: {other}"] if other else []
    )


def test_zeros_of_frozen_layers_stay_and_those_they_lack_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net, path = pruned(["body.weight", "fc.weight"], tmp_path)
    net.body.requires_grad_(False)
    with caplog.at_level(logging.INFO, "tost_plugins"):
        assert list(masks.find(net, "file", path=path)) == ["fc.weight"] and lines(caplog) == []
        net.body.weight.data.fill_(1)
        assert list(masks.find(net, "file", path=path)) == ["fc.weight"]
    assert [line.rpartition(": ")[2] for line in lines(caplog)] == ["body.weight"]


def test_zeros_of_layers_that_are_ignored_or_unknown_are_refused(tmp_path: Path) -> None:
    net, path = pruned(["body.weight", "fc.weight"], tmp_path)
    with pytest.raises(TostError, match=r"got zeros for body\.weight; take it off `ignore`"):
        masks.find(net, "file", path=path, ignore=["body"])
    del net.body
    with pytest.raises(TostError, match=r"got zeros for body\.weight"):
        masks.find(net, "file", path=path)
