"""A mask that somebody gives: what it says of tensors that have no mask is named in one line."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

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


class Outer(nn.Module):
    """A network within another one, as a LightningModule has it."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, Net())


def bare() -> Mask:
    """A mask of the network by itself."""
    return masks.find(Net(), "random", 0.5)


def test_a_network_within_another_takes_the_masks_of_the_one_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    for mask in (bare(), Mask({name.removesuffix(".weight"): kept for name, kept in bare().items()})):
        session = Session(Outer("net"), {"mask": "from_zeros", "tweaks": []}, mask=mask).attach()
        with caplog.at_level(logging.INFO, "tost_plugins"):
            session.start(torch.optim.SGD(session.model.parameters(), lr=0.1), total_steps=1)
        assert {name: kept.tolist() for name, kept in session.mask.items()} == {
            f"net.{name}": kept.tolist() for name, kept in bare().items()
        }
    assert "its body.weight is taken as net.body.weight here, and all others likewise" in caplog.text


def test_a_network_takes_its_part_of_the_mask_of_a_larger_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layers = {name.removesuffix(".weight"): kept for name, kept in bare().items()}
    inner = {f"net.{name}": kept for name, kept in bare().items()} | {"head.weight": torch.eye(3)}
    torch.save({f"backbone.{name}": kept for name, kept in bare().items()}, tmp_path / "other.pt")
    assert [*masks.find(Outer("net"), "file", path=str(tmp_path / "other.pt"))] == [f"net.{name}" for name in bare()]
    for saved in (layers, inner):
        torch.save(saved, tmp_path / "mask.pt")
        with caplog.at_level(logging.INFO, "tost_plugins"):
            assert masks.find(Net(), "file", path=str(tmp_path / "mask.pt")) == bare()
    assert "its body is taken as body.weight here" in caplog.text
    assert "its net.body.weight is taken as body.weight here, and all others likewise; 1 of another part" in caplog.text


def test_names_that_could_be_taken_in_two_ways_are_refused(tmp_path: Path) -> None:
    both = {f"{part}.{name}": kept for part in ("g", "d") for name, kept in bare().items()}
    other = {f"net.{name}": torch.ones(2, 2) for name in bare()}
    one = {"net.body.weight": bare()["body.weight"]}
    torch.save(one, tmp_path / "mask.pt")
    with pytest.raises(TostError, match=r"expected a layer fc\.weight, got none"):  # which is what it lacks
        masks.find(Net(), "file", path=str(tmp_path / "mask.pt"))
    assert masks.find(Net(), "file", path=str(tmp_path / "mask.pt"), ignore=["fc"])["body.weight"].equal(
        one["net.body.weight"]
    )
    for saved in (both, other):
        torch.save(saved, tmp_path / "mask.pt")
        with pytest.raises(TostError, match=r"expected a layer body\.weight, got none"):
            masks.find(Net(), "file", path=str(tmp_path / "mask.pt"))
    with pytest.raises(TostError, match=r"expected a layer d\.body\.weight, got none"):
        torch.save(dict(bare()), tmp_path / "mask.pt")
        masks.find(Outer("g", "d"), "file", path=str(tmp_path / "mask.pt"))


def _old(norm: Callable[..., nn.Module], layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that there are newer ones
        return norm(layer)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
        lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)),
        lambda: _old(nn.utils.weight_norm, nn.Conv2d(4, 4, 3, padding=1)),
        lambda: _old(nn.utils.spectral_norm, nn.Conv2d(4, 4, 3, padding=1)),
        nn.Identity,
    ],
    ids=["weight norm", "spectral norm", "older weight norm", "older spectral norm", "none"],
)
@pytest.mark.parametrize("compact", [True, False], ids=["compact", "whole"])
def test_a_mask_is_given_to_a_network_with_weights_that_are_computed(
    layer: Callable[[], nn.Module], compact: bool
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), layer(), nn.Flatten(), nn.Linear(64, 3))
    batch = torch.randn(4, 2, 4, 4), torch.tensor([0, 1, 2, 0])
    mask = masks.find(net, "random", 0.5, [batch], budget="live")
    session = Session(
        net, {"mask": {"kind": "random", "sparsity": 0.9}, "tweaks": [], "compact": compact}, mask
    ).attach()
    session.start(torch.optim.SGD(net.parameters(), lr=0.1), [batch], total_steps=1)
    assert session.mask == mask and list(mask) == ["0.weight", "4.weight"]
    assert not net[0].weight[~mask["0.weight"]].any()


def test_an_empty_weight_in_a_mask_is_passed_over() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that there is nothing to initialise
        net = nn.ModuleDict({"none": nn.Linear(0, 2), "fc": nn.Linear(2, 2)})
    given = Mask({"none.weight": torch.ones(2, 0), "fc.weight": torch.tensor([[1, 0], [1, 1]])})
    session = Session(net, {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": []}, given).attach()
    session.start(torch.optim.SGD(net.parameters(), lr=0.1), total_steps=1)
    assert list(session.mask) == ["fc.weight"] and session.mask.kept == 3
    assert "masks of weights without numbers (none)" in session.report().left_out
