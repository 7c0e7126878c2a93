"""Which weights are prunable, by which names, and what is said of the others."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tost_plugins import Session, TostError, masks
from tost_plugins.training.params import left_out, prunable
from tost_plugins.training.transformed import transforms


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, self.weight - mean, self.bias)


class Centred(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight - self.weight.mean(1, keepdim=True)).t()


class Scaled(nn.Linear):
    """Its weight in another scale, dtype and layout has the same zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,io->bo", x, (2 * self.weight).t().contiguous())


class Padded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(pytest.importorskip("timm.layers"), name)(4, 6, 3)


def _bit() -> nn.Module:
    bit = pytest.importorskip("transformers.models.bit.modeling_bit")
    return bit.WeightStandardizedConv2d(4, 6, 3)


STANDARDISED = {
    "timm/std": _timm("StdConv2d"), "timm/std_same": _timm("StdConv2dSame"), "timm/scaled": _timm("ScaledStdConv2d"),
    "timm/scaled_same": _timm("ScaledStdConv2dSame"), "transformers/bit": _bit,
    "own/conv": lambda: Standardised(4, 6, 3, groups=2), "own/linear": lambda: Centred(4, 6),
}  # fmt: skip
AS_THEY_ARE = {
    "timm/same": _timm("Conv2dSame"), "own/scaled": lambda: Scaled(4, 6), "own/padded": lambda: Padded(4, 4, 3, groups=4),
    "torch": lambda: nn.ConvTranspose2d(4, 6, 3), "one": lambda: Centred(1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", STANDARDISED)
def test_layers_that_transform_their_weight_have_no_mask_and_are_named(name: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2), STANDARDISED[name]())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert list(prunable(net)) == ["0.weight"]
    assert torch.equal(torch.rand(1), expected)
    assert left_out(net) == [f"masks of {type(net[1]).__name__}, which transforms its weight (1)"]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with pytest.raises(
        TostError, match=r"to prune, got none; .* \(left out: masks of .*, which transforms its weight \(1\)"
    ):
        prunable(net, ["0"])


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_layers_that_use_their_weight_as_it_is_are_prunable(name: str) -> None:
    net = nn.Sequential(AS_THEY_ARE[name]())
    assert list(prunable(net)) == ["0.weight"] and left_out(net) == [] and not transforms(net[0])


def test_a_layer_that_does_not_run_alone_is_taken_as_it_is() -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.linear(x + y, self.weight)

    assert list(prunable(nn.Sequential(Two(2, 2)))) == ["0.weight"]


def test_parametrised_layers_are_named_and_those_of_prune_refused() -> None:
    net = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(2, 2, 3)), nn.Linear(2, 2))
    assert list(prunable(net)) == ["1.weight"]
    assert left_out(net) == ["masks of reparametrised weights (0)"]
    nn.utils.spectral_norm(net.append(nn.Linear(2, 2))[2])  # the older one, under the names that pruning uses
    assert list(prunable(net)) == ["1.weight"] and left_out(net) == ["masks of reparametrised weights (0, 2)"]
    prune.l1_unstructured(net[1], "weight", 0.5)
    with pytest.raises(
        TostError, match=r"^1\.weight: expected a plain parameter, got one that torch\.nn\.utils\.prune hides"
    ):
        prunable(net)


def test_matrices_of_other_modules_are_named() -> None:
    net = nn.ModuleDict({
        "rnn": nn.LSTMCell(2, 4), "attention": nn.MultiheadAttention(4, 2), "table": nn.Embedding(3, 4),
        "norm": nn.LayerNorm((4, 4)), "cell": nn.GRUCell(2, 2), "fc": nn.Linear(4, 2),
    })  # fmt: skip
    net.scale = nn.Parameter(torch.ones(1, 1, 4))  # one number a channel
    assert list(prunable(net)) == ["attention.out_proj.weight", "fc.weight"]
    assert left_out(net) == [
        "masks of LSTMCell (rnn.weight_ih, rnn.weight_hh)", "masks of MultiheadAttention (attention.in_proj_weight)",
        "masks of Embedding (table.weight)", "masks of LayerNorm (norm.weight, norm.bias)",
        "masks of GRUCell (cell.weight_ih, cell.weight_hh)",
    ]  # fmt: skip
    net.requires_grad_(False)
    net.fc.requires_grad_()
    assert list(prunable(net)) == ["fc.weight"] and left_out(net) == ["masks of frozen layers (attention.out_proj)"]


def _gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 12, "n_positions": 6}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def test_the_hubs_transposed_linear_layers_are_prunable() -> None:
    net = _gpt2()
    block = [name for name in prunable(net) if ".h.0." in name]
    assert [name.split(".h.0.")[1] for name in block] == [
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
    ]  # fmt: skip
    for allocation in ("uniform", "erk"):
        mask = masks.find(net, "magnitude", 0.8, allocation=allocation)
        assert mask.kept == round(0.2 * mask.size) and all(name in mask for name in block)
    layer = nn.Sequential(type(net.transformer.h[0].mlp.c_fc)(3, 5), nn.Linear(3, 2))  # 5 inputs, 3 outputs
    assert masks.find(layer, "synflow", 0.5, rounds=3).size == 21


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.second.weight, self.head.weight = self.first.weight, self.table.weight
        self.alias = self.first


@pytest.mark.parametrize("glob", ["first", "second", "alias", "second.weight", "s*", "al?as"])
def test_a_tied_weight_is_ignored_by_any_of_its_names(glob: str) -> None:
    assert list(prunable(Tied(), [glob])) == ["head.weight"]
    assert list(prunable(Tied(), ["table"])) == ["first.weight"]


def test_two_tensors_of_one_clean_name_are_refused() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.module, self.fc = nn.Sequential(), nn.Linear(2, 2)
            self.module.fc = inner

    for inner in (nn.Linear(2, 2), nn.LayerNorm(2)):
        with pytest.raises(
            TostError, match=r"^fc\.weight: expected one tensor of this name, got (module\.)?fc\.weight and"
        ):
            prunable(Wrapped(inner))
    assert list(prunable(nn.ModuleDict({"module": nn.Linear(2, 2)}))) == ["weight"]


def test_what_a_run_has_masked_stays_when_others_freeze_or_free_it() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    names = tuple(prunable(net))
    assert names == ("1.weight", "2.weight")
    net[0].requires_grad_()
    net[1].requires_grad_(False)
    assert tuple(prunable(net, (), names)) == names
    net.requires_grad_(False)
    assert len(prunable(net)) == 3  # nothing trains: it is only looked at


def test_in_degrees_of_transposed_layers_are_those_of_their_outputs(tmp_path: Path) -> None:
    layer = type(_gpt2().transformer.h[0].mlp.c_fc)(3, 5)  # 5 inputs, 3 outputs
    net = nn.Sequential(layer, nn.Linear(3, 2))
    recipe = {
        "mask": {"kind": "random", "sparsity": 0.0},
        "tweaks": [],
        "watch": {"measures": ["in_degree"], "out": str(tmp_path)},
    }
    with Session(net, recipe).drive(torch.optim.SGD(net.parameters(), lr=0.1), total_steps=1, steps_per_epoch=1):
        pass
    first, *_ = csv.DictReader((tmp_path / "in_degree.csv").open(newline=""))
    assert (first["units"], first["inputs"]) == ("3", "5")
