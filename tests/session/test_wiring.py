"""What a run's mask connects: said at the start and at every move, refused where that is nothing."""

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tost_plugins import Mask, Session, masks
from tost_plugins.errors import TostError
from tost_plugins.masks.methods.dnw import Dnw
from tost_plugins.masks.paths.connectivity import Paths
from tost_plugins.session.wiring import Wiring
from tost_plugins.training.params import prunable
from tost_plugins.training.task import Task

STEPS = 8


def net(width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)]
    return nn.Sequential(*layers)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 4, generator=generator), torch.arange(6) % 3) for _ in range(STEPS)]


def train(session: Session, model: nn.Module, steps: int = STEPS, lr: float = 0.1) -> list[dict[str, float]]:
    """The metrics after each step."""
    optimizer, found = torch.optim.SGD(model.parameters(), lr=lr), []
    with session.drive(optimizer, batches(), total_steps=STEPS):
        for x, y in batches()[:steps]:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            found.append(session.metrics())
    return found


def recipe(**mask: Any) -> dict[str, Any]:
    return {"mask": mask, "tweaks": []}


def disconnected(model: nn.Module) -> Mask:
    """No layer is empty, and no path is whole."""
    found = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in prunable(model).items()}
    found["0.weight"][0] = found["2.weight"][1, 0] = found["4.weight"][:, 2] = True
    return Mask(found)


class Branches(nn.Module):
    """A residual branch that may be empty."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.branch(x)).relu())


# ---- refused and said at the start


def test_a_given_mask_without_a_path_is_refused_with_the_layer_where_it_ends() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    session = Session(model, recipe(kind="random", sparsity=0.5), disconnected(model)).attach()
    told = r"^the given mask: expected a path of kept weights from the inputs to the outputs, got none: the last one ends at 4\.w"
    with pytest.raises(TostError, match=told):
        session.start(torch.optim.SGD(model.parameters(), lr=0.1), batches(), total_steps=2)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_found_and_a_loaded_mask_without_a_path_are_refused(tmp_path: Any) -> None:
    model = net()
    disconnected(model).save(tmp_path / "mask.safetensors")
    with pytest.raises(TostError, match=r"^mask file: expected a path of kept weights"):
        train(Session(model, recipe(kind="file", path=str(tmp_path / "mask.safetensors"))), model)
    with pytest.raises(TostError, match=r"^masks\.find\(file\): expected a path of kept weights"):
        masks.find(net(), "file", path=str(tmp_path / "mask.safetensors"))
    model = net()
    session, optimizer = (
        Session(model, recipe(kind="random", sparsity=0.5)).attach(),
        torch.optim.SGD(model.parameters(), lr=0.1),
    )
    session.start(optimizer, batches(), total_steps=STEPS)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state |= {f"{name}_mask": kept for name, kept in disconnected(model).items()}
    state["tost_clock"][0] = 3
    again = net()
    session = Session(again, recipe(kind="random", sparsity=0.5)).attach()
    again.load_state_dict(state)
    with pytest.raises(TostError, match=r"^the checkpoint's mask: expected a path of kept weights"):
        session.start(torch.optim.SGD(again.parameters(), lr=0.1), batches(), total_steps=STEPS)


def test_an_empty_layer_beside_a_live_branch_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = Branches()
    mask = Mask({n: torch.full(p.shape, n != "branch.weight") for n, p in prunable(model).items()})
    with caplog.at_level(logging.INFO, "tost_plugins"):
        session = Session(model, recipe(kind="random", sparsity=0.5), mask)
        train(session, model)
    (line,) = [r.getMessage() for r in caplog.records if "keep no weight" in r.getMessage()]
    assert line.startswith(
        "mask: 1 layers keep no weight, others beside them connect: branch.weight; name those in `ignore`"
    )
    assert session.report().live == mask.kept and "effective" not in caplog.text


def test_without_a_network_that_can_be_followed_an_empty_layer_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    class Two(Branches):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(a + b.view(7, 4))

    model = Two()
    mask = Mask({n: torch.full(p.shape, n != "branch.weight") for n, p in prunable(model).items()})
    told = r"the given mask: expected at least one weight in every layer, got none in branch\.weight, and"
    with caplog.at_level(logging.INFO, "tost_plugins"), pytest.raises(TostError, match=told):
        train(Session(model, recipe(kind="random", sparsity=0.5), mask), model)
    assert "mask: what it connects is not known (connectivity: expected a network that runs" in caplog.text
    model = Two()
    session = Session(model, recipe(kind="random", sparsity=0.5)).attach()
    session.start(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=2)
    report = session.report()
    assert (report.live, report.effective_sparsity) == (None, None) and "tost/live" not in session.metrics()


def test_the_line_at_the_start_and_the_report_say_what_is_live(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    mask = Mask({n: torch.ones_like(p) for n, p in prunable(model).items()} | {"4.weight": torch.eye(3, 6)})
    with caplog.at_level(logging.INFO, "tost_plugins"):
        session = Session(model, recipe(kind="random", sparsity=0.5), mask)
        metrics = train(session, model)
    live = 24 + 18 + 3  # three channels of the second layer are not read
    (line,) = [r.getMessage() for r in caplog.records if "recipe" in r.getMessage()]
    assert f"(effective {1 - live / 78:.4f}: of the kept weights {live / 63:.4f} are live)" in line
    report = session.report()
    assert report.live == live == masks.live(model, mask).kept and report.effective_sparsity == 1 - live / 78
    assert [(row["live"], row["dead_channels"]) for row in report.rows] == [(24, 0), (18, 3), (3, 0)]
    assert all(values["tost/live"] == live for values in metrics)


# ---- moves


def test_a_move_that_would_leave_no_path_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    paths, wiring = Paths(Task.of(model)), Wiring()
    wiring.follow(Task.of(model))
    params, dense = prunable(model), Mask.dense(prunable(model))
    wiring.take(dense, "here")
    assert wiring.known is not None and wiring.known.live == dense == Mask(paths.live(dense))
    assert wiring.allows(dense, dense, params, often=False)
    with caplog.at_level(logging.WARNING, "tost_plugins"):
        for _ in range(2):
            assert not wiring.allows(dense, disconnected(model), params, often=False)
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith("mask: a move is left out, and the mask before it stays") and line.endswith(
        "ends at 4.weight"
    )


def test_weights_over_padding_are_not_missed(caplog: pytest.LogCaptureFixture) -> None:
    """Of a 3 x 3 kernel over one pixel one weight in nine is live, and no mask can have more."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(4, 3))
    wiring, params = Wiring(), prunable(model)
    wiring.follow(Task.of(model, batches=[(torch.ones(2, 2, 1, 1), torch.zeros(2).long())]))
    dense = Mask.dense(params)
    with caplog.at_level(logging.WARNING, "tost_plugins"):
        assert wiring.allows(dense, dense, params, often=False, last=False)
    assert wiring.known is not None and (wiring.known.live_count, wiring.known.kept_count) == (20, 84)
    assert not caplog.records


def test_gradual_stops_where_the_next_cut_would_end_every_path(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)  # a global cut takes these first
    session = Session(
        model, recipe(kind="gradual", sparsity=0.7, allocation="global", until="6ba", every="1ba", begin="1ba")
    )
    with caplog.at_level(logging.WARNING, "tost_plugins"):
        metrics = train(session, model, lr=1e-4)
    assert "a move is left out" in caplog.text
    assert masks.live(model, session.mask).kept == session.report().live > 0
    kept = [values["tost/sparsity"] for values in metrics]
    assert kept == sorted(kept) and 0 < kept[-1] < 0.7
    assert all(values["tost/live"] > 0 for values in metrics)


def test_a_move_after_which_little_lies_on_a_path_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)[0, 0] = 9  # a global cut leaves one weight of the second layer
    spec = {"kind": "gradual", "sparsity": 0.6, "allocation": "global", "until": "6ba", "every": "1ba"}
    session = Session(model, recipe(**spec, begin="1ba"))
    with caplog.at_level(logging.WARNING, "tost_plugins"):
        last = train(session, model, lr=1e-4)[-1]
    kept, live = session.mask.kept, session.report().live
    assert live is not None and 0 < 2 * live < kept and last["tost/live"] == live
    (line,) = [record.getMessage() for record in caplog.records if "lie on a path" in record.getMessage()]
    assert line.startswith("mask: after a move ") and "(erk)" in line


@pytest.mark.parametrize("kind", ["rigl", "set", "snfs", "gradual", "ac_dc", "dnw", "top_kast"])
def test_what_is_said_of_a_mask_that_has_moved_is_true(kind: str) -> None:
    model = net(16)
    more = {"dnw": {"freeze": "4ba"}, "top_kast": {"every": "2ba"}}.get(kind, {"every": "2ba", "until": "6ba"})
    session = Session(model, recipe(kind=kind, sparsity=0.6, **more))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with session.drive(optimizer, batches(), total_steps=STEPS):
        for number, (x, y) in enumerate(batches()):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            said = session.metrics().get("tost/live")
            assert (said is None) == (kind == "top_kast" or (kind == "dnw" and number < 3))
            live = masks.live(model, session.mask, x).kept
            assert session.report().live == live and said in (None, live)
    assert session.report().live == masks.live(model, session.mask).kept


def test_a_mask_that_moves_at_every_step_is_looked_at_whole_only_where_its_witness_fails() -> None:
    model = net(16)
    params, method = prunable(model), Dnw(sparsity=0.5)
    mask: dict[str, Tensor] = dict(method.start(Task.of(model), torch.Generator()))
    wiring = Wiring()
    wiring.follow(Task.of(model))
    wiring.take(mask, "here")
    assert wiring.paths is not None
    looks = 0

    class Counting(Paths):
        def connectivity(self, mask: Any) -> Any:
            nonlocal looks
            looks += 1
            return super().connectivity(mask)

    wiring.paths = Counting(Task.of(model))
    assert wiring.allows(mask, mask, params, often=True) and looks > 1
    looks = 0
    small = {n: kept & (params[n].abs() < params[n].abs()[kept].median()) for n, kept in mask.items()}
    largest = {n: kept & ~small[n] for n, kept in mask.items()}
    assert wiring.allows(mask, largest, params, often=True) and looks == 0  # the witness is among the largest
    assert wiring.allows(mask, small, params, often=True) and looks > 1  # another path is
    assert not wiring.allows(mask, disconnected(net(16)), params, often=True)
