"""AC/DC: the phases of a run, by hand; what a dense phase begins with; and what is refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moving_cases import Digits, digits
from torch import nn

from tost_plugins import Mask, Session, TostError, masks
from tost_plugins.masks import MASKS
from tost_plugins.training.clock import Clock
from tost_plugins.training.params import prunable

SIX = {"kind": "ac_dc", "sparsity": 0.75, "begin": "1ep", "every": "1ep", "until": "5ep"}


def phases(run: Clock, **options: Any) -> str:
    """d or s after each step, from the start on."""
    method = MASKS["ac_dc"](sparsity=0.9, **options)
    assert run.total_steps is not None
    return "".join("s" if method.sparse_at(run.at(step)) else "d" for step in range(run.total_steps))


def test_counts_and_phases_of_a_run_of_six_epochs() -> None:
    net, found = Digits(), []
    session, made = Session(net, {"mask": SIX}), torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    size = sum(param.numel() for param in prunable(net).values())
    with session.drive(made, total_steps=12, steps_per_epoch=2):
        for step, (x, y) in enumerate(digits(12)):
            trained = session.mask.kept
            made.zero_grad()
            F.cross_entropy(net(x), y).backward()
            made.step()
            found += [trained] if step % 2 == 0 else []
            assert Mask.from_zeros(prunable(net)) == session.mask or session.mask.kept == size
    few = round(0.25 * size)
    assert found == [size, few, size, few, size, few]  # epoch for epoch
    assert session.mask.kept == few and session.mask == Mask.from_zeros(prunable(net))


def test_the_phases_of_the_paper() -> None:
    """100 epochs: 10 dense, phases of 5, then a dense one of 10 and a sparse one of 15."""
    wanted = "d" * 10 + ("s" * 5 + "d" * 5) * 6 + "s" * 5 + "d" * 10 + "s" * 15
    assert phases(Clock(0, 100)) == wanted
    assert phases(Clock(0, 100, 1), begin="10ep", every="5ep", until="85ep") == wanted
    assert phases(Clock(0, 10), begin="0ba", every="2ba", until="8ba") == "ssddssddss"
    assert phases(Clock(0, 10), begin="9ba", every="2ba", until="9ba") == "d" * 9 + "s"
    method = MASKS["ac_dc"](sparsity=0.9, begin="0ba", every="9ba", until="5ba")  # no phase fits before the end
    assert [step for step in range(10) if method.due(Clock(step))] == [0, 5]
    assert not method.settled(Clock(4)) and method.settled(Clock(5))


class Row(nn.Module):
    """Four weights whose gradient is the input, and a scale that has no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.scale = nn.Linear(4, 1, bias=False), nn.Parameter(torch.ones(1))
        self.row.weight.data[0] = torch.tensor([8.0, 4.0, 2.0, 1.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.row(x).sum() + self.scale.sum()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_dense_phase_begins_without_momentum(optimizer: str) -> None:
    """Sparse after steps 1 and 2, then all four train, from 0 where they were removed."""
    net = Row()
    mask = {"kind": "ac_dc", "sparsity": 0.5, "begin": "1ba", "every": "2ba", "until": "9ba"}
    made: Any = (
        torch.optim.SGD(net.parameters(), lr=0.125, momentum=0.5)
        if optimizer == "sgd"
        else torch.optim.Adam(net.parameters(), lr=0.125)
    )
    key = "momentum_buffer" if optimizer == "sgd" else "exp_avg"
    session = Session(net, {"mask": mask})
    with session.drive(made, total_steps=10):
        found = []
        for _ in range(4):
            made.zero_grad()
            net(torch.ones(1, 4)).backward()
            made.step()
            found.append(
                (session.mask.kept, made.state[net.row.weight][key].tolist()[0], float(made.state[net.scale][key]))
            )
            if len(found) in (2, 3):
                assert net.row.weight[0, 2:].tolist() == [0, 0]
        assert net.row.weight[0, 2:].tolist() != [0, 0]
    if optimizer == "sgd":
        assert found == [
            (2, [1, 1, 0, 0], 1),
            (2, [1.5, 1.5, 0, 0], 1.5),
            (4, [0, 0, 0, 0], 0),  # it opens: of kept weights and of those without a mask too
            (4, [1, 1, 1, 1], 1),
        ]
    else:
        assert found[1][1][0] > 0 and found[2] == (4, [0, 0, 0, 0], 0)
        assert bool(made.state[net.scale]["exp_avg_sq"] > 0)


def test_the_largest_of_all_layers_stay() -> None:
    method = MASKS["ac_dc"](sparsity=0.5, begin="0ba")
    weights = {"a": torch.tensor([4.0, -3.0, 0.5]), "b": torch.tensor([[1.0], [-2.0], [0.1]])}
    mask = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    new = method.update(mask, weights, {}, Clock(0, 100), torch.Generator())
    assert new["a"].tolist() == [True, True, False] and new["b"].flatten().tolist() == [False, True, False]
    back = method.update(new, weights, {}, Clock(7, 100), torch.Generator())
    assert all(bool(kept.all()) for kept in back.values())


@pytest.mark.parametrize("filters_left", [0, 1])
def test_a_phase_that_would_connect_little_has_the_largest_of_each_layer(
    filters_left: int, caplog: pytest.LogCaptureFixture
) -> None:
    net = Digits(norm=False)
    with torch.no_grad():
        for layer in (net.body[0], net.body[3]):
            layer.weight[filters_left:] *= 1e-6
    mask = {"kind": "ac_dc", "sparsity": 0.6, "begin": "1ba", "every": "1ba", "until": "4ba"}
    session, made = Session(net, {"mask": mask}), torch.optim.SGD(net.parameters(), lr=1e-9)
    batches = digits(5) if filters_left else None  # None: what it connects is not known, but that a layer is empty
    with caplog.at_level("INFO", "tost_plugins"), session.drive(made, batches, total_steps=5):
        kept = []
        for x, y in digits(5):
            made.zero_grad()
            F.cross_entropy(net(x), y).backward()
            made.step()
            kept.append(session.mask.kept)
    size = session.mask.size
    assert kept == [round(0.4 * size), size, size, round(0.4 * size), round(0.4 * size)]
    shares = masks.find(Digits(), "magnitude", 0.6, allocation="erk").sparsities()
    assert session.mask.sparsities() == shares
    (line,) = [record.getMessage() for record in caplog.records if "lie on a path" in record.getMessage()]
    assert line.startswith("mask ac_dc: of the largest weights of all layers too few lie on a path")
    assert "a move is left out" not in caplog.text


def test_wrong_options_are_errors_that_say_where() -> None:
    for more, message in (
        ({"begin": "0.9dur"}, r"mask: expected begin before until, 0\.85dur, got 0\.9dur; begin earlier"),
        ({"every": 5}, r"mask\.every: .*expected a number with a unit, got 5"),
    ):
        with pytest.raises(TostError, match=message):
            Session(Digits(), {"mask": {"kind": "ac_dc", "sparsity": 0.5, **more}})
