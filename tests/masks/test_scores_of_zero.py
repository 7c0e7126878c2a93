"""Scores that are 0 by the network's design, not by what a weight is worth: norms that start at 0, gates that saturate, and
ties that only the order of the weights could decide."""

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tost_plugins import masks
from tost_plugins.masks.topk import top_mask

SCORED = ["snip", "grasp", "synflow"]


def _torchvision() -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4, zero_init_residual=True)


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=4)


class Transformer(nn.Module):
    """Residual branches that end in a norm: of groups, or of the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList([nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)])
        self.mlp, self.last, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        for norm in (*self.norms, self.last):
            nn.init.zeros_(norm.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + norm(conv(x))
        x = x.mean((2, 3))
        return self.head(x + self.last(self.mlp(x)))


NETS = {
    "torchvision": (_torchvision, ".bn2.weight"),
    "timm": (_timm("resnet10t"), ".bn2.weight"),
    "own": (Transformer, "last.weight"),
}


def batches(side: int = 32) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(16, 3, side, side), torch.arange(16) % 4)]


@pytest.mark.parametrize("kind", SCORED)
@pytest.mark.parametrize("net", NETS)
def test_a_norm_that_starts_at_0_counts_as_1(net: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    make, norm = NETS[net]
    torch.manual_seed(0)
    model = make()
    gammas = {n: p for n, p in model.named_parameters() if n.endswith(norm.lstrip(".")) and not p.any()}
    assert gammas
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"rounds": 3} if kind == "synflow" else {"per_class": 4} if kind == "grasp" else {}
    with caplog.at_level(logging.INFO, "tost_plugins"):
        found = masks.find(model, kind, 0.7, batches(), on_collapse="keep_one", **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    (line,) = [r.getMessage() for r in caplog.records if "start at 0" in r.getMessage()]
    assert norm in line and line.startswith(f"{kind}: ") and "\n" not in line
    with torch.no_grad():
        for param in model.parameters():
            if (
                param.ndim == 1
                and param.numel()
                and any(
                    param is module.weight
                    for module in model.modules()
                    if isinstance(getattr(module, "weight", None), Tensor)
                )
            ):
                param.copy_(torch.where(param == 0, 1, param))  # fmt: skip
    caplog.clear()
    assert masks.find(model, kind, 0.7, batches(), on_collapse="keep_one", **options) == found
    assert "start at 0" not in caplog.text


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v3_small", "timm/lcnet_050", "timm/legacy_seresnet18"])
def test_synflow_empties_no_gate_because_it_saturates(name: str, caplog: pytest.LogCaptureFixture) -> None:
    library, _, kind = name.partition("/")
    torch.manual_seed(0)
    if library == "timm":
        model = _timm(kind)()
    else:
        model = getattr(pytest.importorskip("torchvision.models"), kind)(num_classes=4)
    options = {"rounds": 3, "input_shape": (3, 32, 32), "on_collapse": "keep_one"}
    with caplog.at_level(logging.WARNING, "tost_plugins"):
        mask = masks.find(model, "synflow", 0.8, **options)
    gates = [
        n for n, m in model.named_modules() if n.rpartition(".")[2] in ("fc1", "fc2", "conv_reduce", "conv_expand")
    ]
    assert gates and all(int(mask[f"{gate}.weight"].sum()) > 1 for gate in gates)
    assert not any(
        gate in caplog.text for gate in gates
    )  # other weights never act: a 3x3 kernel's corners on one pixel


def test_as_much_flow_enters_a_gate_as_leaves_it() -> None:
    """By hand: y = sigmoid(a x) * b, at a = 40 and b = 2: the flows of a and b are both y, where a slope would be 0."""
    from tost_plugins.masks.methods.synflow import synaptic_flow
    from tost_plugins.training.task import Task

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.sigmoid(self.a(x)))

    model = Gate()
    model.a.weight.data.fill_(40.0)
    model.b.weight.data.fill_(2.0)
    task, out = Task.of(model), {name: torch.empty(1, 1, dtype=torch.float64) for name in ("a.weight", "b.weight")}
    synaptic_flow(task, task.weights(torch.float64), (torch.ones(1, 1, dtype=torch.float64), None), out)
    assert [float(score) for score in out.values()] == pytest.approx([2.0, 2.0], abs=1e-12)


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_ties_of_scores_of_0_are_said_and_no_others(allocation: str, caplog: pytest.LogCaptureFixture) -> None:
    scores = {"a": torch.tensor([3.0, 0, 0, 0]), "b": torch.tensor([4.0, 5, 1, 1])}
    with caplog.at_level(logging.WARNING, "tost_plugins"):
        top_mask(scores, 0.5 if allocation == "uniform" else 0.25, allocation)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "scores of 0 say nothing about weights of 1 layers" in line and "(a)" in line
    caplog.clear()
    top_mask({**scores, "a": torch.tensor([3.0, 0, 0, 2])}, 0.5, allocation)
    top_mask({"a": torch.tensor([1.0, 1, 1, 1])}, 0.5, allocation)
    assert not caplog.records
