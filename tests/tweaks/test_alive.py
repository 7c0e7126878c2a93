"""Which channels get a ghost: those that say something in the sparse network."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tost_plugins import Mask, Session
from tost_plugins.tweaks.ghost_skip import ghosts

BATCH = [(torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2)]


def net() -> nn.Sequential:
    """A stem of 2 channels, then 3, then 2; each convolution with a norm and a relu behind it."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 2), (2, 3), (3, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 2))


def sparse(model: nn.Module) -> Mask:
    """The stem's channel 1 has no weights; of the second convolution filter 1 has none, and filter 2 reads only it."""
    mask = {name: torch.ones_like(param) for name, param in model.named_parameters() if param.ndim > 1}
    mask["0.weight"][1] = 0
    mask["3.weight"][1] = 0
    mask["3.weight"][2, 0] = 0
    return Mask(mask)


def started(batches: Any = BATCH, **ghost: Any) -> tuple[nn.Sequential, Session]:
    model = net()
    recipe = {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": [{"kind": "ghost_skip", "until": "4ba", **ghost}]}
    session = Session(model, recipe, mask=sparse(model)).attach()
    session.start(torch.optim.SGD(model.parameters(), lr=0.1), batches, total_steps=8)
    return model.train(), session


def alive(model: nn.Module) -> list[list[bool]]:
    return [ghost.alive.flatten().bool().tolist() for ghost in ghosts(model)]


def test_a_channel_without_weights_or_that_reads_none_is_dead() -> None:
    assert alive(started()[0]) == [[True, False, False], [True, True]]


def test_without_batches_only_filters_are_looked_at() -> None:
    assert alive(started(None)[0]) == alive(started(iter(BATCH))[0]) == [[True, False, True], [True, True]]


def test_a_ghost_leaves_dead_channels_as_they_are() -> None:
    model, session = started()
    seen: dict[str, Tensor] = {}
    model[4].register_forward_hook(lambda module, args, output: seen.update(out=output.detach()))
    model(BATCH[0][0])
    with_ghost = seen["out"]
    next(iter(session.tweaks)).advance(model, session.clock.at(4))
    model(BATCH[0][0])
    assert torch.equal(with_ghost[:, 1:], seen["out"][:, 1:]) and not torch.equal(with_ghost[:, 0], seen["out"][:, 0])


def logits_near_the_end(model: nn.Module, strength: float) -> Tensor:
    for ghost in ghosts(model):
        ghost.set_strength(strength)
    return model(BATCH[0][0]).detach()


def test_a_faint_ghost_is_nearly_none() -> None:
    """Norms behind a dead channel would bring a ghost back to full size, up to the step at which it is gone."""
    model, _ = started()
    gone = logits_near_the_end(model, 0.0)
    assert (logits_near_the_end(model, 0.01) - gone).abs().max() < 0.02
    for ghost in ghosts(model):
        ghost.alive.fill_(1)  # as if every channel were alive
    with torch.no_grad():
        model[6].weight[:, :1] = 0  # the last convolution reads what is dead, and has a norm behind it
    gone = logits_near_the_end(model, 0.0)
    assert (logits_near_the_end(model, 0.01) - gone).abs().max() > 0.2


def test_what_is_alive_is_in_the_checkpoint() -> None:
    model, session = started()
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    other = net()
    again = Session(other, session.recipe, mask=sparse(other)).attach()
    other.load_state_dict(saved)
    again.start(torch.optim.SGD(other.parameters(), lr=0.1), None, total_steps=8)
    assert alive(other) == alive(model)
    again.finish()
    assert list(other.state_dict()) == list(net().state_dict())


def test_a_convolution_without_a_norm_is_looked_at_itself() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    mask = {name: torch.ones_like(param) for name, param in model.named_parameters() if param.ndim > 1}
    mask["2.weight"][0] = 0  # its bias is left: constant, so dead
    recipe = {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": ["ghost_skip"]}
    session = Session(model, recipe, mask=Mask(mask)).attach()
    session.start(torch.optim.SGD(model.parameters(), lr=0.1), BATCH, total_steps=8)
    assert alive(model) == [[False, True]]


def test_looking_leaves_no_trace() -> None:
    model, plain = started()[0], net()
    sparse(plain).apply_(dict(plain.named_parameters()))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in plain.state_dict().items())


def test_batches_that_the_network_cannot_be_run_on_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "tost_plugins"):
        model, _ = started([(torch.randn(8, 3, 6, 6), torch.zeros(8))])
    assert alive(model) == alive(started(None)[0])
    assert any("dead channels are those without weights" in message for message in caplog.messages)


def test_training_goes_on_in_the_alive_channels() -> None:
    model, session = started()
    F.cross_entropy(model(BATCH[0][0]), BATCH[0][1]).backward()
    grads = ghosts(model)[0].conv.weight.grad
    assert grads is not None and grads[0].any() and not grads[1:].any()
    assert session.metrics()["tost/ghost_skip/alpha"] == 1.0
