"""The law of label smoothing: a loss made of cross entropies is what torch's own argument in each of them had made it."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tost_plugins.errors import Inapplicable, TostError
from tost_plugins.tweaks.label_smoothing import LabelSmoothing, Twins, check_hard

CLASSES, VOID = 5, 255
WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0])
Loss = Callable[..., Tensor]


def pixels(batch: int = 3) -> tuple[Tensor, Tensor]:
    labels = torch.randint(CLASSES, (batch, 4, 6))
    labels[0, :2] = VOID
    return torch.randn(batch, CLASSES, 4, 6), labels


def samples() -> tuple[Tensor, Tensor]:
    return torch.randn(7, CLASSES), torch.tensor([0, 4, -100, 2, 1, -100, 3])


def added(ce: Loss, x: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros((), dtype=x.dtype)
    for row in range(len(x)):
        total += ce(x[row : row + 1], y[row : row + 1].clamp(min=0)) / len(x)
    total *= 3
    return total


def masked(ce: Loss, x: Tensor, y: Tensor) -> Tensor:
    each, keep = ce(x, y, ignore_index=VOID, reduction="none"), y != VOID
    return (each * keep).flatten(1).sum(1).div(keep.flatten(1).sum(1).clamp(min=1)).mean()


def heads(ce: Loss, x: Tensor, y: Tensor) -> Tensor:
    main, aux = ce(x, y, ignore_index=VOID), ce(2 * x.flip(1), y, ignore_index=VOID, weight=WEIGHT.to(x))
    return sum([main, 0.4 * aux]) + 1e-3 * x.square().sum()  # type: ignore[return-value]


#: Losses made of a cross entropy that they are given, and what they are given besides.
LINEAR: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, Tensor]]]] = {
    "mean": (lambda ce, x, y: ce(x, y), samples),
    "sum over a count": (lambda ce, x, y: ce(x, y, reduction="sum") / torch.tensor(11), samples),
    "each, some of them": (lambda ce, x, y: torch.stack([*ce(x, y, reduction="none")])[y >= 0].mean(), samples),
    "weights": (lambda ce, x, y: ce(x, y, WEIGHT.to(x)), samples),
    "weights, sum": (lambda ce, x, y: ce(x, y, weight=WEIGHT.to(x), reduction="sum"), samples),
    "pixels": (lambda ce, x, y: ce(x, y, ignore_index=VOID), pixels),
    "pixels, weights": (lambda ce, x, y: ce(x, y, WEIGHT.to(x), ignore_index=VOID), pixels),
    "masks": (masked, pixels),
    "heads": (heads, pixels),
    "tokens": (
        lambda ce, x, y: ce(x.movedim(1, -1).flatten(0, 2).float(), y.flatten(), ignore_index=VOID).to(x), pixels
    ),
    "in place": (added, samples),
    "mixup": (lambda ce, x, y: 0.3 * ce(x, y) + (1 - 0.3) * ce(x, y.flip(0)), samples),
    "minus, over a number": (lambda ce, x, y: -(2 - ce(x, y)) / x.detach().norm(), samples),
    "learned, beside it": (lambda ce, x, y: ce(x, y) + x.square().mean() / x.exp().sum(), samples),
    "no batch": (lambda ce, x, y: ce(x[0], y[0]), samples),
}  # fmt: skip


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("kind", LINEAR)
def test_value_and_gradient_are_those_of_torchs_own(kind: str, alpha: float) -> None:
    make, data = LINEAR[kind]
    x, y = data()
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        if kind == "tokens":
            near = 1e-5
        logits, found = x.to(dtype).requires_grad_(), []
        twins = Twins(alpha)
        with twins:
            hard = make(F.cross_entropy, logits, y)
        found = [twins.of(hard), make(functools.partial(F.cross_entropy, label_smoothing=alpha), logits, y)]
        slopes = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in found]
        torch.testing.assert_close(found[0], found[1], rtol=near, atol=near)
        torch.testing.assert_close(slopes[0], slopes[1], rtol=near, atol=near)
        assert torch.equal(hard, make(F.cross_entropy, logits, y))  # what was computed stays as it was
        assert alpha == 0 or kind == "no batch" or not torch.allclose(found[0], hard, rtol=1e-3)


@pytest.mark.parametrize("dim", [1, -1])
def test_nll_of_a_log_softmax_is_cross_entropy(dim: int) -> None:
    x, y = samples()
    x, log = x.double().requires_grad_(), nn.LogSoftmax(dim)
    scores, twins = log(x), Twins(0.1)  # the network's last layer is there before anybody looks
    with twins:
        loss = nn.NLLLoss(weight=WEIGHT.double())(scores, y)
    wanted = F.cross_entropy(x, y, weight=WEIGHT.double(), label_smoothing=0.1)
    torch.testing.assert_close(twins.of(loss), wanted, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in (twins.of(loss), wanted)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)


def focal(x: Tensor, y: Tensor, detached: bool = False) -> Tensor:
    each = F.cross_entropy(x, y, reduction="none")
    certain = torch.exp(-(each.detach() if detached else each))
    return ((1 - certain) ** 2 * each).mean()


def focal_by_softmax(x: Tensor, y: Tensor) -> Tensor:
    certain = x.softmax(1).gather(1, y[:, None])[:, 0]
    return ((1 - certain) * F.cross_entropy(x, y, reduction="none")).mean()


def hard_examples(x: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(x, y, reduction="none")
    return each[each > each.mean()].mean()


def relative(x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(x, y)
    return loss / loss.detach()


def soft_and_hard(x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x, y) + F.cross_entropy(x, x.detach().softmax(1))


OTHERS: dict[str, tuple[Loss, str]] = {
    "focal": (focal, r"is not linear in its cross entropy \(exp\)"),
    "focal, detached": (functools.partial(focal, detached=True), r"not linear in its cross entropy \(exp\)"),
    "focal, by softmax": (focal_by_softmax, r"not linear in its cross entropy \(mul\)"),
    "learned temperature": (lambda x, y: F.cross_entropy(x, y) / x.square().mean(), r"cross entropy \(div\)"),
    "square": (lambda x, y: F.cross_entropy(x, y) * F.cross_entropy(x, y), r"not linear in its cross entropy \(mul\)"),
    "inverse": (lambda x, y: 1 / F.cross_entropy(x, y), "not linear in its cross entropy"),
    "relative": (relative, r"not linear in its cross entropy \(div\)"),
    "hard examples": (hard_examples, r"not linear in its cross entropy \(gt\)"),
    "top k": (lambda x, y: F.cross_entropy(x, y, reduction="none").topk(3)[0].mean(), r"\(topk\)"),
    "clamped": (lambda x, y: F.cross_entropy(x, y).clamp_(max=1.0), r"\(clamp\)"),
    "probabilities": (lambda x, y: F.cross_entropy(x, x.detach().softmax(1)), "has probabilities for labels"),
    "in part probabilities": (soft_and_hard, "has probabilities for labels"),
    "smoothed": (lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1), "smooths labels itself"),
    "mse": (lambda x, y: F.mse_loss(x[:, 0], y.to(x)), "has no cross entropy on class indices"),
    "binary": (lambda x, y: F.binary_cross_entropy_with_logits(x, F.one_hot(y, 5).to(x)), "has no cross entropy"),
    "margin": (nn.MultiMarginLoss(), "has no cross entropy"),
    "by hand": (lambda x, y: -x.log_softmax(1).gather(1, y[:, None]).mean(), "has no cross entropy"),
    "nll of scores": (F.nll_loss, "has no cross entropy"),
    "nll over samples": (lambda x, y: F.nll_loss(x.log_softmax(0), y), "has no cross entropy"),
    "unused": (lambda x, y: (F.cross_entropy(x, y), x.square().mean())[1], "has no cross entropy"),
    "reentrant checkpoint": (
        lambda x, y: checkpoint(F.cross_entropy, x, y, use_reentrant=True), "computes its cross entropy without gradients"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_losses_have_no_twin_and_stay_as_they_are(kind: str) -> None:
    loss_fn, reason = OTHERS[kind]
    x, y = torch.randn(6, CLASSES, requires_grad=True), torch.tensor([0, 4, 2, 1, 3, 3])
    plain, twins = loss_fn(x, y), Twins(0.1)
    with twins:
        found = loss_fn(x, y)
    assert torch.equal(plain, found)
    with pytest.raises(Inapplicable, match=reason):
        twins.of(found)


def test_what_is_only_looked_at_does_not_count() -> None:
    x, y, twins = torch.randn(4, CLASSES), torch.tensor([0, 1, 2, 3]), Twins(0.1)
    with twins:
        loss = F.cross_entropy(x, y)
        seen = loss.item(), float(loss), f"{loss:.3f}", loss.exp(), bool(torch.isfinite(loss))
    assert seen and torch.equal(twins.of(loss), F.cross_entropy(x, y, label_smoothing=0.1))


def test_losses_in_tuples_and_dicts() -> None:
    x, y, twins = torch.randn(4, CLASSES), torch.tensor([0, 1, 2, 3]), Twins(0.1)
    with twins:
        loss = F.cross_entropy(x, y)
        result = {"total": loss * 2, "parts": [loss], "logits": x}
    smooth = F.cross_entropy(x, y, label_smoothing=0.1)
    found = twins.of(result)
    assert torch.equal(found["total"], smooth * 2) and torch.equal(found["parts"][0], smooth) and found["logits"] is x


def test_under_autocast_as_torchs_own() -> None:
    x, y, twins = torch.randn(4, CLASSES, requires_grad=True), torch.tensor([0, 1, 2, 3]), Twins(0.1)
    with torch.autocast("cpu", torch.bfloat16), twins:
        loss = F.cross_entropy(x @ torch.eye(CLASSES), y)
        wanted = F.cross_entropy(x @ torch.eye(CLASSES), y, label_smoothing=0.1)
    assert torch.equal(twins.of(loss), wanted) and twins.of(loss).dtype == wanted.dtype


def test_a_cross_entropy_that_is_computed_again_for_the_backward_pass() -> None:
    x, y, layer, twins = torch.randn(4, 6), torch.tensor([0, 1, 2, 3]), nn.Linear(6, CLASSES), Twins(0.1)
    with twins:
        loss = checkpoint(lambda: F.cross_entropy(layer(x), y, reduction="none").mean(), use_reentrant=False)
    wanted = F.cross_entropy(layer(x), y, label_smoothing=0.1)
    slopes = [torch.autograd.grad(value, layer.weight)[0] for value in (twins.of(loss), wanted)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_under_function_transforms_as_torchs_own(transform: Any) -> None:
    x, y = torch.randn(4, CLASSES), torch.tensor([0, 1, 2, 3])

    def smoothed(x: Tensor) -> Tensor:
        twins = Twins(0.1)
        with twins:
            loss = F.cross_entropy(x, y)
        return twins.of(loss)

    wanted = transform(lambda x: F.cross_entropy(x, y, label_smoothing=0.1))(x)
    torch.testing.assert_close(transform(smoothed)(x), wanted)


class Scored(nn.Module):
    """Computes its loss inside, as networks of the Hub do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = F.relu(self.fc(x))
        return {"loss": F.cross_entropy(logits.float(), y, reduction="sum") / len(y), "logits": logits}


@pytest.mark.parametrize("place", ["around", "inside"])
def test_compiled_code_is_followed_in_one_graph(place: str) -> None:
    net, x, y = Scored(), torch.randn(4, 6), torch.tensor([0, 1, 2, 3])

    def step(x: Tensor, y: Tensor) -> Any:
        twins = Twins(0.1)
        with twins:
            outputs = net(x, y)
        return twins.of(outputs)

    torch._dynamo.reset()
    compiled, graphs = torch.compile(net if place == "around" else step, backend="eager", fullgraph=True), []
    for _ in range(3):
        twins = Twins(0.1)
        if place == "around":
            with twins:
                outputs = compiled(x, y)
            found = twins.of(outputs["loss"])
        else:
            found = compiled(x, y)["loss"]
        torch.testing.assert_close(found, F.cross_entropy(F.relu(net.fc(x)), y, label_smoothing=0.1))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1]


def test_compiled_code_with_another_loss_stays_as_it_is() -> None:
    x, y = torch.randn(6, CLASSES, requires_grad=True), torch.tensor([0, 4, 2, 1, 3, 3])
    torch._dynamo.reset()
    compiled, twins = torch.compile(focal, backend="eager", fullgraph=True), Twins(0.1)
    with twins:
        found = compiled(x, y)
    torch.testing.assert_close(found, focal(x, y))
    with pytest.raises(Inapplicable, match="not linear in its cross entropy"):
        twins.of(found)


class Inside(nn.Module):
    def __init__(self, loss_fn: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Identity(), loss_fn])


TWICE: dict[str, Any] = {
    "module": nn.CrossEntropyLoss(label_smoothing=0.1),
    "partial": functools.partial(F.cross_entropy, label_smoothing=0.2),
    "partial of partial": functools.partial(functools.partial(F.cross_entropy, label_smoothing=0.2), reduction="mean"),
    "partial of module": functools.partial(nn.CrossEntropyLoss(label_smoothing=0.2)),
    "inside": Inside(nn.CrossEntropyLoss(label_smoothing=0.2)),
}
TIMM = ["LabelSmoothingCrossEntropy", "SoftTargetCrossEntropy", "BinaryCrossEntropy", "JsdCrossEntropy"]


@pytest.mark.parametrize("twice", [*TWICE, *TIMM])
def test_smoothing_twice_is_an_error(twice: str) -> None:
    loss_fn = TWICE[twice] if twice in TWICE else getattr(pytest.importorskip("timm.loss"), twice)()
    with pytest.raises(TostError, match="here: expected a loss with hard labels, got one that smooths them already"):
        check_hard("here", loss_fn)


@pytest.mark.parametrize(
    "once",
    [nn.CrossEntropyLoss(), functools.partial(F.cross_entropy, label_smoothing=0.0), F.cross_entropy, nn.SmoothL1Loss(),
     functools.partial(nn.CrossEntropyLoss(label_smoothing=0.1), label_smoothing=0.0)],
)  # fmt: skip
def test_smoothing_once_is_none(once: Any) -> None:
    check_hard("here", once)


@pytest.mark.parametrize("wrong", [{"alpha": 1}, {"alpha": -0.1}, {"until": "1ep"}], ids=str)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"alpha|until"):
        LabelSmoothing(**wrong)
