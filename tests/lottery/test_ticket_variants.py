"""Tickets after Zhou et al. and Renda et al.: what survives, what it starts from, and that weights are kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from tost_plugins import LotteryTicket, Mask, TostError
from tost_plugins.lab.lottery import lottery
from tost_plugins.lab.train import prepare
from tost_plugins.lottery.round import Round
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.session.session import session_of
from tost_plugins.training.params import prunable

TRAINERS = ("torch", "composer", "transformers", "accelerate", "lightning")
RECIPE: dict[str, Any] = {
    "name": "variants",
    "mask": {"kind": "lottery_ticket", "sparsity": 0.6, "prune": 0.4},
    "tweaks": [],
    "model": "cifar/resnet8",
    "data": {"name": "digits", "limit": 128, "batch_size": 64},
    "optimizer": {"lr": 0.05},
    "duration": "3ba",
}
#: A layer of four weights, before (w) and after (v): magnitudes 2, 1, 3, 4 become 1, 3, 2, 4.
W, V = torch.tensor([2.0, 1.0, -3.0, 4.0]), torch.tensor([-1.0, 3.0, -2.0, 4.0])


def recipe(trainer: str = "torch", **changes: Any) -> Recipe:
    pytest.importorskip("sklearn")
    if trainer != "torch":
        pytest.importorskip(trainer)
    mask = {**RECIPE["mask"], **changes.pop("mask", {})}
    return Recipe.from_dict({**RECIPE, "trainer": trainer, "mask": mask, **changes})


# ---- what survives


@pytest.mark.parametrize(
    ("score", "kept"),
    [
        ("large_final", [0, 1, 0, 1]),
        ("small_final", [1, 0, 1, 0]),
        ("large_init", [0, 0, 1, 1]),
        ("small_init", [1, 1, 0, 0]),
        ("large_init_large_final", [0, 0, 1, 1]),  # a is 1: 1, 1, 2, 4
        ("small_init_small_final", [1, 1, 0, 0]),  # -2, -3, -3, -4: of equal ones the lower index
        ("magnitude_increase", [0, 1, 0, 1]),  # -1, 2, -1, 0
        ("movement", [1, 1, 0, 0]),  # 3, 2, 1, 0
    ],
)
def test_each_score_by_hand(score: Any, kept: list[int]) -> None:
    ticket = LotteryTicket(sparsity=0.5, score=score)
    assert ticket.next(Mask({"w": torch.ones(4)}), {"w": V}, 0.5, {"w": W})["w"].tolist() == kept


def test_what_is_pruned_stays_so_whatever_the_scores_are() -> None:
    ticket = LotteryTicket(sparsity=0.75, score="magnitude_increase")
    half = Mask({"w": torch.tensor([1, 0, 1, 0])})
    final = {
        "w": torch.tensor([-1.0, 0.0, -1.0, 0.0])
    }  # the survivors have lost 1 and 2; the others would have 1 and 4
    assert ticket.next(half, final, 0.75, {"w": W})["w"].tolist() == [1, 0, 0, 0]
    small = LotteryTicket(sparsity=0.75, score="small_final")
    assert small.next(half, {"w": torch.tensor([5e30, 0.0, -3e30, 0.0])}, 0.75)["w"].tolist() == [0, 0, 1, 0]


def test_the_scale_between_initial_and_final_weights_is_each_layers_own() -> None:
    w = {"a": W, "b": W}
    v = {"a": V, "b": 100 * V}  # layers that have grown differently count alike
    mask = LotteryTicket(sparsity=0.5, score="large_init_large_final").next(Mask.dense(w), v, 0.5, w)
    assert mask["a"].tolist() == mask["b"].tolist() == [0, 0, 1, 1]


def test_a_score_of_the_beginning_asks_for_it() -> None:
    with pytest.raises(TostError, match="expected the initial weights for score 'movement', got none; pass initial"):
        LotteryTicket(sparsity=0.5, score="movement").next(Mask({"w": torch.ones(4)}), {"w": V}, 0.5)
    with pytest.raises(TostError, match="expected finite scores, got NaN or infinity in w"):
        LotteryTicket(sparsity=0.5, score="movement").next(Mask({"w": torch.ones(4)}), {"w": V / 0}, 0.5, {"w": W})


def test_a_score_looks_at_the_initial_weights(tmp_path: Path) -> None:
    spec = recipe(mask={"score": "magnitude_increase"})
    lottery(spec, tmp_path)
    initial = {name: param.detach() for name, param in prunable(prepare(spec, tmp_path).model).items()}
    found = [Mask.load(tmp_path / f"round-{number:02d}/mask.safetensors") for number in range(3)]
    for number in range(2):
        final = load_file(tmp_path / f"round-{number:02d}/model.safetensors")
        grown = {name: final[name].abs() - weight.abs() for name, weight in initial.items()}
        gone = found[number] - found[number + 1]
        lost = max(float(grown[name][part].max()) for name, part in gone.items() if part.any())
        stayed = min(float(grown[name][part].min()) for name, part in found[number + 1].items() if part.any())
        assert lost <= stayed


# ---- what it starts from


class Starts:
    """The masked weights before the first step of each round, seen by torch's hook on every forward."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, Tensor]] = []
        self._new = False

    def listen(self, event: str, values: dict[str, Any]) -> None:
        self._new = self._new or event == "run"

    def forward(self, module: nn.Module, args: Any) -> None:
        session = session_of(module)
        if self._new and session is not None and session.state == "running" and module.training:
            self._new = False
            weights = session.weights.weights
            self.rounds.append({name: weight.detach().clone() for name, weight in weights.items()})


def starts(spec: Recipe, out: Path) -> list[dict[str, Tensor]]:
    seen = Starts()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(seen.forward)
    try:
        lottery(spec, out, listen=seen.listen)
    finally:
        hook.remove()
    return seen.rounds


@pytest.mark.parametrize(
    ("weights", "trainer"),
    [
        ("constant_sign", "torch"),
        ("reshuffled", "torch"),
        ("new", "torch"),
        ("new", "composer"),
        ("new", "transformers"),
        ("new", "accelerate"),
        ("new", "lightning"),
    ],
)
def test_what_kept_weights_start_from(tmp_path: Path, weights: str, trainer: str) -> None:
    rounds = starts(recipe(trainer, mask={"weights": weights, "sparsity": 0.4}), tmp_path)
    initial = rounds[0]
    assert len(rounds) == 2
    for number, start in enumerate(rounds[1:], start=1):
        for name, keep in Mask.load(tmp_path / f"round-{number:02d}/mask.safetensors").items():
            first, now = initial[name], start[name]
            assert not now[~keep].any()
            if weights == "constant_sign":
                assert torch.equal(now[keep], first[keep].sign() * first.std(correction=0))
            elif weights == "reshuffled":
                assert torch.equal(now[keep].sort().values, first[keep].sort().values)
                assert keep.sum() < 50 or not torch.equal(now[keep], first[keep])
            else:
                assert not (now[keep] == first[keep]).any()
                assert keep.sum() < 300 or float(now[keep].std() / first.std()) == pytest.approx(1, abs=0.2)


def test_what_is_drawn_is_another_in_each_round_and_the_same_in_each_run(tmp_path: Path) -> None:
    spec = recipe(mask={"weights": "new"})
    one, two = starts(spec, tmp_path / "one"), starts(spec, tmp_path / "two")
    for name, weight in one[2].items():
        assert torch.equal(weight, two[2][name])
        assert not (weight[weight != 0] == one[1][name][weight != 0]).any()


# ---- the weights are kept, the learning rate is rewound


@pytest.mark.parametrize("trainer", TRAINERS)
def test_learning_rate_rewinding_goes_on_with_the_weights_of_the_round_before(tmp_path: Path, trainer: str) -> None:
    spec = recipe(trainer, mask={"rewind": "learning_rate", "sparsity": 0.6 if trainer == "torch" else 0.4})
    rounds = starts(spec, tmp_path)
    for number, start in enumerate(rounds[1:], start=1):
        ended = load_file(tmp_path / f"round-{number - 1:02d}/model.safetensors")
        for name, keep in Mask.load(tmp_path / f"round-{number:02d}/mask.safetensors").items():
            assert torch.equal(start[name], ended[name] * keep)
    histories = [path.read_text().splitlines() for path in tmp_path.glob("round-*/history.jsonl")]
    rates = [[json.loads(row)["lr"] for row in rows] for rows in histories]
    assert len(rates) == len(rounds) and all(row == rates[0] for row in rates)


def test_what_is_for_initial_weights_is_for_the_dense_round(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="tost_plugins")
    tweaks = ["sparse_init", {"kind": "rescaled_init", "iterations": 2}, {"kind": "ghost_skip", "until": "0.5dur"}]
    lottery(recipe(mask={"rewind": "learning_rate", "sparsity": 0.4}, tweaks=tweaks), tmp_path)
    kinds = [
        [tweak.kind for tweak in Recipe.load(path).tweaks] for path in sorted(tmp_path.glob("round-*/recipe.yaml"))
    ]
    assert kinds == [["sparse_init", "rescaled_init", "ghost_skip"], ["ghost_skip"]]
    assert all(f"{kind} is for the dense round alone" in caplog.text for kind in ("sparse_init", "rescaled_init"))


# ---- around a training function of one's own


class Own:
    """Momentum, a cosine and noise from torch's generator; it notes what each round began with."""

    def __init__(self, dies_in: int | None = None) -> None:
        self.begins: list[dict[str, Any]] = []
        self.dies_in = dies_in

    def __call__(self, model: nn.Module, round: Round) -> dict[str, float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
        schedule = CosineAnnealingLR(optimizer, 4)
        for step in round.steps(4, optimizer, schedule):
            if not step:
                weights = {name: param.detach().clone() for name, param in model.named_parameters()}
                buffers = {name: value.clone() for name, value in model.named_buffers()}
                self.begins.append({**weights, **buffers, "lr": optimizer.param_groups[0]["lr"]})
            if step == 2 and round.number == self.dies_in:
                raise KeyboardInterrupt
            x = torch.randn(16, 6)
            loss = F.cross_entropy(model(x), (x.sum(1) > 0).long())
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return {"loss": loss.item()}


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


VARIANTS: list[dict[str, Any]] = [
    {"rewind": "learning_rate"},
    {"weights": "reshuffled"},
    {"weights": "new", "score": "movement"},
    {"weights": "constant_sign", "score": "large_init_large_final"},
    {"removed": "initial"},
    {"removed": "initial", "rewind": "learning_rate", "score": "small_init"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_variant_goes_on_with_the_same_bits(tmp_path: Path, variant: dict[str, Any]) -> None:
    ticket = LotteryTicket(sparsity=0.7, prune=0.5, **variant)
    net = small()
    rows = ticket.run(net, Own(), tmp_path / "whole")
    again = small()
    with pytest.raises(KeyboardInterrupt):
        ticket.run(again, Own(dies_in=1), tmp_path / "killed")
    other = small(5)  # another process
    assert ticket.run(other, Own(), tmp_path / "killed", resume=True) == rows
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())


def test_learning_rate_rewinding_around_a_function(tmp_path: Path) -> None:
    own = Own()
    rows = LotteryTicket(sparsity=0.7, prune=0.5, rewind="learning_rate").run(small(), own, tmp_path)
    assert [row["kept_weights"] for row in rows] == [64, 32, 19]
    for number, begin in enumerate(own.begins[1:], start=1):
        ended = torch.load(tmp_path / f"round-{number - 1:02d}/model.pt")["parts"][0]
        mask = Mask.load(tmp_path / f"round-{number:02d}/mask.safetensors")
        for name, value in ended.items():
            assert torch.equal(begin[name], value * mask[name] if name in mask else value)
        assert begin["lr"] == 0.3


def test_removed_weights_may_stay_what_they_were(tmp_path: Path) -> None:
    net = small()
    initial = {name: param.detach().clone() for name, param in prunable(net).items()}
    own = Own()
    LotteryTicket(sparsity=0.7, prune=0.5, removed="initial").run(net, own, tmp_path)
    mask = Mask.load(tmp_path / "round-02/mask.safetensors")
    for name, param in prunable(net).items():
        moved = param.detach() != initial[name]
        assert torch.equal(moved, mask[name])  # all that is kept has trained, and nothing else
        assert torch.equal(own.begins[2][name], initial[name])


def leaves_zeros(model: nn.Module, round: Round) -> None:
    round.mask.apply_(dict(model.named_parameters()))


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    ticket = {"kind": "lottery_ticket", "sparsity": 0.5}
    for changes, message in [
        ({"weights": "new", "rewind": "5ba"}, "expected rewind: 0ba beside weights: new, got 5ba; leave one out"),
        ({"weights": "new", "rewind": "learning_rate"}, "expected weights: own beside rewind: learning_rate, got new"),
        ({"score": "largest"}, "score: expected 'large_final', "),
        ({"rewind": "never"}, "rewind: time: expected a number with a unit, got 'never'"),
    ]:
        with pytest.raises(TostError, match=message):
            Recipe.from_dict({**RECIPE, "mask": {**ticket, **changes}})
    with pytest.raises(
        TostError, match=r"mask\.removed: expected zero, got 'initial'; under a trainer removed weights"
    ):
        lottery(recipe(mask={"removed": "initial"}), tmp_path / "a")
    with pytest.raises(TostError, match="round 1: expected initial values outside the mask after training, got others"):
        LotteryTicket(sparsity=0.5, removed="initial").run(small(), leaves_zeros, tmp_path / "b")


def test_recipes_keep_what_is_said_of_a_ticket() -> None:
    for rewind in ("learning_rate", "0ba", "5ep"):
        spec = Recipe.from_dict({"mask": {"kind": "lottery_ticket", "sparsity": 0.5, "rewind": rewind}})
        assert spec.to_dict()["mask"]["rewind"] == rewind and Recipe.from_dict(spec.to_dict()) == spec
