"""TostHook in real Accelerate loops: what it trains, logs and saves, that it leaves no trace, and what it refuses."""

import copy
import csv
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("accelerate")

from accelerate import Accelerator, DataLoaderConfiguration, DistributedType
from accelerate.data_loader import skip_first_batches
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import GeneralTracker, on_main_process

from tost_plugins import Mask, TostError, TostHook, masks
from tost_plugins.training.params import prunable

RANK = Path(__file__).resolve().parent.parent / "ranks" / "accelerate_ddp.py"
PER_EPOCH, STEPS = 4, 10
GHOSTS_END, SOFT_ENDS = 3, 6
RECIPE = {
    "name": "test",
    "mask": {"kind": "snip", "sparsity": 0.6, "batches": 2},
    "tweaks": [
        {"kind": "ghost_skip", "until": "0.3dur"},
        {"kind": "soft_activation", "until": "0.6dur"},
        {"kind": "rescaled_init", "iterations": 6},
        {"kind": "label_smoothing", "alpha": 0.2},
    ],
}
SEEDED = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=1)
Batches = list[list[Tensor]]


class Net(nn.Sequential):
    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip


class Functional(Net):
    """Its root's own forward calls relu, which is caught at the root."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(x))


class Notes(GeneralTracker):
    """A tracker that keeps what it is given."""

    name = "notes"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> Any:
        return self

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.rows.append((step, values))


@pytest.fixture(autouse=True)
def _no_state_of_other_tests() -> Iterator[None]:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def loader(shuffle: bool = True, **settings: Any) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(30, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(30) % 4), 8, shuffle=shuffle, **settings)


class Loop:
    """The loop of the documentation, in pieces; `step` counts optimizer steps."""

    def __init__(
        self, net: nn.Module | None = None, recipe: Any = RECIPE, accumulation: int = 1, total: int = STEPS,
        start: bool = True, **accelerator: Any,
    ) -> None:  # fmt: skip
        settings = {
            "cpu": True,
            "dataloader_config": SEEDED,
            "gradient_accumulation_steps": accumulation,
            **accelerator,
        }
        self.accelerator = Accelerator(**settings)
        self.net, self.total, self.accumulation = net or Net(), total, accumulation
        self.tost = TostHook(recipe, self.accelerator)
        self.tost.attach(self.net)
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(self.net, optimizer, loader())
        if start:
            self.start()

    def start(self) -> None:
        self.tost.start(self.optimizer, self.loader, total_steps=self.total)

    def run(self, step: int = 0, last: int | None = None, look: Callable[[int], None] = lambda step: None) -> None:
        loss_fn = self.tost.criterion(F.cross_entropy)
        self.model.train()
        while step < (last or self.total):
            epoch, done = divmod(step, -(-PER_EPOCH // self.accumulation))
            self.loader.set_epoch(epoch)
            batches = skip_first_batches(self.loader, done * self.accumulation) if done else self.loader
            for images, labels in batches:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(loss_fn(self.model(images), labels))
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 5.0)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    step += 1
                    look(step)
                    if step == (last or self.total):
                        return


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def differences(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    """Names of what is not bit for bit the same."""
    return [name for name in one.keys() | two.keys() if not torch.equal(one[name], two[name])]


def outside(model: nn.Module, mask: Mask) -> float:
    """The largest weight outside the mask."""
    return max(float((param.detach().abs() * ~mask[name]).max()) for name, param in prunable(model).items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], Mask]:
    """A whole run with saved states on the way."""
    folder = tmp_path_factory.mktemp("whole")
    loop = Loop()
    loop.run(look=lambda step: loop.accelerator.save_state(str(folder / str(step))) if step in (1, 3, 5, 8) else None)
    loop.tost.finish()
    return folder, weights(loop.net), loop.tost.session.mask


# ---- what it trains


@pytest.mark.parametrize("accumulation", [1, 3])
def test_masks_move_with_optimizer_steps(accumulation: int) -> None:
    rigl = {"kind": "rigl", "sparsity": 0.6, "every": "2ba", "until": "8ba", "drop": 0.6}
    loop, masks = Loop(recipe={"mask": rigl}, accumulation=accumulation), []
    loop.run(look=lambda step: masks.append(loop.tost.session.mask))
    assert [i for i in range(2, STEPS + 1) if masks[i - 1] != masks[i - 2]] == [3, 5, 7]
    loop.tost.finish()
    assert loop.tost.session.mask == masks[-1] and outside(loop.net, masks[-1]) == 0


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_documented_loop(accumulation: int) -> None:
    net, untouched = Net(), Net()
    parameters = dict(net.named_parameters())
    total = 8 if accumulation == 1 else 4
    loop = Loop(net, accumulation=accumulation, total=total)
    session, seen = loop.tost.session, []
    assert session.clock.steps_per_epoch == total // 2

    def look(step: int) -> None:
        assert outside(net, session.mask) == 0 and session.clock.step == step
        for name, param in prunable(net).items():
            assert not loop.optimizer.state[param]["momentum_buffer"][~session.mask[name]].any()
        metrics = session.metrics()
        seen.append((metrics["tost/ghost_skip/alpha"] > 0, metrics["tost/soft_activation/active"] > 0))

    loop.run(look=look)
    ends = round(0.3 * total), round(0.6 * total)
    assert seen == [(step < ends[0], step < ends[1]) for step in range(1, total + 1)]
    report = loop.tost.finish()
    assert abs(report.sparsity - 0.6) < 0.002 and report.ghost_parameters == 0
    assert outside(net, session.mask) == 0 and differences(weights(net), weights(untouched))
    assert list(net.state_dict()) == list(untouched.state_dict())
    assert [type(m) for m in net.modules()] == [type(m) for m in untouched.modules()]
    assert all(param is parameters[name] for name, param in net.named_parameters())
    assert {id(p) for group in loop.optimizer.param_groups for p in group["params"]} == set(
        map(id, parameters.values())
    )
    assert loop.accelerator.unwrap_model(loop.model) is net


def test_an_optimizer_made_before_attach() -> None:
    for given in (True, False):
        accelerator, net = Accelerator(cpu=True), Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        before = [id(param) for param in optimizer.param_groups[0]["params"]]
        tost = TostHook(RECIPE, accelerator)
        assert tost.attach(net, optimizer if given else None) is net
        assert (len(optimizer.param_groups[0]["params"]) > len(before)) is given
        _, prepared = accelerator.prepare(net, optimizer)
        tost.start(prepared, loader(), total_steps=5)
        assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in net.parameters()}
        tost.finish()
        assert [id(param) for param in optimizer.param_groups[0]["params"]] == before


@pytest.mark.parametrize("kind", [Net, Functional])
def test_a_finished_model_works_in_mixed_precision(kind: type[Net]) -> None:
    loop = Loop(kind(), total=3, mixed_precision="bf16")
    loop.run()
    loop.tost.finish()
    assert outside(loop.net, loop.tost.session.mask) == 0
    images = torch.randn(4, 3, 8, 8)
    plain = kind(1)
    plain.load_state_dict(loop.net.state_dict())
    loop.model.eval()
    found, bare = loop.model(images), copy.deepcopy(loop.accelerator.unwrap_model(loop.model, keep_fp32_wrapper=False))
    assert found.dtype == torch.float32 and torch.allclose(found, plain.eval()(images), atol=0.05)
    assert torch.equal(bare(images), plain(images)) and type(bare) is kind


def test_labels_are_smooth_in_training_only() -> None:
    loop = Loop()
    loss_fn = loop.tost.criterion(F.cross_entropy)
    logits, labels = torch.randn(5, 4), torch.arange(5) % 4
    loop.model.train()
    assert torch.allclose(loss_fn(logits, labels), F.cross_entropy(logits, labels, label_smoothing=0.2))
    loop.model.eval()
    assert torch.equal(loss_fn(logits, labels), F.cross_entropy(logits, labels))


def test_metrics_reach_the_trackers() -> None:
    notes = Notes()
    loop = Loop(total=5, log_with=notes)
    loop.accelerator.init_trackers("project")
    loop.run()
    assert [step for step, _ in notes.rows] == [1, 2, 3, 4, 5]
    assert [row["tost/ghost_skip/alpha"] > 0 for _, row in notes.rows] == [True, False, False, False, False]
    assert all(abs(row["tost/sparsity"] - 0.6) < 0.002 for _, row in notes.rows)


# ---- reading the loader leaves no trace


def first_epochs(accelerator: Accelerator, prepared: Any, count: int = 2) -> Batches:
    read = []
    for _ in range(count):
        for images, _ in prepared:
            with accelerator.accumulate():
                read.append((images, accelerator.sync_gradients, accelerator.gradient_state.end_of_dataloader))
    return read


@pytest.mark.parametrize("kind", ["snip", "grasp", "synflow"])
@pytest.mark.parametrize("sampler", ["seedable", "global", "generator"])
def test_scoring_does_not_move_the_loader(sampler: str, kind: str) -> None:
    def run(tost: bool) -> Batches:
        given = {"generator": torch.Generator().manual_seed(5)} if sampler == "generator" else {}
        config = DataLoaderConfiguration(use_seedable_sampler=sampler == "seedable")
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3, dataloader_config=config)
        net = Net()
        hook = TostHook(RECIPE, accelerator, mask={"kind": kind, "sparsity": 0.5})
        hook.attach(net) if tost else None
        _, optimizer, prepared = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1), loader(**given))
        torch.manual_seed(2)
        hook.start(optimizer, prepared, total_steps=4) if tost else None
        state = accelerator.gradient_state
        assert not state.in_dataloader and state.dataloader_references == [None] and prepared.iteration == 0
        return first_epochs(accelerator, prepared)

    for (one, *flags), (two, *same) in zip(run(False), run(True), strict=True):
        assert torch.equal(one, two) and flags == same


def test_finding_a_mask_within_a_loop_does_not_disturb_it() -> None:
    accelerator = Accelerator(cpu=True)
    prepared, net = accelerator.prepare(loader(shuffle=False)), Net()
    for number, (images, _) in enumerate(prepared):
        masks.find(net, "snip", 0.5, batches=prepared)
        assert accelerator.gradient_state.active_dataloader is prepared and prepared.iteration == 0
        assert torch.equal(images, loader().dataset.tensors[0][8 * number : 8 * number + 8])
    assert number == PER_EPOCH - 1 and prepared.iteration == 1 and not accelerator.gradient_state.in_dataloader


# ---- what it refuses


def test_what_comes_in_the_wrong_order_is_refused() -> None:
    accelerator, net = Accelerator(cpu=True), Net()
    tost = TostHook(RECIPE, accelerator)
    with pytest.raises(TostError, match=r"expected an attached model, got none; call attach\(model\) before prepare"):
        tost.start(torch.optim.SGD(net.parameters(), lr=0.1), loader(), total_steps=5)
    with pytest.raises(TostError, match="expected an attached model, got none"):
        tost.criterion(F.cross_entropy)
    before, keys = weights(net), list(net.state_dict())
    prepared, _ = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for model in (prepared, net):
        with pytest.raises(TostError, match=r"expected the model before accelerator\.prepare, got a prepared Net"):
            tost.attach(model)
    with pytest.raises(TostError, match="expected an attached model, got none"):
        _ = tost.session
    assert list(net.state_dict()) == keys and not differences(weights(net), before) and type(net) is Net


def test_a_hook_is_for_one_model_at_a_time() -> None:
    tost, model = TostHook(RECIPE, Accelerator(cpu=True)), Net()
    tost.attach(model)
    with pytest.raises(
        TostError, match=r"TostHook\.attach: expected the model that it has, got a second; make a TostHook"
    ):
        tost.attach(Net())
    assert tost.session.model is model
    with pytest.raises(TostError, match="attach: expected a model without a session, got one that is attached already"):
        TostHook(RECIPE, tost.accelerator).attach(model)


def test_what_is_no_accelerator_is_refused() -> None:
    with pytest.raises(TostError, match=r"expected an Accelerator, got None; write TostHook\(recipe, accelerator\)"):
        TostHook(RECIPE)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(DistributedType.DEEPSPEED, "DeepSpeed"), (DistributedType.MEGATRON_LM, "Megatron-LM")],
)
def test_engines_that_hold_the_weights_themselves_are_refused(kind: DistributedType, name: str) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = kind  # as after `accelerate launch`, which needs GPUs and the engine
    with pytest.raises(TostError, match=rf"TostHook: expected DDP or FSDP2, got {name}, .*; launch with `accelerate"):
        TostHook(RECIPE, accelerator)


def test_a_loss_that_nobody_smooths_is_refused() -> None:
    loop = Loop()
    before = weights(loop.net)
    for images, labels in loop.loader:
        loop.accelerator.backward(F.cross_entropy(loop.model(images), labels))
        with pytest.raises(TostError, match=r"make the training loss with tost\.criterion\(loss_fn\)"):
            loop.optimizer.step()
        break
    assert not [name for name in differences(weights(loop.net), before) if "running" not in name and "num_" not in name]


def test_an_unknown_length_is_refused() -> None:
    loop = Loop(start=False)
    with pytest.raises(TostError, match=r"ghost_skip\.until: time '0\.3dur': expected a run of known length"):
        loop.tost.start(loop.optimizer, loop.loader)


# ---- checkpoints


@pytest.mark.parametrize("loads", ["before start", "after start"])
@pytest.mark.parametrize("step", [1, GHOSTS_END, 5, 8])
def test_resuming_ends_where_the_whole_run_ended(
    whole: tuple[Path, dict[str, Tensor], Mask], step: int, loads: str
) -> None:
    folder, end, mask = whole
    loop = Loop(Net(seed=7), start=False)
    if loads == "after start":
        loop.start()
    loop.accelerator.load_state(str(folder / str(step)))
    if loads == "before start":
        loop.start()
    assert loop.tost.session.clock.step == step and loop.tost.session.clock.total_steps == STEPS
    loop.run(step)
    loop.tost.finish()
    assert not differences(weights(loop.net), end)
    assert not differences(dict(loop.tost.session.mask), dict(mask))


def test_going_back_within_a_run(whole: tuple[Path, dict[str, Tensor], Mask]) -> None:
    folder, end, _ = whole
    loop = Loop()
    loop.run()
    loop.accelerator.load_state(str(folder / "3"))
    loop.run(3)
    loop.tost.finish()
    assert not differences(weights(loop.net), end)


def test_the_best_state_is_one_of_the_plain_network(whole: tuple[Path, dict[str, Tensor], Mask]) -> None:
    folder, _, _ = whole
    loop = Loop()
    loop.run()
    loop.accelerator.load_state(str(folder / "3"))
    assert not loop.tost.session.is_plain
    keys = list(loop.net.state_dict())
    with pytest.raises(TostError, match=r"finish: expected a checkpoint from after .* have ended, got one of step 3"):
        loop.tost.finish()
    assert list(loop.net.state_dict()) == keys
    loop.accelerator.load_state(str(folder / "8"))
    assert loop.tost.session.is_plain
    best = {name: value for name, value in weights(loop.net).items() if name in dict(Net().named_parameters())}
    loop.tost.finish()
    assert all(torch.equal(value, weights(loop.net)[name]) for name, value in best.items())


def test_a_state_saved_before_the_first_step(tmp_path: Path, whole: tuple[Path, dict[str, Tensor], Mask]) -> None:
    one = Loop()
    one.accelerator.save_state(str(tmp_path))
    two = Loop(Net(seed=7), start=False)
    two.accelerator.load_state(str(tmp_path))
    two.start()
    two.run()
    two.tost.finish()
    assert not differences(weights(two.net), whole[1])


def test_states_of_another_recipe_are_refused(whole: tuple[Path, dict[str, Tensor], Mask]) -> None:
    other = {**RECIPE, "mask": {"kind": "snip", "sparsity": 0.5}}
    with pytest.raises(TostError, match="expected a checkpoint of the same mask"):
        Loop(recipe=other, start=False).accelerator.load_state(str(whole[0] / "3"))


def test_a_run_that_was_interrupted_and_freed_is_not_saved_with_the_next_one(tmp_path: Path) -> None:
    one = Loop()
    one.run(last=2)
    accelerator = one.accelerator
    one.model, one.optimizer, one.loader = accelerator.free_memory(one.model, one.optimizer, one.loader)
    net, tost = Net(), TostHook(RECIPE, accelerator)
    tost.attach(net)
    parts = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.05), loader())
    tost.start(parts[1], parts[2], total_steps=STEPS)
    accelerator.save_state(str(tmp_path))
    fresh = Loop(Net(seed=7), start=False)
    fresh.accelerator.load_state(str(tmp_path))  # Accelerate counts what is registered
    fresh.start()
    assert not differences(dict(fresh.tost.session.mask), dict(tost.session.mask))


# ---- several ranks


def test_two_ranks_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [
            *command,
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            str(RANK),
            str(tmp_path),
        ],
        env={**os.environ, "PYTHONPATH": str(RANK.parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for case in ("runs", "rigl", "dnw"):
        whole, resumed = first[case]
        for one, two in zip(first[case], second[case], strict=True):
            assert not differences(one["mask"], two["mask"]) and not differences(one["weights"], two["weights"])
            assert one["states"] == two["states"] and len(set(one["states"])) == len(one["states"])
            assert one["alphas"] == two["alphas"] and one["plain"] and two["plain"]
        assert not differences(whole["weights"], resumed["weights"]) and whole["states"][3:] == resumed["states"]
    for measure in (
        "in_degree",
        "activation_sparsity",
    ):  # by rank 0, in the whole run, in the resumed one up to its end
        with (tmp_path / "watch" / f"{measure}.csv").open(newline="") as file:
            assert sorted({int(row["step"]) for row in csv.DictReader(file)}) == [0, 3, 6, 7]
    for found in (first, second):
        assert torch.equal(found["untouched"], found["read"])
        assert found["runs"][0]["sent"] == found["sent"] and sum(found["sent"].values()) >= 3
    assert not torch.equal(first["read"], second["read"])
    rigl, dnw = ([Mask(mask) for mask in first[kind][0]["masks"]] for kind in ("rigl", "dnw"))
    assert [step for step in range(2, 8) if rigl[step - 1] != rigl[step - 2]] == [3, 5] and dnw[0] != dnw[-1]
