"""Top-KAST: which weights train, which stand still, and how strongly they are drawn to 0, by hand."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moving_cases import MOVING, Digits, digits
from torch import Tensor, nn

from tost_plugins import Mask, Session, TostError
from tost_plugins.masks import MASKS
from tost_plugins.training.clock import Clock
from tost_plugins.training.params import prunable


class Row(nn.Module):
    """Four weights whose gradient is the input."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.row = nn.Linear(4, 1, bias=False)
        self.row.weight.data[0] = torch.tensor(weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.row(x)


def step(net: Row, made: torch.optim.Optimizer, gradient: list[float]) -> None:
    made.zero_grad()
    net(torch.tensor([gradient]).float()).sum().backward()
    made.step()


HAND = {"kind": "top_kast", "sparsity": 0.5, "backward": 0.25, "every": "2ba", "decay": 0.0}


def test_half_is_seen_three_quarters_train_and_one_stands_still() -> None:
    net = Row([8.0, -6.0, 4.0, 2.0])
    session, made = Session(net, {"mask": HAND}), torch.optim.SGD(net.parameters(), lr=1.0)
    with session.drive(made, total_steps=10):
        assert float(net(torch.ones(1, 4))) == 8 - 6
        found = []
        for gradient in ([1.0, 1, -1, 1], [0, 1, -2, 9], [0, 0, 1, -3], [6, 0, 0, 1]):
            step(net, made, gradient)
            assert float(net(torch.ones(1, 4))) == float(net.row.weight.sum())
            found.append(
                (net.row.weight.tolist()[0], net.row.weight_hidden.tolist()[0], net.row.weight_trained.tolist()[0])
            )
    t, f = True, False
    assert found == [
        ([7, -7, 0, 0], [0, 0, 5, 2], [t, t, t, f]),  # the third trains unseen, the last has its gradient for nothing
        ([7, -8, 0, 0], [0, 0, 7, 2], [t, t, t, f]),  # of 7 and 7 the first stays
        ([7, -8, 0, 0], [0, 0, 6, 2], [t, t, t, f]),
        ([0, -8, 6, 0], [1, 0, 0, 2], [f, t, t, t]),  # 7 - 6 falls behind the one that stood still
    ]
    assert net.row.weight.tolist() == [[0, -8, 6, 0]] and not hasattr(net.row, "weight_trained")
    assert session.mask == Mask({"row.weight": torch.tensor([[f, t, t, f]])})


def test_what_trains_unseen_is_drawn_to_zero_by_one_over_the_density() -> None:
    """A quarter is kept: 4 times as strongly, where 1 / sparsity would be 1.33; before that, SGD's own decay for all."""
    for own in (0.0, 0.25):
        net = Row([8.0, 4.0, -4.0, 2.0])
        mask = {**HAND, "sparsity": 0.75, "backward": 0.25, "decay": 0.0625, "every": "9ba"}
        made = torch.optim.SGD(net.parameters(), lr=1.0, weight_decay=own)
        session = Session(net, {"mask": mask})
        with session.drive(made, total_steps=10):
            step(net, made, [0.0] * 4)
            assert net.row.weight.tolist() == [[8 * (1 - own - 0.0625), 0, 0, 0]]
            assert net.row.weight_hidden.tolist() == [[0, 4 * (1 - own - 0.25), -4 * (1 - own - 0.25), 2]]
            assert session.moving.pulls == (0.0625, 0.25)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_gradients_and_memory_are_those_of_what_trains(optimizer: str) -> None:
    net = Digits()
    session = Session(net, {"mask": MOVING["top_kast"]})
    made: Any = (
        torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
        if optimizer == "sgd"
        else torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    )
    ever, exchanged = 0, 0
    with session.drive(made, total_steps=10):
        for x, y in digits(10):
            before = {name: value.clone() for name, value in net.state_dict().items()}
            made.zero_grad()
            F.cross_entropy(net(x), y).backward()
            for name, param in prunable(net).items():
                assert param.grad is not None and not param.grad[~before[f"{name}_trained"]].any()
                ever += int((param.grad != 0)[~before[f"{name}_mask"]].sum())
            made.step()
            after = net.state_dict()
            for name, param in prunable(net).items():
                mask, trained = after[f"{name}_mask"], after[f"{name}_trained"]
                assert bool(trained[mask].all())
                count = min(round(0.7 / 0.4 * int(mask.sum())), mask.numel())
                assert int(trained.sum()) == count
                whole, old = param + after[f"{name}_hidden"], before[name] + before[f"{name}_hidden"]
                still = ~before[f"{name}_trained"]
                assert torch.equal(whole[still], old[still])
                exchanged += int((trained & still).sum())
                for value in made.state[param].values():
                    if isinstance(value, Tensor) and value.shape == param.shape:
                        assert not value[~trained].any() and not value[trained & still].any()
    assert ever > 0 and exchanged > 0
    assert not any("weight_" in name for name in net.state_dict())


def test_more_weights_train_than_are_kept_by_layer() -> None:
    weights = {"a": torch.tensor([5.0, -4, 3, -2, 1]), "b": torch.zeros(4), "c": torch.ones(2)}
    mask = {"a": weights["a"] > 4, "b": torch.tensor([False, False, True, False]), "c": torch.ones(2) > 0}
    for backward, wanted in ((None, [2, 2, 2]), (0.1, [5, 4, 2]), (0.6, [2, 2, 2]), (0.4, [3, 3, 2])):
        found = MASKS["top_kast"](sparsity=0.8, backward=backward).trained(mask, weights)
        assert [int(part.sum()) for part in found.values()] == wanted
        assert all(bool(part[mask[name]].all()) for name, part in found.items())
    assert found["a"].tolist() == [True, True, True, False, False]
    everything = MASKS["top_kast"](sparsity=0.0)
    assert everything.trained({"c": mask["c"]}, weights)["c"].all() and everything.pulls == (1e-4, 1e-4)
    method = MASKS["top_kast"](sparsity=0.8)
    assert [at for at in range(301) if method.due(Clock(at))] == [100, 200, 300] and not method.settled(Clock(300, 300))


def test_fused_steps_under_a_loss_scaler_are_drawn_alike() -> None:
    """Gradients come scaled then, and so does the decay that is added to them."""
    ends = []
    for scaled in (False, True):
        net = Digits(norm=False)
        session = Session(net, {"mask": {**MOVING["top_kast"], "decay": 0.1}})
        made = torch.optim.SGD(net.parameters(), lr=0.05, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        with session.drive(made, total_steps=10):
            for x, y in digits(10):
                made.zero_grad()
                scaler.scale(F.cross_entropy(net(x), y)).backward()
                scaler.step(made)
                scaler.update()
        ends.append(copy.deepcopy(net.state_dict()))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name])


def test_wrong_options_are_errors_that_say_where() -> None:
    for more, message in (
        ({"backward": 0.5}, r"mask: expected backward below sparsity, 0\.5, got 0\.5; lower backward"),
        ({"decay": -1}, r"mask\.decay: expected greater than or equal to 0, got -1"),
        ({"allocation": "global"}, r"mask\.allocation: expected a share for each layer, got 'global'"),
    ):
        with pytest.raises(TostError, match=message):
            Session(Digits(), {"mask": {"kind": "top_kast", "sparsity": 0.5, **more}})
