"""One of two ranks: trains with weights in parts (FSDP2), beside DDP where the two must agree; writes FOLDER/<rank>.pt.

All in float64: with gloo and float32, torch 2.7 adds the ranks' gradients up where it should average them.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from leave import leave
from moving_cases import MOVING, Digits, history
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tost_plugins import Session, TostError, TostHook
from tost_plugins.training.params import prunable

STEPS, MIDDLE, PLAIN = 8, 3, 7
RECIPE = {
    "mask": {"kind": "snip", "sparsity": 0.6},
    "tweaks": [
        {"kind": "ghost_skip", "until": "4ba"},
        {"kind": "soft_activation", "until": "6ba"},
        {"kind": "rescaled_init", "iterations": 3},
        {"kind": "label_smoothing"},
    ],
}
CPU = torch.device("cpu")
#: Whole tensors, for the state dict of the plain network's shape.
FULL = states.StateDictOptions(full_state_dict=True)
Look = Callable[["Run", int], None]


class Net(nn.Module):
    """Two blocks that are sharded by themselves, a functional relu and a head; 7 channels do not divide by 2."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(6, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7))
        self.head = nn.Linear(7, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.block(self.stem(x))).mean((2, 3)))


def shard(net: nn.Module) -> nn.Module:
    """As users do: block by block, then the rest."""
    for block in net.children():
        if any(True for _ in block.parameters()) and not isinstance(block, nn.Linear):
            fully_shard(block)
    return fully_shard(net)


def batches() -> list[tuple[Tensor, Tensor]]:
    """This rank's own."""
    g = torch.Generator().manual_seed(dist.get_rank())
    return [(torch.randn(4, 3, 8, 8, generator=g).double(), torch.randint(5, (4,), generator=g)) for _ in range(STEPS)]


class Run:
    """A network, wrapped, and its session."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = shard, seed: int = 0, recipe: Any = RECIPE) -> None:
        self.net = Net(seed)
        self.session = Session(self.net, recipe).attach()
        self.wrapped = wrap(self.net)
        self.optimizer = torch.optim.SGD(self.wrapped.parameters(), lr=0.05, momentum=0.9)

    def train(self, look: Look = lambda run, step: None) -> "Run":
        """The steps from `first` on; `look` is called before each of them."""
        loss_fn = self.session.criterion(F.cross_entropy)
        with self.session.drive(self.optimizer, batches(), total_steps=STEPS):
            look(self, -1)
            for step, (x, y) in list(enumerate(batches()))[self.session.clock.step :]:
                look(self, step)
                self.optimizer.zero_grad()
                loss_fn(self.wrapped(x), y).backward()
                self.optimizer.step()
        return self

    def state(self) -> dict[str, Any]:
        """What torch.distributed.checkpoint is given."""
        model, optimizer = states.get_state_dict(self.net, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load(self, folder: Path) -> None:
        found = self.state()
        dcp.load(found, checkpoint_id=str(folder))
        states.set_state_dict(
            self.net, self.optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"]
        )


def whole(tensors: Any) -> dict[str, Tensor]:
    """Name -> all of the tensor."""
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors}


def outside(run: Run) -> float:
    """The largest weight or momentum outside the mask, on any rank."""
    sizes = []
    for name, param in prunable(run.net).items():
        momentum = run.optimizer.state[param]["momentum_buffer"]
        sizes += [float((t.detach().abs().full_tensor() * ~run.session.mask[name]).max()) for t in (param, momentum)]
    return max(sizes)


def error(call: Callable[[], Any]) -> str:
    """What it says."""
    try:
        call()
    except TostError as found:
        return str(found)
    return "no error"


def static(folder: Path) -> dict[str, Any]:
    """The whole story of one run in parts, and the same in whole weights."""
    plain, found = Run(DistributedDataParallel).train(), {"outside": [], "alphas": [], "placed": []}

    def look(run: Run, step: int) -> None:
        if step < 0:
            states.get_optimizer_state_dict(run.net, run.optimizer)  # a step that is none
            found["clock"] = run.session.clock.step
            return
        if step:
            found["outside"].append(outside(run))
        found["alphas"].append(run.session.metrics()["tost/ghost_skip/alpha"])
        kept = run.session.weights.kept
        found["placed"] += [
            mask.placements == param.placements
            for mask, param in zip(kept.values(), prunable(run.net).values(), strict=True)
        ]
        if step == MIDDLE:
            dcp.save(run.state(), checkpoint_id=str(folder / "middle"))
        if step == PLAIN:
            torch.save(states.get_model_state_dict(run.net, options=FULL), folder / f"plain.{dist.get_rank()}.pt")
        if step == PLAIN:
            found["before the last"] = whole(run.net.named_parameters())
        with torch.no_grad():  # evaluation leaves the head whole
            run.wrapped(batches()[0][0])
            found["whole head"] = not isinstance(run.net.head.weight, DTensor)
            run.session.report()

    run = Run().train(look)
    found |= {"mask": dict(run.session.mask), "plain mask": dict(plain.session.mask)}
    found |= {"weights": whole(run.net.named_parameters()), "plain weights": whole(plain.net.named_parameters())}
    found |= {"finished": states.get_model_state_dict(run.net, options=FULL)}
    found |= {"sharded still": isinstance(run.net, FSDPModule) and isinstance(run.net.block[1], nn.BatchNorm2d)}
    found |= {"report": str(run.session.report()), "plain report": str(plain.session.report())}
    return found


def resumed(folder: Path) -> dict[str, Tensor]:
    """The second half of the run, from a checkpoint that is loaded before `drive` or within it."""
    before = Run(seed=7)
    before.load(folder / "middle")
    within = Run(seed=8)

    def load(run: Run, step: int) -> None:
        if step < 0:
            run.load(folder / "middle")

    runs = {"before": before.train(), "within": within.train(load)}
    return {name: whole(run.net.named_parameters()) for name, run in runs.items()}


def moving() -> dict[str, Any]:
    """Masks that move now and then, over the ranks' halves of each batch."""
    found = {}
    for case in ("rigl", "set", "snfs", "gradual", "ac_dc"):
        net = Digits(norm=False).double()
        half: Any = lambda batch: [part.chunk(2)[dist.get_rank()] for part in batch]  # noqa: E731
        masks, weights = history(case, net, lambda net: fully_shard(net), half)
        found[case] = {"masks": [dict(mask) for mask in masks], "weights": whole(weights.items())}
    return found


def refused() -> dict[str, str]:
    """What cannot work, and what it says."""
    found = {case: error(Run(recipe={"mask": MOVING[case]}).train) for case in ("dnw", "top_kast", "edge_popup")}
    found["late"] = error(lambda: Session(shard(Net()), RECIPE).attach())
    early = Run(lambda net: net)
    shard(early.net)
    found["optimizer"] = error(early.train)
    for original in (True, False):
        wrap = functools.partial(FullyShardedDataParallel, use_orig_params=original, device_id=CPU)
        found[f"fsdp1 {original}"] = error(Run(wrap).train)
    found["fsdp1 late"] = error(lambda: Session(wrap(Net()), RECIPE).attach())

    def poison(run: Run, step: int) -> None:
        if step == 2 and dist.get_rank() == 1:
            run.net.head.weight.register_post_accumulate_grad_hook(
                lambda param: param.grad.to_local().fill_(float("nan"))
            )

    found["nan"] = error(lambda: Run().train(poison))
    return found


def accelerator(version: int) -> Accelerator:
    """Accelerate's FSDP. On a CPU it leaves the plugin aside and takes DDP: tell it what it would say of GPUs. All that
    follows, from `prepare` to `load_state`, is its own code."""
    AcceleratorState._reset_state(True)
    found = Accelerator(cpu=True)
    found.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, auto_wrap_policy="size_based_wrap", min_num_params=1
    )
    found.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return found


def accelerated(folder: Path, resume: bool) -> dict[str, Any]:
    """The run, or its second half, with TostHook; every layer, those of the ghosts too, is sharded by itself."""
    accelerate, net = accelerator(2), Net(seed=7 if resume else 0)
    tost = TostHook(RECIPE, accelerate)
    tost.attach(net)
    model, optimizer = accelerate.prepare(net, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9))
    if resume:
        accelerate.load_state(str(folder))
    tost.start(optimizer, batches(), total_steps=STEPS)
    loss_fn = tost.criterion(F.cross_entropy)
    for step, (x, y) in list(enumerate(batches()))[tost.session.clock.step :]:
        if step == MIDDLE and not resume:
            accelerate.save_state(str(folder))
        accelerate.backward(loss_fn(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():  # an evaluation leaves gathered weights in the layers
        model.eval()(batches()[0][0])
    tost.finish()
    found = {"mask": dict(tost.session.mask), "weights": whole(net.named_parameters())}
    return {**found, "sharded": isinstance(net, FSDPModule) and isinstance(net.head, FSDPModule)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {"static": static(folder), "resumed": resumed(folder), "moving": moving()}
    found["refused"] = refused()
    found["accelerate"] = [accelerated(folder / "state", resume) for resume in (False, True)]
    found["refused"]["accelerate fsdp1"] = error(lambda: TostHook(RECIPE, accelerator(1)))
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    leave()
