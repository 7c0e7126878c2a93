"""Sup-tickets: what two tickets of four weights make together, by hand, and the whole procedure from a recipe."""

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command import refused
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from tost_plugins import Mask, TostError
from tost_plugins.lab import superpose as lab
from tost_plugins.lab.cli import app
from tost_plugins.lab.superpose import Cycles
from tost_plugins.lottery.superpose import superpose, triangular
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.training.params import prunable

ROOT = Path(__file__).resolve().parents[2]
RECIPE: dict[str, Any] = {
    "name": "sup",
    "mask": {"kind": "set", "sparsity": 0.8, "every": "2ba"},
    "tweaks": [{"kind": "label_smoothing", "optional": True}],
    "model": "cifar/resnet8",
    "data": {"name": "digits", "limit": 192, "batch_size": 32},
    "optimizer": {"lr": 0.05},
    "duration": "5ep",  # 30 steps, of which 9 are for 3 cycles
}
CYCLES = Cycles(count=3, share=0.3)


def recipe(**changes: Any) -> Recipe:
    pytest.importorskip("sklearn")
    return Recipe.from_dict({**RECIPE, **changes})


def masks_of(*tickets: dict[str, Tensor]) -> list[Mask]:
    return [Mask({"w": ticket["w"] != 0}) for ticket in tickets]


# ---- by hand


def test_two_tickets_of_four_weights() -> None:
    """Both keep the first weight: 3 is its mean. One keeps the second (1) or the third (-2): these are their own means."""
    one, two = {"w": torch.tensor([4.0, 1, 0, 0])}, {"w": torch.tensor([2.0, 0, -2, 0])}
    before = copy.deepcopy([one, two])
    for sparsity, wanted in ((0.25, [3.0, 1, -2, 0]), (0.5, [3.0, 0, -2, 0]), (0.75, [3.0, 0, 0, 0])):
        network, mask = superpose([one, two], masks_of(one, two), sparsity)
        assert network["w"].tolist() == wanted and mask.kept == round(4 * (1 - sparsity))
        assert torch.equal(mask["w"], network["w"] != 0)
    assert all(torch.equal(a["w"], b["w"]) for a, b in zip(before, [one, two], strict=True))


def test_a_kept_weight_that_is_0_counts_in_the_average() -> None:
    tickets = [{"w": torch.tensor([0.0, 5.0])}, {"w": torch.tensor([3.0, 0.0])}]
    masks = [Mask({"w": torch.tensor([1, 1])}), Mask({"w": torch.tensor([1, 0])})]
    assert superpose(tickets, masks, 0.0)[0]["w"].tolist() == [1.5, 5.0]


def test_layers_compete_for_the_weights_that_stay() -> None:
    tickets = [{"a": torch.tensor([9.0, 8.0]), "b": torch.tensor([1.0, 2.0])}] * 2
    masks = [Mask({name: torch.ones(2) for name in "ab"})] * 2
    assert {name: kept.tolist() for name, kept in superpose(tickets, masks, 0.5)[1].items()} == {
        "a": [True, True], "b": [False, False],
    }  # fmt: skip


def test_counters_are_left_out_of_averages_and_all_else_is_the_mean() -> None:
    nets = [nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).half() for _ in range(2)]
    for place, net in enumerate(nets):
        net[1].num_batches_tracked.fill_(10 + place)
        net[1].running_mean.fill_(2.0 * place)
        net[0].bias.data.fill_(3.0 * place)
    masks = [Mask({"0.weight": torch.ones(2, 1, 1, 1)})] * 2
    network, _ = superpose([net.state_dict() for net in nets], masks, 0.0)
    assert network["1.num_batches_tracked"].item() == 11 and network["1.num_batches_tracked"].dtype == torch.int64
    assert network["1.running_mean"].tolist() == [1.0, 1.0] and network["0.bias"].tolist() == [1.5, 1.5]
    assert network["0.weight"].dtype == torch.float16
    nets[0].load_state_dict(network)


@pytest.mark.parametrize(
    ("tickets", "masks", "sparsity", "message"),
    [
        ([], [], 0.5, "a mask for each of the tickets, got 0 and 0"),
        ([{"w": torch.ones(2)}], [], 0.5, "got 0 and 1"),
        ([{"w": torch.ones(2)}, {"v": torch.ones(2)}], [Mask({"w": torch.ones(2)})] * 2, 0.5, "tickets of one network"),
        ([{"w": torch.ones(2)}] * 2, [Mask({"w": torch.tensor([1, 0])})] * 2, 0.5, "zeros outside the mask, got others in w"),
        ([{"w": torch.tensor([1.0, 0])}], [Mask({"w": torch.tensor([1, 0])})], 0.0, "2 weights or more, got 1; set a sparsity"),
        ([{"w": torch.tensor([float("nan"), 0])}], [Mask({"w": torch.ones(2)})], 0.5, "expected finite scores"),
        ([{"v": torch.ones(2)}], [Mask({"w": torch.ones(2)})], 0.5, "expected a weight w that fits its mask"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(tickets: Any, masks: Any, sparsity: float, message: str) -> None:
    with pytest.raises(TostError, match=message):
        superpose(tickets, masks, sparsity)


def test_a_cycle_s_learning_rate_is_a_triangle() -> None:
    rates = [triangular(step, 7, 0.0, 1.0) for step in range(8)]
    assert rates[0] == rates[-1] == 0 and rates == pytest.approx(rates[::-1]) and max(rates) == pytest.approx(6 / 7)
    with pytest.raises(TostError, match="expected a step from 0 to 7, got 8"):
        triangular(8, 7, 0.0, 1.0)


# ---- from a recipe


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("sup") / "whole"
    return out, lab.superpose(recipe(), out, CYCLES)


def test_the_rows_and_the_files_of_a_whole_procedure(done: tuple[Path, list[dict[str, Any]]]) -> None:
    out, rows = done
    assert [row["network"] for row in rows] == ["run", "ticket 1", "ticket 2", "ticket 3", "superposed"]
    assert len({row["kept_weights"] for row in rows}) == 1 and rows[-1]["sparsity"] == pytest.approx(0.8, abs=1e-4)
    result = json.loads((out / "result.json").read_text())
    assert 0 < result.pop("live") <= result["kept_weights"] and result == rows[-1]
    model, mask = load_file(out / "model.safetensors"), Mask.load(out / "mask.safetensors")
    assert all(not model[name][~kept].any() for name, kept in mask.items())
    run = json.loads((out / "run" / "result.json").read_text())
    assert run["history"][-1]["step"] == 21 and run["test_accuracy"] == rows[0]["test_accuracy"]


def test_each_cycle_explores_at_its_beginning_and_nowhere_else(done: tuple[Path, list[dict[str, Any]]]) -> None:
    """A move lets as many of each layer go as it takes in: half of them, less those that are drawn again."""
    out, _ = done
    masks = [Mask.load(out / "run" / "mask.safetensors")]
    masks += [Mask(torch.load(out / f"ticket-{number:02d}.pt")["mask"]) for number in (1, 2, 3)]
    gone = []
    for before, after in itertools.pairwise(masks):
        gone.append({name: int((kept & ~after[name]).sum()) for name, kept in before.items()})
        for name, kept in before.items():
            assert int(kept.sum()) == int(after[name].sum()) and gone[-1][name] <= int(kept.sum()) // 2
        moved = sum(gone[-1].values()) / before.kept
        assert 0.3 < moved < 0.5, moved
    assert gone[0] != gone[1], "each cycle draws anew"


def test_the_result_is_the_tickets_superposed_with_statistics_of_its_own(
    done: tuple[Path, list[dict[str, Any]]],
) -> None:
    out, _ = done
    saved = [torch.load(out / f"ticket-{number:02d}.pt") for number in (1, 2, 3)]
    states, masks = [each["model"] for each in saved], [Mask(each["mask"]) for each in saved]
    network, mask = superpose(states, masks, masks[-1].sparsity)
    model = load_file(out / "model.safetensors")
    assert mask == Mask.load(out / "mask.safetensors")
    for name, value in model.items():
        same = torch.equal(value, network[name])
        assert same != any(part in name for part in ("running_", "num_batches")), name
    means = [name for name in model if name.endswith("running_mean")]
    assert means and not any(torch.equal(model[name], state[name]) for name in means for state in states)


def test_one_that_was_stopped_in_a_cycle_ends_the_same_bit_for_bit(
    done: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    seen: list[str] = []

    def listen(event: str, values: dict[str, Any]) -> None:
        seen.append(values["name"] if event == "run" else "")
        if event == "step" and seen.count("") and any("ticket 2" in name for name in seen) and values["step"] == 2:
            raise Killed

    out, (_, rows) = tmp_path / "stopped", done
    with pytest.raises(Killed):
        lab.superpose(recipe(), out, CYCLES, listen=listen)
    assert (
        not (out / "superpose.csv").exists() and (out / "ticket-01.pt").exists() and not (out / "ticket-02.pt").exists()
    )
    with pytest.raises(TostError, match="expected a new folder, got one that holds a run"):
        lab.superpose(recipe(), out, CYCLES)
    with pytest.raises(TostError, match=r"expected the cycles that .* was started with, got others"):
        lab.superpose(recipe(), out, Cycles(count=2, share=0.3), resume=True)
    assert lab.superpose(recipe(), out, CYCLES, resume=True) == rows
    assert (out / "model.safetensors").read_bytes() == (done[0] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["rigl", "selfish"])
def test_other_masks_that_explore(kind: str, tmp_path: Path) -> None:
    rows = lab.superpose(recipe(mask={"kind": kind, "sparsity": 0.8, "every": "2ba"}), tmp_path / "out", Cycles(2, 0.2))
    assert [row["network"] for row in rows] == ["run", "ticket 1", "ticket 2", "superposed"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": {"kind": "random", "sparsity": 0.8}}, "whose mask explores .set, rigl, selfish., got 'random'"),
        ({"mask": {"kind": "gradual", "sparsity": 0.8}}, "whose mask explores"),
        ({"mask": {"kind": "snfs", "sparsity": 0.8}}, "whose mask explores .set, rigl, selfish., got 'snfs'"),
        ({"duration": "10ba"}, "expected cycles of 2 steps or more, got 1 .0.3 of 10 steps in 3 cycles."),
    ],
)
def test_what_cannot_be_superposed_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TostError, match=message):
        lab.superpose(recipe(**changes), tmp_path / "out", CYCLES)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "cycles"),
        ({"share": 1.0}, "share"),
        ({"explore": 0.0}, "explore"),
        ({"low": 0.2}, "low and high"),
    ],
)
def test_cycles_say_what_they_may_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TostError, match=f"^{message}: expected"):
        Cycles(**settings)


@pytest.mark.parametrize(
    ("sparsity", "said"),
    [(80, "in [0, 1), got 80.0; 80 % is written 0.8"), (-0.1, "in [0, 1), got -0.1; "), (True, "a number, got True; "),
     (None, "got None")],
)  # fmt: skip
def test_a_sparsity_that_is_none_is_said(sparsity: Any, said: str) -> None:
    ticket = {"w": torch.tensor([4.0, 0.0])}
    refused(lambda: superpose([ticket], [Mask.from_zeros(ticket)], sparsity), "superpose: sparsity: expected ", said)


def test_what_is_no_ticket_is_said() -> None:
    net = nn.Linear(2, 2)
    mask = Mask.from_zeros({"weight": net.weight})
    others: list[Any] = [net, {"weight": net.weight.detach().numpy()}]
    for ticket in others:
        refused(lambda ticket=ticket: superpose([ticket], [mask], 0.0), "superpose: expected state dicts, got ")
    alike = superpose([net.state_dict()], [{"weight": torch.ones(2, 2)}], 0.0)[1]  # type: ignore[list-item]
    assert alike == mask


def test_the_page_s_loop_of_one_s_own_runs() -> None:
    _, block = re.findall(r"```python\n(.*?)```", (ROOT / "docs/lottery.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["mask"].kept == 128 and Mask.from_zeros(prunable(names["net"])) == names["mask"]
    first, second, _ = names["masks"]
    assert 0.3 < (first - second).kept / 128 < 0.5


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    path = tmp_path / "mine.yaml"
    recipe(duration="12ba").to_yaml(path)
    options = ["--out", str(tmp_path / "out"), "--cycles", "2", "--share", "0.4", "--json"]
    result = CliRunner().invoke(app, ["superpose", str(path), *options])
    assert result.exit_code == 0, result.output
    assert [row["network"] for row in json.loads(result.stdout)["rows"]][-1] == "superposed"
    net = load_file(tmp_path / "out" / "model.safetensors")
    assert (
        sum(int((net[name] == 0).sum()) for name in net if name in Mask.load(tmp_path / "out" / "mask.safetensors")) > 0
    )
