"""soft.py: major weights whole, minor ones in part, and sessions that change the minor ones alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tost_plugins import Mask, TostError, masks
from tost_plugins.masks.soft import minors_only, soften_

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.5),
    "rprop": lambda params: torch.optim.Rprop(params, lr=0.01),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 4))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(16, 8, generator=generator)), torch.arange(16) % 4).backward()
    optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_what_is_kept_is_whole_and_the_rest_is_drawn_between_0_and_1() -> None:
    mask = masks.find(nn.Linear(200, 100), "magnitude", 0.7)
    factors = masks.soft(mask, seed=3)["weight"]
    minors = factors[~mask["weight"]]
    assert bool((factors[mask["weight"]] == 1).all()) and factors.dtype == torch.float32
    assert float(minors.min()) >= 0 and float(minors.max()) < 1
    assert abs(float(minors.mean()) - 0.5) < 0.01 and abs(float(minors.var()) - 1 / 12) < 0.003
    assert torch.equal(factors, masks.soft(mask, seed=3)["weight"])
    assert not torch.equal(factors, masks.soft(mask, seed=4)["weight"])


def test_softening_keeps_the_major_weights_bit_for_bit() -> None:
    model = net()
    mask, before = masks.find(model, "magnitude", 0.5), values(model)
    factors = masks.soft(mask, seed=0)
    soften_(dict(model.named_parameters()), factors)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] * factors.get(name, torch.ones(1)))
        assert name not in mask or torch.equal(value[mask[name]], before[name][mask[name]])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_sessions_change_the_minor_weights_alone(kind: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for number in range(3):  # momentum of everything, which goes on pushing
        step(model, optimizer, number)
    mask = masks.find(model, "magnitude", 0.5, ignore=["4"])
    factors, before = masks.soft(mask, seed=0), values(model)
    with minors_only(model, factors, optimizer):
        for number in range(5):
            step(model, optimizer, number)
    for name, value in model.state_dict().items():
        if name in mask:
            assert torch.equal(value[mask[name]], before[name][mask[name]])
            assert bool((value[~mask[name]] != before[name][~mask[name]]).float().mean() > 0.9)
        else:
            assert torch.equal(value, before[name]), name
    step(model, optimizer)  # afterwards everything trains again
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(param._backward_hooks for param in model.parameters())


def test_a_minor_weight_moves_by_its_factor_times_the_gradient() -> None:
    model = nn.Linear(4, 1, bias=False)
    model.weight.data.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with minors_only(model, {"weight": torch.tensor([[1.0, 0.5, 0.25, 0.0]])}, optimizer):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    assert model.weight.tolist() == [[1.0, 0.5, 0.75, 1.0]]


def test_a_head_may_train_as_well() -> None:
    model = net()
    optimizer, before = OPTIMIZERS["sgd"](model.parameters()), values(model)
    factors = masks.soft(masks.find(model, "magnitude", 0.5, ignore=["4"]), seed=0)
    with minors_only(model, factors, optimizer, also=["4"]):
        step(model, optimizer)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["0.weight", "3.weight", "4.weight", "4.bias"]


def test_an_error_within_leaves_nothing_behind() -> None:
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with (
        pytest.raises(ZeroDivisionError),
        minors_only(model, masks.soft(masks.find(model, "magnitude", 0.5), 0), optimizer),
    ):
        raise ZeroDivisionError
    before = values(model)
    step(model, optimizer)
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_does_not_fit_is_refused() -> None:
    model = net()
    optimizer = OPTIMIZERS["sgd"](model[0].parameters())
    factors = masks.soft(masks.find(model, "magnitude", 0.5), 0)
    for given, message in (
        ({"9.weight": torch.ones(2)}, r"expected a tensor 9.weight of shape \(2,\), got None"),
        ({"0.weight": torch.ones(2)}, r"got \(16, 8\)"),
        ({"0.weight": torch.full((16, 8), 1.5)}, "expected factors from 0 to 1, got others for 0.weight"),
        (factors, "expected an optimizer that trains 3.weight, 4.weight, got one without"),
    ):
        with pytest.raises(TostError, match=message), minors_only(model, given, optimizer):
            pass
    with pytest.raises(TostError, match="got 'head'"), minors_only(model, {}, optimizer, also=["head"]):
        pass
    with pytest.raises(TostError, match=r"expected a mask of bools for w, got torch\.float32"):
        masks.soft({"w": torch.ones(2)}, 0)
    with pytest.raises(TostError, match="expected a mask of bools for w, got list"):
        masks.soft({"w": [True]})  # type: ignore[dict-item]
    with pytest.raises(TostError, match="minors_only: expected an optimizer, got NoneType"):
        minors_only(model, factors, None).__enter__()  # type: ignore[arg-type]
    others: list[Any] = [{name: factor.numpy() for name, factor in factors.items()}, list(factors), optimizer]
    for given in others:
        with pytest.raises(TostError, match="minors_only: expected names and their tensors, got others"):
            minors_only(model, given, optimizer).__enter__()
        with pytest.raises(TostError, match="soften_: expected names and their tensors, got others"):
            soften_({}, given)
    with pytest.raises(TostError, match="soften_: expected a tensor"):
        soften_({}, factors)


def test_the_mask_of_learned_scores_is_any_mask() -> None:
    scores = {"w": torch.tensor([0.1, 0.9, 0.4, 0.8])}
    factors = masks.soft(Mask({"w": scores["w"] >= 0.8}), seed=1)["w"]
    assert factors[[1, 3]].tolist() == [1.0, 1.0] and bool((factors[[0, 2]] < 1).all())
