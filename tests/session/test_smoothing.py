"""Label smoothing in a loop as users write it: when it acts, what it leaves alone, and that it says so once."""

import copy
import logging
import pickle
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tost_plugins import Session, TostError

SMOOTHING = {"kind": "label_smoothing", "alpha": 0.2}
OPTIONAL = {**SMOOTHING, "optional": True}
X, Y = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


def session_of(model: nn.Module, tweak: dict[str, Any] = SMOOTHING) -> tuple[Session, torch.optim.Optimizer]:
    session = Session(model, {"mask": {"kind": "random", "sparsity": 0.0}, "tweaks": [tweak]})
    return session, torch.optim.SGD(model.parameters(), lr=1.0)


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    each = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).mean()


OTHERS: dict[str, tuple[Any, str]] = {
    "regression": (lambda out, y: F.mse_loss(out[:, 0], y.float() * 50), "has no cross entropy on class indices"),
    "multi-label": (lambda out, y: F.binary_cross_entropy_with_logits(out, F.one_hot(y, 3).float()), "has no cross"),
    "mixed": (lambda out, y: F.cross_entropy(out, F.one_hot(y, 3) * 0.7 + 0.1), "has probabilities for labels"),
    "focal": (focal, r"is not linear in its cross entropy \(exp\)"),
    "margin": (nn.MultiMarginLoss(), "has no cross entropy on class indices"),
    "smooths inside": (lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1), "smooths labels itself"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_optional_smoothing_leaves_other_losses_as_they_are_and_says_so_once(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    (loss_fn, reason), model = OTHERS[kind], net()
    session, optimizer = session_of(model, OPTIONAL)
    with caplog.at_level(logging.WARNING, "tost_plugins"), session.drive(optimizer, total_steps=3):
        for _ in range(3):
            found = session.criterion(loss_fn)(model(X), Y)
            assert torch.equal(found, loss_fn(model(X), Y))
            optimizer.zero_grad(), found.backward(), optimizer.step()
    (record,) = caplog.records
    line = record.getMessage()
    assert (
        line.startswith("label_smoothing: expected a training loss that it can act on, got one that")
        and "\n" not in line
    )
    (left,) = session.report().left_out
    assert re.match(rf"label_smoothing \(the loss {reason}", left) and re.search(reason, line)


@pytest.mark.parametrize("kind", OTHERS)
def test_required_smoothing_refuses_other_losses(kind: str) -> None:
    (loss_fn, reason), model = OTHERS[kind], net()
    session, optimizer = session_of(model)
    with (
        pytest.raises(
            TostError, match=f"label_smoothing: expected .*, got one that {reason}.*; use cross entropy on class"
        ),
        session.drive(optimizer, total_steps=1),
    ):
        session.criterion(loss_fn)(model(X), Y)


def test_a_loss_that_smooths_by_its_own_settings_is_left_out_where_smoothing_is_optional(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, loss_fn = net(), nn.CrossEntropyLoss(label_smoothing=0.1)
    session, optimizer = session_of(model, OPTIONAL)
    with caplog.at_level(logging.WARNING, "tost_plugins"):
        assert session.criterion(loss_fn) is loss_fn
        with session.drive(optimizer, total_steps=1):
            session.criterion(loss_fn)(model(X), Y).backward(), optimizer.step()
    assert len(caplog.records) == 1 and session.report().left_out == (
        "label_smoothing (the loss smooths labels itself)",
    )


def test_smoothing_that_rests_takes_any_loss() -> None:
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    for steps in (3, 4):
        model = net()
        session, optimizer = session_of(model, SMOOTHING | {"least_steps": 4})
        made = session.criterion(loss_fn)
        session.begin(optimizer, total_steps=steps)
        if steps == 3:
            assert torch.equal(made(model(X), Y), loss_fn(model(X), Y)) and session.criterion(loss_fn) is loss_fn
        else:
            with pytest.raises(
                TostError, match="got one that smooths labels itself; use cross entropy on class indices"
            ):
                made(model(X), Y)
            with pytest.raises(TostError, match="expected a loss with hard labels"):
                session.criterion(loss_fn)


class Owner(nn.Module):
    """A network that owns its loss, and computes it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.body, self.loss = net(), nn.CrossEntropyLoss(weight=weight)

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"logits": logits} if y is None else {"logits": logits, "loss": self.loss(logits, y) / 2}


def test_the_criterion_of_a_module_is_a_module() -> None:
    weight = torch.tensor([1.0, 5.0, 0.1])
    model = Owner(weight)
    session, optimizer = session_of(model)
    model.loss = session.criterion(model.loss)  # type: ignore[assignment]
    assert isinstance(model.loss, nn.Module) and [b.shape for b in model.loss.buffers()] == [weight.shape]
    assert model.loss.to(torch.float64).loss_fn.weight.dtype == torch.float64
    model.loss.float()
    with session.drive(optimizer, total_steps=1):
        found = model(X, Y)["loss"]
        wanted = F.cross_entropy(model.body(X), Y, weight=weight, label_smoothing=0.2) / 2
        torch.testing.assert_close(found, wanted)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # without a session, hence plain
            torch.testing.assert_close(twin(X, Y)["loss"], F.cross_entropy(model.body(X), Y, weight=weight) / 2)
        found.backward(), optimizer.step()


def test_a_model_that_computes_its_own_loss_is_called_inside_a_criterion() -> None:
    model = Owner(torch.ones(3))
    session, optimizer = session_of(model)
    loss_of = session.criterion(lambda x, y: model(x, y)["loss"])
    with session.drive(optimizer, total_steps=1):
        wanted = F.cross_entropy(model.body(X), Y, label_smoothing=0.2) / 2
        torch.testing.assert_close(loss_of(X, Y), wanted)
        nested = session.criterion(lambda x, y: loss_of(x, y) * 3)  # smoothed once, whoever asks how often
        torch.testing.assert_close(nested(X, Y), wanted * 3)
        loss_of(X, Y).backward(), optimizer.step()


def test_what_is_no_training_loss_is_hard_and_does_not_count() -> None:
    model = net()
    session, optimizer = session_of(model)
    loss_fn, hard = session.criterion(F.cross_entropy), F.cross_entropy(model(X), Y)
    session.criterion(F.mse_loss)(model(X), torch.zeros(6, 3))  # before the start nothing is looked at
    with pytest.raises(TostError, match="never came by"), session.drive(optimizer, total_steps=1):
        with torch.no_grad():
            assert torch.equal(loss_fn(model(X), Y), hard)
        assert torch.equal(loss_fn(model.eval()(X), Y), hard)
        model.train()
        F.cross_entropy(model(X), Y).backward(), optimizer.step()


def test_the_step_is_that_of_torchs_own_smoothing_with_accumulation() -> None:
    model, twin = net(), net()
    session, optimizer = session_of(model)
    loss_fn = session.criterion(nn.CrossEntropyLoss(reduction="sum"))
    with session.drive(optimizer, total_steps=1):
        for part in (slice(0, 2), slice(2, 6)):
            (loss_fn(model(X[part]), Y[part]) / 6).backward()
        optimizer.step()
    F.cross_entropy(twin(X), Y, label_smoothing=0.2).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - theirs.grad)


def test_a_whole_step_under_torch_compile() -> None:
    model = net()
    session, optimizer = session_of(model)
    loss_fn = session.criterion(F.cross_entropy)
    torch._dynamo.reset()
    step = torch.compile(lambda x, y: loss_fn(model(x), y), backend="eager")
    with session.drive(optimizer, total_steps=2):
        for _ in range(2):
            optimizer.zero_grad()
            loss = step(X, Y)
            torch.testing.assert_close(loss, F.cross_entropy(model(X), Y, label_smoothing=0.2))
            loss.backward(), optimizer.step()


def test_a_model_in_eval_mode_is_named_as_such() -> None:
    model = net().eval()
    session, optimizer = session_of(model)
    wanted = (
        r"got one that came by while the model was in eval mode; call model.train\(\), after which norms may eval\(\)"
    )
    with pytest.raises(TostError, match=wanted), session.drive(optimizer, total_steps=1):
        session.criterion(F.cross_entropy)(model(X), Y).backward()
        optimizer.step()
