"""What people put around a step, in every trainer: clipping, micro-batches, loss scaling, compilation, averaging."""

from typing import Any

import pytest
import torch
from moving_cases import STEPS, Digits
from step_cases import SIZE, TRAINERS, Around, train
from torch import Tensor

from tost_plugins import Mask, Session, TostError
from tost_plugins.training.params import prunable

RANDOM = {"kind": "random", "sparsity": 0.6, "allocation": "uniform"}
RIGL = {"kind": "rigl", "sparsity": 0.6, "every": "2ba", "until": "8ba", "drop": 0.6}
DNW = {"kind": "dnw", "sparsity": 0.6}
TWEAKS = [
    {"kind": "ghost_skip", "until": "4ba"},
    {"kind": "soft_activation", "until": "7ba"},
    {"kind": "label_smoothing"},
]
CASES = {
    "static": {"mask": RANDOM},
    "tweaks": {"mask": RANDOM, "tweaks": TWEAKS},
    "rigl": {"mask": RIGL, "tweaks": TWEAKS},
    "dnw": {"mask": DNW, "tweaks": TWEAKS},
    "edge_popup": {"mask": {"kind": "edge_popup", "sparsity": 0.6}, "tweaks": TWEAKS},
}
CLIP = 0.5


def weights(session: Session) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in session.model.state_dict().items()}


def differences(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    """Names of what is not bit for bit the same."""
    return [name for name in one.keys() | two.keys() if name not in one or not torch.equal(one[name], two[name])]


def plain_names(session: Session) -> dict[str, Tensor]:
    """The weights under the network's own names: adapters wrap it."""
    return {name.removeprefix("module.").removeprefix("module."): value for name, value in weights(session).items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("trainer", TRAINERS[1:])
def test_clipped_runs_are_the_plain_loops(trainer: str, case: str) -> None:
    found: list[tuple[list[Mask], dict[str, Tensor]]] = []
    for which in ("torch", trainer):
        masks: list[Mask] = []
        around = Around(CASES[case], clip=CLIP, look=lambda step, session, masks=masks: masks.append(session.mask))
        session = train(which, around)
        found.append((masks, plain_names(session)))
    assert len(found[0][0]) == STEPS and found[0][0] == found[1][0]
    assert not differences(found[0][1], found[1][1])


# ---- micro-batches


@pytest.mark.parametrize("case", ["tweaks", pytest.param("rigl", marks=pytest.mark.long), "dnw", "edge_popup"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_micro_batches_are_the_whole_batch(trainer: str, case: str) -> None:
    """In float64 and without norms: the same masks, schedules of steps, and weights but for the last digits."""
    recipe = {**CASES[case], "tweaks": [*TWEAKS[1:]]}
    found = []
    for parts in (1, 4):
        seen: list[tuple[int, float, Mask]] = []

        def look(step: int, session: Session, seen: list[Any] = seen) -> None:
            assert session.clock.step == step or session.state == "finished"
            seen.append((step, session.metrics().get("tost/soft_activation/beta", 0.0), session.mask))

        net = Digits(norm=False).double()
        train(trainer, Around(recipe, parts=parts, clip=CLIP, dtype=torch.float64, look=look), net)
        found.append((seen, {name: value.clone() for name, value in net.state_dict().items()}))
    assert [step for step, *_ in found[0][0]] == list(range(1, STEPS + 1)) and found[0][0] == found[1][0]
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value)  # 1e-7 of it


# ---- loss scaling


OVERFLOWS = (2, 5)  # at 2, RigL would move its mask


@pytest.mark.parametrize("clip", [pytest.param(0.0, marks=pytest.mark.long), CLIP], ids=["whole", "clipped"])
@pytest.mark.parametrize("case", [pytest.param("tweaks", marks=pytest.mark.long), "rigl", "dnw", "edge_popup"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_step_that_a_scaler_skips_changes_nothing(trainer: str, case: str, clip: float) -> None:
    """Composer and the Trainer count it, and leave a move of the mask out; in loops it is as if it had not been."""
    seen: list[tuple[int, Mask, dict[str, Tensor]]] = []

    def look(step: int, session: Session) -> None:
        params = prunable(session.model)
        assert not any(bool(param.detach()[~session.mask[name]].any()) for name, param in params.items())
        seen.append((session.clock.step, session.mask, {name: p.detach().clone() for name, p in params.items()}))

    around = Around(CASES[case], clip=clip, scaled=True, overflows=OVERFLOWS, look=look)
    session = train(trainer, around, Digits(norm=False))
    assert len(seen) == STEPS and session.state == "finished"
    counts = trainer in ("composer", "transformers", "lightning")
    steps = [i + 1 if counts else i + 1 - sum(at <= i for at in OVERFLOWS) for i in range(STEPS)]
    assert [step for step, *_ in seen] == steps
    for i in OVERFLOWS:
        assert seen[i][1] == seen[i - 1][1]
        assert all(torch.equal(value, seen[i - 1][2][name]) for name, value in seen[i][2].items())
    moved = [i for i in range(1, STEPS) if seen[i][1] != seen[i - 1][1]]
    if case == "rigl":
        assert moved == ([4, 6] if counts else [3, 6, 8])
    if not counts:  # the same steps without those that are skipped
        plain = train("torch", Around(CASES[case], clip=clip, scaled=True, left_out=OVERFLOWS), Digits(norm=False))
        assert not differences(plain_names(plain), plain_names(session))


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["tweaks", "dnw"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_float16_on_a_gpu_skips_steps_whole(trainer: str, case: str) -> None:
    """As above with each framework's own scaler, whose first steps may overflow as well."""
    seen: list[tuple[int, Mask, list[Tensor]]] = []

    def look(step: int, session: Session) -> None:
        params = prunable(session.model)
        for name, param in params.items():
            assert not param.detach().cpu()[~session.mask[name].cpu()].any()
        seen.append((session.clock.step, session.mask, [param.detach().clone() for param in params.values()]))

    around = Around(CASES[case], clip=CLIP, scaled=True, gpu=True, overflows=OVERFLOWS, look=look)
    session = train(trainer, around, Digits(norm=False))
    assert len(seen) == STEPS and next(session.model.parameters()).is_cuda
    stood = [i for i in range(1, STEPS) if all(map(torch.equal, seen[i][2], seen[i - 1][2]))]
    assert set(OVERFLOWS) <= set(stood) and len(stood) < STEPS - 3
    assert all(seen[i][1] == seen[i - 1][1] for i in stood)
    counts = trainer in ("composer", "transformers", "lightning")
    assert all(seen[i][0] - seen[i - 1][0] == (1 if counts else i not in stood) for i in range(1, STEPS))


# ---- precision and compilation


@pytest.mark.parametrize("case", ["tweaks", pytest.param("dnw", marks=pytest.mark.long)])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_bfloat16_trains_the_same_network_everywhere(trainer: str, case: str) -> None:
    session = train(trainer, Around(CASES[case], bf16=True, clip=CLIP))
    plain = train("torch", Around(CASES[case], bf16=True, clip=CLIP))
    assert plain.mask == session.mask == Mask.from_zeros(prunable(session.model))
    assert not differences(plain_names(plain), plain_names(session))
    full = train("torch", Around(CASES[case], clip=CLIP))
    assert differences(plain_names(full), plain_names(session))  # so that bfloat16 it was
    assert {value.dtype for value in weights(session).values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("mask", [RIGL, pytest.param(DNW, marks=pytest.mark.long)], ids=lambda mask: mask["kind"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_whole_run_compiles_again_at_most_twice(trainer: str, mask: dict[str, Any]) -> None:
    """Once when the ghosts go dormant, and once when ReLU is back; never for the mask, nor for the clipping."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    graphs: list[int] = []

    def look(step: int, session: Session) -> None:
        graphs.append(counters["stats"]["unique_graphs"])

    recipe = {"mask": mask, "tweaks": [*TWEAKS, {"kind": "rescaled_init", "iterations": 2}]}
    session = train(trainer, Around(recipe, clip=CLIP, backend="eager", look=look))
    plain = train("torch", Around(recipe, clip=CLIP))
    torch._dynamo.reset()
    assert graphs[0] >= 1 and graphs[-1] - graphs[0] == 2, graphs
    assert session.mask == plain.mask
    for name, value in plain_names(plain).items():
        torch.testing.assert_close(plain_names(session)[name], value, rtol=1e-3, atol=1e-4)


# ---- batches that do not fit into memory


class Notes(list):
    """A kind of list of our own: what is put into a plain one while somebody only looks is taken out again."""


class TooLarge(Digits):
    """Runs out of memory on more than `most` samples from step `first` on, in the forward or the backward pass."""

    def __init__(self, most: int, first: int = 0, where: str = "forward") -> None:
        super().__init__(norm=False)
        self.most, self.first, self.where = most, first, where
        self.seen = Notes()
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.training and torch.is_grad_enabled() and len(x) > self.most and self.step >= self.first:
            self._fail() if self.where == "forward" else out.register_hook(lambda gradient: self._fail())
        return out

    def _fail(self) -> None:
        self.seen.append(self.step)
        raise RuntimeError("CUDA out of memory.")


@pytest.mark.parametrize("where", [pytest.param("forward", marks=pytest.mark.long), "backward"])
@pytest.mark.parametrize(("case", "first"), [("tweaks", 0), ("rigl", 2), ("dnw", 4)])
@pytest.mark.filterwarnings("ignore:CUDA out of memory or excessive")
def test_composers_smaller_micro_batches_repeat_nothing(case: str, first: int, where: str) -> None:
    """Step `first` (RigL would move its mask there) fails twice on its way; all is as with whole batches."""
    found = []
    for most in (SIZE, SIZE // 4):
        seen: list[tuple[int, Mask]] = []
        net = TooLarge(most, first, where).double()

        def look(step: int, session: Session, seen: list[Any] = seen, net: TooLarge = net) -> None:
            net.step = step
            seen.append((session.clock.step, session.mask))

        recipe = {**CASES[case], "tweaks": TWEAKS[1:]}
        train("composer", Around(recipe, clip=CLIP, dtype=torch.float64, automatic=True, look=look), net)
        found.append((seen, {name: value.clone() for name, value in net.state_dict().items()}))
    assert len(net.seen) == 2 and found[0][0] == found[1][0] and len(seen) == STEPS
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value)


@pytest.mark.parametrize(
    "kind", ["snip", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("random", "rigl", "dnw"))]
)
def test_the_trainers_smaller_batches_begin_as_if_nothing_had_been(kind: str) -> None:
    """`auto_find_batch_size`: memory runs out while SNIP is looked for, or in the first step."""
    mask = {"snip": {"kind": "snip", "sparsity": 0.6}, "random": RANDOM, "rigl": RIGL, "dnw": DNW}[kind]
    found = []
    for size in (SIZE, 6):
        seen: list[tuple[int, float, Mask]] = []
        net = TooLarge(6)

        def look(step: int, session: Session, seen: list[Any] = seen) -> None:
            seen.append((session.clock.step, session.metrics()["tost/ghost_skip/alpha"], session.mask))

        automatic = size == SIZE
        session = train("transformers", Around({"mask": mask, "tweaks": TWEAKS}, clip=CLIP, size=size,
                                               automatic=automatic, look=look), net)  # fmt: skip
        assert len(net.seen) == (2 if automatic else 0) and session.state == "finished"  # 8, then 7, then 6
        found.append((seen, weights(session)))
    assert found[0][0] == found[1][0] and [step for step, *_ in seen] == list(range(1, STEPS + 1))
    assert not differences(found[0][1], found[1][1])


# ---- averaged weights


@pytest.mark.parametrize("mask", [RANDOM, RIGL, DNW], ids=lambda mask: mask["kind"])
@pytest.mark.filterwarnings("ignore:SWA has known issues")
def test_composers_swa_ends_as_a_sparse_network(mask: dict[str, Any]) -> None:
    """The average of a mask that moves fits into no mask: it takes the one of the moment when training goes on with it."""
    pytest.importorskip("composer")
    from composer.algorithms import SWA

    swa, steps = SWA(swa_start="0.3dur", swa_end="0.8dur", update_interval="1ba"), []

    def look(step: int, session: Session) -> None:
        params = prunable(session.model)
        assert not any(bool(param.detach()[~session.mask[name]].any()) for name, param in params.items())
        steps.append((step, session.clock.step))

    around = Around({"mask": mask, "tweaks": TWEAKS}, look=look, algorithms=lambda tost: [tost, swa])
    session = train("composer", around)
    assert swa.swa_completed and steps == [(step, step) for step in range(1, STEPS + 1)]
    assert Mask.from_zeros(prunable(session.model)) == session.mask
    averaged = prunable(swa.swa_model.module)  # SWA's own copy
    kept = sum(int(param.count_nonzero()) for param in averaged.values()) / session.mask.size
    assert kept == pytest.approx(0.4, abs=1e-3) if mask is RANDOM else 0.4 < kept < 0.75


@pytest.mark.filterwarnings("ignore:SWA has known issues")
def test_averages_in_front_of_a_mask_that_hides_are_refused() -> None:
    pytest.importorskip("composer")
    from composer.algorithms import EMA, SWA

    for average in (EMA(half_life="2ba"), SWA(update_interval="1ba")):
        name = type(average).__name__
        message = (
            rf"mask dnw: expected to be in front of what averages the weights, got {name} in front, .*; write \[Tost"
        )
        with pytest.raises(TostError, match=message):
            train("composer", Around({"mask": DNW}, algorithms=lambda tost, average=average: [average, tost]))
