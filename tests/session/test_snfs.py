"""Sparse momentum: shares of the layers and positions by hand, and whose gradients the averages are of."""

import itertools
from typing import Any

import moving_cases
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from moving_cases import Digits, digits
from torch import Tensor, nn

from tost_plugins import Mask, Session, TostError
from tost_plugins.masks import MASKS
from tost_plugins.masks.methods.snfs import spread
from tost_plugins.training.clock import Clock
from tost_plugins.training.params import prunable

NOW = Clock(0, 100)


def layer(kept: int, size: int, mean: float) -> tuple[Tensor, Tensor, Tensor]:
    """A mask of the first `kept` weights, which fall from there, and momentum: `mean` for these, then from 1 up."""
    mask = torch.arange(size) < kept
    return mask, torch.arange(size, 0, -1.0), torch.where(mask, mean, torch.arange(size) / size)


def moved(layers: dict[str, tuple[Tensor, Tensor, Tensor]], clock: Clock = NOW) -> tuple[dict[str, Tensor], ...]:
    mask, weights, momentum = ({name: parts[i] for name, parts in layers.items()} for i in range(3))
    new = MASKS["snfs"](sparsity=0.5).update(mask, weights, momentum, clock, torch.Generator())
    return mask, new


def test_layers_grow_in_proportion_to_the_momentum_of_what_they_kept() -> None:
    """4 + 4 kept, half of them go: means of 3 to 1 grow 3 and 1, those of the largest momentum."""
    _, new = moved({"a": layer(4, 10, -3.0), "b": layer(4, 10, 1.0)})
    assert new["a"].nonzero().flatten().tolist() == [0, 1, 2, 3, 9]  # 2 and 3 were dropped, and pull hardest of all
    _, new = moved({"a": layer(4, 10, 0.3), "b": layer(4, 10, 0.1)})
    assert new["a"].nonzero().flatten().tolist() == [0, 1, 7, 8, 9] and new["b"].nonzero().flatten().tolist() == [
        0,
        1,
        9,
    ]


def test_a_layer_that_is_full_leaves_the_rest_to_others() -> None:
    mask, new = moved({"a": layer(98, 100, 50.0), "b": layer(10, 200, 1.0), "c": layer(10, 200, 2.0)})
    counts = [int(kept.sum()) for kept in new.values()]
    # 49 + 5 + 5 go; 49.7 would come back to the first, which may have 99; of 9 left the others get 3 and 6
    assert counts == [99, 5 + 3, 5 + 6] and sum(counts) == sum(int(kept.sum()) for kept in mask.values())
    _, new = moved({"a": layer(10, 10, 1.0), "b": layer(4, 4, 1.0)})
    assert all(bool(kept.all()) for kept in new.values())  # nowhere else to go


@given(st.data(), st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_whole_numbers_that_add_up(data: Any, room: list[int]) -> None:
    total = data.draw(st.integers(0, sum(room)))
    pulls = data.draw(st.lists(st.floats(0, 10), min_size=len(room), max_size=len(room)))
    rooms, pull = dict(enumerate(room)), dict(enumerate(pulls))
    found = spread(total, pull, rooms)  # type: ignore[arg-type]
    assert sum(found.values()) == total and all(0 <= found[i] <= most for i, most in enumerate(room))
    free = [i for i in rooms if found[i] < room[i]]
    for i, j in itertools.permutations(free, 2):
        if pulls[i] >= pulls[j] and any(pulls[k] for k in free):
            assert found[i] >= found[j] - 1


def test_the_share_that_moves_falls_to_half_a_percent() -> None:
    for at, wanted in ((0, 500), (50, 252), (99, 5), (100, 5)):
        mask, new = moved({"a": layer(1000, 4000, 0.0)}, Clock(at, 100))
        assert int((mask["a"] & ~new["a"]).sum()) == wanted and int(new["a"].sum()) == 1000
    method, run = MASKS["snfs"](sparsity=0.9), Clock(0, 12, 4)
    assert [at for at in range(13) if method.due(run.at(at))] == [4, 8]  # once an epoch, and not at the end
    assert (method.drop, method.momentum, method.allocation) == (0.5, 0.9, "erk")


class Row(nn.Module):
    """Eight weights whose gradient is the input."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Linear(8, 1, bias=False)
        self.row.weight.data[0] = torch.tensor([8.0, -7, 6, -5, 0, 0, 0, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.row(x)


GRADIENTS = [[1.0, 1, 1, 1, 4, 0, -8, 3], [1, 1, 1, 1, 4, 0, 4, 2], [0, 0, 0, 0, 1, 1, 1, 0]]
AVERAGES = [[0.5, 0.5, 0.5, 0.5, 2, 0, -4, 1.5], [0.75, 0.75, 0.75, 0.75, 3, 0, 0, 1.75]]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("around", ["nothing", "clip", "loss scale"])
def test_removed_weights_have_momentum_that_the_optimizer_never_sees(parts: int, around: str) -> None:
    """A masked average is 0 there and would grow index 5 as soon as any other; the last gradient alone index 6."""
    net, mask = Row(), {"kind": "snfs", "sparsity": 0.5, "every": "2ba", "momentum": 0.5, "drop": 0.6}
    session = Session(net, {"mask": mask}, Mask({"row.weight": torch.tensor([[True] * 4 + [False] * 4])}))
    made = torch.optim.SGD(net.parameters(), lr=0.125, momentum=0.9)
    with session.drive(made, total_steps=10):
        for step, gradient in enumerate(GRADIENTS, 1):
            made.zero_grad()
            scale = 4.0**step if around == "loss scale" else 1.0  # another one at each step
            for part in range(parts):  # the parts differ, and add up
                share = torch.tensor([gradient]) * torch.tensor([[0.5, 0.25, 0.25], [1.0, 0, 0]][parts == 1])[part]
                (scale * net(share).sum()).backward()
                assert not net.row.weight.grad[~session.mask["row.weight"]].any()
            if scale != 1:
                net.row.weight.grad /= scale
            norm = float(torch.nn.utils.clip_grad_norm_(net.parameters(), 1e9 if around != "clip" else 1.0))
            assert norm == pytest.approx([2, 2, 1][step - 1])  # that of the sparse network
            made.step()
            if step < 3:
                average = torch.tensor([AVERAGES[step - 1]]) / (2.0 if around == "clip" else 1.0)
                torch.testing.assert_close(net.state_dict()["row.weight_momentum"], average)
            buffer = made.state[net.row.weight]["momentum_buffer"]
            assert not buffer[~session.mask["row.weight"]].any()
            if step == 2:  # two go, and the two that pull most come, from 0 and without a memory
                assert session.mask["row.weight"].tolist() == [[True, True, False, False, True, False, False, True]]
                assert not net.row.weight[0, 4:].any() and not buffer[0, 4:].any()
        assert float(net.row.weight[0, 4]) == pytest.approx(-0.125)
    assert not hasattr(net.row, "weight_momentum")


def test_counts_of_layers_move_and_their_sum_does_not() -> None:
    masks, _ = moving_cases.history("snfs", Digits(norm=False).double())
    counts = [{name: int(kept.sum()) for name, kept in mask.items()} for mask in masks]
    assert len({mask.kept for mask in masks}) == 1
    assert len({tuple(count.values()) for count in counts}) > 2


def test_averages_are_those_of_the_whole_network_that_takes_the_same_steps() -> None:
    net, average = Digits(), {}
    session = Session(net, {"mask": {"kind": "snfs", "sparsity": 0.6, "every": "3ba"}})
    made = torch.optim.Adam(net.parameters(), lr=0.01)
    with session.drive(made, total_steps=8):
        for x, y in digits(8):
            params = dict(net.named_parameters())
            grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(params.values()))  # which runs no hooks
            for name, grad in zip(params, grads, strict=True):
                average[name] = 0.9 * average.get(name, torch.zeros_like(grad)) + 0.1 * grad
            made.zero_grad()
            F.cross_entropy(net(x), y).backward()
            made.step()
            for name in prunable(net):
                torch.testing.assert_close(net.state_dict()[f"{name}_momentum"], average[name])
                assert net.state_dict()[f"{name}_momentum"][~session.mask[name]].any() or session.mask[name].all()


def test_wrong_options_are_errors_that_say_where() -> None:
    for more, message in (
        ({"momentum": 1}, r"mask\.momentum: expected less than 1, got 1"),
        ({"drop": 0}, r"mask\.drop: expected greater than 0, got 0"),
    ):
        with pytest.raises(TostError, match=message):
            Session(Digits(), {"mask": {"kind": "snfs", "sparsity": 0.5, **more}})
    net = Digits()
    session, made = (
        Session(net, {"mask": {"kind": "snfs", "sparsity": 0.5}}).attach(),
        torch.optim.SGD(net.parameters()),
    )
    with pytest.raises(
        TostError, match=r"^snfs\.every: time '1ep': expected a run of known length, got steps_per_epoch=None"
    ):
        session.start(made, total_steps=8)
