"""Where tweaks act (at what trains, per call), when (from the run's first step to its end), and that copies follow their run."""

import copy
import logging
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from zoo import LIBRARIES, OWN, ZOO, build, inputs, logits

from tost_plugins import Session
from tost_plugins.errors import Inapplicable, TostError
from tost_plugins.training.clock import Clock
from tost_plugins.training.params import clean_name
from tost_plugins.tweaks import TWEAKS
from tost_plugins.tweaks.ghost_skip import ghosts
from tost_plugins.tweaks.soft_activation import SoftActivation, soft

CHANGES = ("ghost_skip", "soft_activation")
TWEAKS_UNTIL = [{"kind": "ghost_skip", "until": "4ba"}, {"kind": "soft_activation", "until": "6ba"}]
RECIPE = {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": TWEAKS_UNTIL}
FIRST, MIDDLE = Clock(0, total_steps=100), Clock(2, total_steps=100)

every_change = pytest.mark.parametrize("kind", CHANGES)


def woken(net: nn.Module, kind: str, **more: Any) -> Any:
    tweak = TWEAKS[kind](**more)
    tweak.attach(net, 0)
    tweak.advance(net, FIRST)
    return tweak


@torch.no_grad()
def says(net: nn.Module, *x: Tensor) -> Tensor:
    """Logits in eval mode; the mode is put back."""
    mode = net.training
    out: Any = net.eval()(*x)
    net.train(mode)
    return out if isinstance(out, Tensor) else out.logits


def stepped(session: Session, net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    logits(net.train(), x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- when


@pytest.mark.parametrize("name", ZOO)
def test_weights_of_a_plain_network_are_evaluated_as_one(name: str) -> None:
    plain, net, x = build(name), build(name), inputs(name)
    for param in net.parameters():
        nn.init.zeros_(param)
    session = Session(net, RECIPE | {"mask": {"kind": "random", "sparsity": 0.0}}).attach()
    net.load_state_dict(plain.state_dict())
    assert torch.equal(says(net, x), says(plain, x)) and session.is_plain


@pytest.mark.parametrize("strict", [True, False])
def test_also_in_the_middle_of_a_run_until_its_next_step(strict: bool) -> None:
    net, x = build("functional"), inputs("functional")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    with Session(net, RECIPE).drive(optimizer, total_steps=10) as session:
        stepped(session, net, optimizer, x)
        assert not torch.equal(says(net, x), says(build("functional"), x))
        other = build("functional")
        session.mask.apply_(dict(other.named_parameters()))
        net.load_state_dict(other.state_dict(), strict=strict)
        assert torch.equal(says(net, x), says(other, x)) and session.is_plain
        stepped(session, net, optimizer, x)
        assert not session.is_plain and session.metrics()["tost/ghost_skip/alpha"] == 0.5
        for _ in range(3):
            stepped(session, net, optimizer, x)


def test_a_checkpoint_of_the_middle_is_evaluated_at_its_strengths() -> None:
    net, x = build("functional"), inputs("functional")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    session = Session(net, RECIPE).attach()
    session.start(optimizer, total_steps=10)
    session.before_step(), session.after_step()
    other = build("functional")
    Session(other, RECIPE).attach()
    other.load_state_dict(net.state_dict())
    assert torch.equal(says(other, x), says(net, x)) and not torch.equal(says(other, x), says(build("functional"), x))
    other.load_state_dict(build("functional").state_dict())  # and then a plain one
    assert torch.equal(says(other, x), says(build("functional"), x))


# ---- copies


def average(kind: str) -> Callable[[nn.Module], Any]:
    if kind == "timm":
        return lambda net: pytest.importorskip("timm.utils").ModelEmaV2(net, decay=0.9)
    buffers = {"use_buffers": True, "multi_avg_fn": get_ema_multi_avg_fn(0.9)} if kind == "ema with buffers" else {}
    return lambda net: AveragedModel(net, **buffers)


@pytest.mark.parametrize("kind", ["timm", "ema with buffers", "equal"])
def test_an_average_is_as_strong_as_its_run_is_now(kind: str) -> None:
    net, x = build("functional"), inputs("functional")
    session, optimizer = Session(net, RECIPE).attach(), torch.optim.SGD(net.parameters(), lr=0.05)
    averaged = average(kind)(net)
    with session.drive(optimizer, total_steps=10):
        for step in range(1, 9):
            stepped(session, net, optimizer, x)
            averaged.update(net) if kind == "timm" else averaged.update_parameters(net)
            twin = copy.deepcopy(net)  # the run's strengths now, with the average's weights and statistics
            state = averaged.module.state_dict()
            with torch.no_grad():
                for name, value in twin.state_dict().items():
                    if "tost_" not in name and not name.endswith(("alpha", "_mask")):
                        value.copy_(state[name])
            assert torch.equal(says(averaged.module, x), says(twin, x)), step
    session.mask.apply_(
        dict(averaged.module.named_parameters())
    )  # an average from before the mask still has all weights
    assert torch.equal(says(averaged.module, x), says(session.plain(averaged.module), x))


@every_change
def test_a_copy_is_plain_when_its_run_is_over(kind: str) -> None:
    net, x = build("functional"), inputs("functional")
    tweak = woken(net, kind)
    twin = copy.deepcopy(net)
    assert torch.equal(says(twin, x), says(net, x))
    tweak.detach(net)
    assert torch.equal(says(twin, x), says(net, x))


@every_change
def test_who_trains_a_copy_gives_it_strengths_of_its_own(kind: str) -> None:
    net, x = build("functional"), inputs("functional")
    tweak = woken(net, kind, until="10ba")
    first, twin = says(net, x), copy.deepcopy(net)
    tweak.attach(twin, 0)  # a second time is no time
    tweak.advance(twin, Clock(10))
    assert torch.equal(says(net, x), first) and torch.equal(says(twin, x), says(build("functional"), x))
    tweak.advance(twin, Clock(0))
    tweak.advance(net, Clock(10))
    assert torch.equal(says(twin, x), first) and torch.equal(says(net, x), says(build("functional"), x))


def test_a_copy_of_an_attached_model_can_be_trained_by_a_session_of_its_own() -> None:
    x, ends = inputs("functional"), []
    for copied in (False, True):
        net = build("functional")
        if copied:
            session = Session(net, RECIPE).attach()
            net = copy.deepcopy(net)
            session.finish()
        keys = list(build("functional").state_dict())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        with Session(net, RECIPE).drive(optimizer, total_steps=10) as session:
            for _ in range(8):
                stepped(session, net, optimizer, x)
        assert list(net.state_dict()) == keys and session.mask.sparsity == pytest.approx(0.5, abs=0.01)
        assert not hasattr(net, "_ddp_params_and_buffers_to_ignore")
        ends.append(says(net, x))
    assert torch.equal(ends[0], ends[1])


@pytest.mark.parametrize("name", ["functional", "plain", "separate_lists"])
def test_networks_of_torch_fx_can_be_copied_and_pickled(name: str) -> None:
    net, x = torch.fx.symbolic_trace(build(name)), inputs(name)
    tweaks = [woken(net, kind) for kind in CHANGES]
    assert len(ghosts(net)) == ZOO[name].spatial
    for twin in (copy.deepcopy(net), copy.deepcopy(copy.deepcopy(net)), pickle.loads(pickle.dumps(net))):
        assert list(twin.state_dict()) == list(net.state_dict()) and torch.equal(says(twin, x), says(net, x))
        for tweak in tweaks:
            tweak.detach(twin)
        assert torch.equal(says(twin, x), says(build(name), x))


# ---- where: pairs


class Siamese(nn.Module):
    """Two images, and each layer is called with both before the next one is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        nn.init.uniform_(self.norm.running_mean), nn.init.uniform_(self.norm.running_var, 0.5, 1.5)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.conv(F.relu(self.stem(a))), self.conv(F.relu(self.stem(b)))
        return self.norm(a).mean((2, 3)) - 2 * self.norm(b).mean((2, 3))


class Interleaved(nn.Module):
    """The same with one input, so that the trial run finds the pair."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Siamese()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, x.flip(-1) + 1)


def test_two_streams_through_one_layer_keep_their_inputs_apart() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    net = Siamese()
    woken(net, "ghost_skip")
    assert hasattr(net.conv, "ghost_skip")  # nobody could run it: beside the convolution
    x, other = torch.randn(2, 3, 8, 8), Interleaved()
    woken(other, "ghost_skip")
    assert hasattr(other.net.norm, "ghost_skip")

    def alone(net: Siamese, x: Tensor) -> Tensor:
        return net.norm(net.conv(F.relu(net.stem(x)))).mean((2, 3))

    for whole, parts, found in ((net, (a, b), net.eval()(a, b)), (other.net, (x, x.flip(-1) + 1), other.eval()(x))):
        torch.testing.assert_close(found, alone(whole, parts[0]) - 2 * alone(whole, parts[1]))


class Permuted(nn.Module):
    """A LayerNorm reads the convolution's output with its channels last; `norm` may turn them over itself."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 2)
        self.norm, self.inside = TurningNorm(6) if inside else nn.LayerNorm(6), inside

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(self.stem(x))
        return self.fc(self.norm(out if self.inside else out.permute(0, 2, 3, 1)).mean((1, 2)))


class TurningNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1))


class Fixed(nn.Module):
    """For images of 11 x 11 alone; declared in another order than called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm2, self.norm1 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6 * 49, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))).flatten(1))


class Locked(Fixed):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("make", "at"),
    [
        (lambda: Permuted(False), "conv"), (lambda: Permuted(True), "conv"), (Fixed, "norm2"), (Locked, "conv2"),
    ],
    ids=["permuted", "turned inside", "fixed size", "locked"],
)  # fmt: skip
def test_a_ghost_stands_behind_a_norm_only_where_that_is_seen(make: Callable[[], nn.Module], at: str) -> None:
    torch.manual_seed(0)
    net, x = make(), torch.randn(4, 3, 11, 11)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with Session(net, RECIPE | {"tweaks": ["ghost_skip"]}).drive(optimizer, total_steps=50) as session:
        assert [path for path, module in net.named_modules() if hasattr(module, "ghost_skip")] == [at]
        for _ in range(3):
            stepped(session, net, optimizer, torch.randn(4, 3, 11, 11))
            net.eval()(torch.randn(1, 3, 11, 11))
            assert torch.equal(says(net, x), says(net, x))


def test_a_norm_that_never_comes_leaves_no_batches_behind() -> None:
    net = build("functional")
    woken(net, "ghost_skip")
    for _ in range(100):
        net.block1.conv1(torch.randn(1, 6, 4, 4))
    assert len(net.block1.conv1.tost_holder.calls) < 20
    x = inputs("functional")
    twin = copy.deepcopy(net)
    assert torch.equal(says(twin, x), says(net, x))


# ---- where: what trains


class Distilled(nn.Module):
    """A student, and a frozen teacher of the same kind inside the model."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.student, self.teacher = build(name), build(name).requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return logits(self.student, x), logits(self.teacher.eval(), x)


@every_change
@pytest.mark.parametrize("how", ["frozen", "ignored", "frozen, two inputs"])
@pytest.mark.parametrize("name", ["functional", "plain", "separate_lists", "timm/fused", "torchvision/resnet18"])
def test_parts_that_do_not_train_are_left_alone(name: str, how: str, kind: str, caplog: Any) -> None:
    net, x = Distilled(name), inputs(name)
    if how == "frozen, two inputs":
        net.forward = lambda x, y: (logits(net.student, x), logits(net.teacher.eval(), y))  # type: ignore[method-assign]
    if how == "ignored":
        net.teacher.requires_grad_()
    args = (x, x) if "two" in how else (x,)
    plain = net.eval()(*args)
    tweak = TWEAKS[kind]()
    with caplog.at_level(logging.INFO, "tost_plugins"):
        tweak.attach(net, 0, ("teacher.*",) if how == "ignored" else ())
    (line,) = [message for message in caplog.messages if "left alone" in message]
    assert f"{kind}: left alone are teacher" in line and ("(ignored)" if how == "ignored" else "(not trained)") in line
    tweak.advance(net, FIRST)
    found = net(*args)
    assert torch.equal(found[1], plain[1]) and not torch.equal(found[0], plain[0])
    assert not any("ghost_skip" in path for path, _ in net.teacher.named_parameters())
    tweak.detach(net)
    assert type(net.teacher) is type(build(name)) and torch.equal(net(*args)[0], plain[0])


@every_change
@pytest.mark.parametrize("name", [*LIBRARIES, *OWN])
def test_features_of_a_frozen_backbone_stay(name: str, kind: str) -> None:
    net = build(name).requires_grad_(False)
    whole = nn.Sequential(net, nn.Linear(4, 4)) if "transformers" not in name else net
    if whole is net:
        net.classifier[1].requires_grad_()
    try:
        woken(whole, kind)
    except Inapplicable as reason:
        assert "expected layers that train, got only" in str(reason) or "nn.ReLU" in str(reason)
    else:
        raise AssertionError("there is nothing that trains")


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("ghost_skip", "a spatial convolution"),
        ("soft_activation", "a ReLU"),
        ("neuron_gradients", "a layer with a mask"),
    ],
)
def test_globs_that_match_nothing_beside_others_are_named(kind: str, what: str, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "tost_plugins"):
        TWEAKS[kind](layers=("*", "nowhere.*", "layer9")).attach(build("plain"), 0)
        TWEAKS[kind](layers=("*",)).attach(build("plain"), 0)
    (line,) = [message for message in caplog.messages if "match nothing" in message]
    assert line.startswith(f"{kind}.layers: 'nowhere.*', 'layer9' match nothing; {what}")


@pytest.mark.parametrize("traced", [True, False])
def test_layers_choose_the_activations(traced: bool) -> None:
    net = build("functional")
    plain = [net.block1(torch.ones(1, 6, 4, 4)).detach(), net.block2(torch.ones(1, 6, 4, 4)).detach()]
    if not traced:
        net.lock = threading.Lock()
    SoftActivation(layers=("block1",)).attach(net, 0)
    SoftActivation().advance(net, FIRST)
    assert not torch.equal(net.block1(torch.ones(1, 6, 4, 4)), plain[0])
    assert torch.equal(net.block2(torch.ones(1, 6, 4, 4)), plain[1])
    with pytest.raises(TostError, match=r"soft_activation.layers: expected globs that match a ReLU .* there are"):
        SoftActivation(layers=("x.*",)).attach(build("functional"), 0)


class Made(nn.Module):
    """A convolution whose weight is made from others, behind a stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.stem(x)).mean((2, 3))


def test_a_ghost_joins_the_group_of_what_its_convolution_is_made_from() -> None:
    net = Made()
    tweak = woken(net, "ghost_skip")
    beside = {id(param) for _, param in tweak.companions(net)}
    assert beside == {id(net.conv.parametrizations.weight.original1)}


# ---- in place


class InPlace(nn.Module):
    """What the relu writes into its input is what goes on."""

    def __init__(self, relu: Callable[..., Any], used: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)
        self.relu, self.used = relu, used

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        out = self.relu(x)
        return (self.second(x) + out if self.used else self.second(x)).mean((2, 3))


RELUS: dict[str, Callable[[], Any]] = {
    "F.relu": lambda: _in_place, "positional": lambda: lambda x: F.relu(x, True), "F.relu_": lambda: F.relu_,
    "torch.relu_": lambda: torch.relu_, "x.relu_": lambda: lambda x: x.relu_(), "relu6": lambda: lambda x: F.relu6(x, True),
    "nn.ReLU": lambda: nn.ReLU(inplace=True), "nn.ReLU6": lambda: nn.ReLU6(inplace=True),
}  # fmt: skip


def _in_place(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)


@pytest.mark.parametrize("used", [True, False], ids=["beside the result", "alone"])
@pytest.mark.parametrize("relu", RELUS)
def test_a_relu_in_place_keeps_its_side_effect(relu: str, used: bool) -> None:
    x, found = torch.randn(4, 3, 8, 8), []
    for beta in (None, 1e4, 1.0):
        net = InPlace(RELUS[relu](), used)
        if beta is not None:
            woken(net, "soft_activation", beta=(beta, beta), until="99ba")
        out = net.train()(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), list(net.parameters()))])
    for plain, sharp, smooth in zip(*found, strict=True):
        torch.testing.assert_close(sharp, plain, rtol=1e-2, atol=1e-2)
        assert plain.abs().max() < 1e-5 or not torch.allclose(smooth, plain, rtol=1e-2)


@pytest.mark.parametrize("shape", ["pswish", "swish", "mish"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_in_place_has_the_values_and_gradients_of_out_of_place(shape: Any, dtype: torch.dtype) -> None:
    found = []
    for inplace in (False, True):
        x = torch.linspace(-3, 8, 50, dtype=dtype).requires_grad_()
        y = x * 1
        out = soft(y, torch.tensor(3.0), shape, 6.0, inplace)
        assert (out.data_ptr() == y.data_ptr()) == inplace
        found.append((out.detach(), torch.autograd.grad(out.sum(), x)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- networks that nobody can run, and functions that run twice


class Two(nn.Module):
    """Of two inputs, with one activation."""

    def __init__(self, activation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.activation = nn.Linear(3, 3), nn.Linear(3, 2), activation

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.second(self.activated(self.first(x) + time[:, None]))

    def activated(self, x: Tensor) -> Tensor:
        return self.activation(x)


class Inside(Two):
    def activated(self, x: Tensor) -> Tensor:
        return beside_the_class(x)


def beside_the_class(x: Tensor) -> Tensor:
    return torch.relu(x)


@pytest.mark.parametrize("make", [lambda: Two(F.gelu), lambda: Two(torch.tanh), lambda: Two(nn.SiLU())])
def test_a_network_that_cannot_be_run_and_has_no_relu_has_nothing_to_soften(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(Inapplicable, match=r"soft_activation: expected nn.ReLU, nn.ReLU6 or F.relu, got none in Two"):
        SoftActivation().attach(make(), 0)


@pytest.mark.parametrize("make", [lambda: Two(F.relu), lambda: Inside(F.gelu), lambda: Two(nn.ReLU())])
def test_the_relus_of_a_network_that_cannot_be_run_are_softened(make: Callable[[], nn.Module]) -> None:
    net, x, time = make(), torch.randn(5, 3), torch.randn(5)
    plain = net(x, time)
    woken(net, "soft_activation")
    assert not torch.allclose(net(x, time), plain)


class Recomputed(nn.Module):
    """A function of its own, not a module, runs under checkpoint."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third, self.reentrant = (
            nn.Linear(4, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 2),
            reentrant,
        )

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = self.middle(x) if self.reentrant is None else checkpoint(self.middle, x, use_reentrant=self.reentrant)
        return self.third(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_through_a_checkpointed_function_are_those_of_its_forward(reentrant: bool, caplog: Any) -> None:
    net, x = Recomputed(reentrant).train().double(), torch.randn(6, 4).double()
    woken(net, "soft_activation")
    weight = net.second.weight
    with caplog.at_level(logging.INFO, "tost_plugins"):
        for _ in range(2):
            net(x).square().sum().backward()
    assert sum("under torch.utils.checkpoint stays relu" in message for message in caplog.messages) == 1
    found, step = weight.grad[2, 3] / 2, 1e-6
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[2, 3] += sign * step
        losses.append(net(x).square().sum().item())
        with torch.no_grad():
            weight[2, 3] -= sign * step
    assert found.item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    "make", [Interleaved, lambda: Distilled("functional")], ids=["two streams", "a teacher inside"]
)
def test_one_graph_for_each_phase_under_compile(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    net, x, graphs = make(), torch.randn(2, 3, 8, 8), []
    tweaks = [TWEAKS["ghost_skip"](until="2ba"), TWEAKS["soft_activation"](until="4ba")]
    for tweak in tweaks:
        tweak.attach(net, 0)

    def counted(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(net, backend=counted, fullgraph=True)
    for step in range(6):
        for tweak in tweaks:
            tweak.advance(net, Clock(step))
        wanted = copy.deepcopy(net)(x)
        for found, own in zip(compiled(x), wanted, strict=True):
            torch.testing.assert_close(found, own)
    assert len(graphs) == 3
    torch._dynamo.reset()


class Body(nn.Module):
    """Convolutions with norms behind them, a ReLU that is a module and one that is called, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(n, 4, 3, padding=1) for n in (1, 4, 4))
        self.norm1, self.norm2, self.relu = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.conv1(x)))
        return F.relu(self.conv3(self.norm2(self.conv2(x))))


def with_body(compiled: bool) -> nn.Module:
    torch.manual_seed(0)
    body = Body()
    around: Any = torch.compile(body, backend="eager") if compiled else body
    return nn.Sequential(around, nn.Flatten(), nn.Linear(256, 2))


@pytest.mark.parametrize("more", [{}, {"layers": ("0.conv2", "0.relu", "0")}], ids=["all", "by name"])
@pytest.mark.parametrize("ignore", [(), ("0.conv2",)], ids=["", "conv2 ignored"])
def test_a_compiled_part_is_treated_as_what_is_in_it(more: dict[str, Any], ignore: tuple[str, ...]) -> None:
    torch._dynamo.reset()
    found, outs, x = [], [], torch.randn(2, 1, 8, 8)
    for compiled in (False, True):
        net = with_body(compiled)
        for kind in CHANGES:
            try:
                tweak = TWEAKS[kind](**more)
                tweak.attach(net, 0, ignore)
            except (Inapplicable, TostError) as error:
                found.append(str(error))
            else:
                tweak.advance(net, FIRST)
        found.append(sorted(clean_name(name) for name in net.state_dict()))
        outs.append(net.eval()(x))
    half = len(found) // 2
    assert found[:half] == found[half:] and any("tost_beta" in name for name in found[-1])
    torch.testing.assert_close(*outs)
    torch._dynamo.reset()
