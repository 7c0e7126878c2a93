"""The laws of the tweaks, over every row of the registry and every network of the zoo; and each one's own numbers."""

import copy
import functools
import itertools
import logging
import math
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import OWN, ZOO, build, inputs, logits

from tost_plugins import Session
from tost_plugins.errors import Inapplicable, TostError
from tost_plugins.training.clock import Clock
from tost_plugins.tweaks import TWEAKS, Tweak
from tost_plugins.tweaks.ghost_skip import GhostSkip, ghosts
from tost_plugins.tweaks.soft_activation import SoftActivation, soft
from tost_plugins.tweaks.surgery.swap import restore, swap

SETTINGS: dict[str, dict[str, Any]] = {
    "ghost_skip": {"until": "0.3dur"},
    "soft_activation": {"until": "0.75dur"},
    "rescaled_init": {"iterations": 1},
    "multiplicative": {"warmup": "0ba"},
}
STRUCTURAL = ["ghost_skip", "soft_activation"]  # those which change the modules
AROUND_STEPS = ["neuron_gradients", "multiplicative"]  # those which act before or after the optimizer's step
LATE = Clock(step=100, total_steps=100)


def tweak_of(kind: str, **more: Any) -> Tweak:
    return TWEAKS[kind](**{**SETTINGS.get(kind, {}), **more})


def woken(tweak: Tweak, net: nn.Module) -> None:
    """Attached, and at work as in the first step."""
    tweak.attach(net, 0)
    tweak.advance(net, Clock(0, total_steps=100))


def types_of(net: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in net.named_modules()}


def ids_of(net: nn.Module) -> dict[str, int]:
    return {name: id(param) for name, param in net.named_parameters()}


def attributes_of(net: nn.Module) -> dict[str, set[str]]:
    return {name: set(module.__dict__) for name, module in net.named_modules()}


@torch.no_grad()
def answers(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Logits in eval mode, then those of a copy in train mode (dropout seeded) and its own BatchNorm buffers after it."""
    found = [logits(net.eval(), x)]
    twin = copy.deepcopy(net).train()
    torch.manual_seed(3)
    found.append(logits(twin, x))
    return found + [b for name, b in twin.named_buffers() if ".running_" in name and "ghost_skip" not in name]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


every_network = pytest.mark.parametrize("name", ZOO)
every_own_network = pytest.mark.parametrize("name", OWN)
every_tweak = pytest.mark.parametrize("kind", TWEAKS)
every_change = pytest.mark.parametrize("kind", STRUCTURAL)


# ---- the laws


@every_tweak
@every_network
def test_detach_gives_back_the_very_network(kind: str, name: str) -> None:
    net, x, tweak = build(name), inputs(name), tweak_of(kind)
    before = (types_of(net), list(net.state_dict()), ids_of(net), attributes_of(net))
    wanted = answers(net, x)
    generator = torch.get_rng_state()
    tweak.attach(net, 0)
    assert torch.equal(torch.get_rng_state(), generator)
    if kind in STRUCTURAL:
        assert types_of(net) != before[0]
    assert {n: p for n, p in ids_of(net).items() if "ghost_skip" not in n} == before[2]
    tweak.advance(net, Clock(step=3, total_steps=100))
    tweak.detach(net)
    assert (types_of(net), list(net.state_dict()), ids_of(net), attributes_of(net)) == before
    assert same(answers(net, x), wanted)


@every_change
@every_network
def test_quiet_and_strength_zero_are_the_untouched_forward_pass(kind: str, name: str) -> None:
    net, x, tweak = build(name), inputs(name), tweak_of(kind)
    wanted = answers(net, x)
    tweak.attach(net, 0)
    assert same(answers(net, x), wanted)
    tweak.advance(net, Clock(0, total_steps=100))
    changed = answers(net, x)
    assert not torch.equal(changed[0], wanted[0]) and not torch.equal(changed[1], wanted[1])
    with tweak.quiet(net):
        assert same(answers(net, x), wanted)
    assert same(answers(net, x), changed)
    tweak.advance(net, LATE)
    assert same(answers(net, x), wanted)
    with tweak.quiet(net):
        assert same(answers(net, x), wanted)
    assert same(answers(net, x), wanted)


@every_change
@every_network
def test_copies_and_pickles_are_complete(kind: str, name: str) -> None:
    net, x, tweak = build(name), inputs(name), tweak_of(kind)
    plain, keys = types_of(net), list(net.state_dict())
    tweak.attach(net, 0)
    tweak.advance(net, Clock(step=10, total_steps=100))
    wanted = answers(net, x)
    quiet = answers_in_quiet(tweak, net, x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert types_of(twin) == types_of(net) and list(twin.state_dict()) == list(net.state_dict())
        assert same(answers(twin, x), wanted)
        tweak_of(kind).detach(twin)
        assert types_of(twin) == plain and list(twin.state_dict()) == keys
        assert same(answers(twin, x), quiet)
    assert same(answers(net, x), wanted)


def answers_in_quiet(tweak: Tweak, net: nn.Module, x: Tensor) -> list[Tensor]:
    with tweak.quiet(net):
        return answers(net, x)


@every_change
@every_network
def test_autocast_gives_the_dtype_of_the_plain_network(kind: str, name: str) -> None:
    net, x, tweak = build(name).train(), inputs(name), tweak_of(kind)
    layers = [module for module in net.modules() if not list(module.children())]

    def dtypes() -> list[torch.dtype]:
        seen: list[torch.dtype] = []
        hooks = [layer.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype)) for layer in layers]
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            seen.append(logits(net, x).dtype)
        for hook in hooks:
            hook.remove()
        return seen

    wanted = dtypes()
    tweak.attach(net, 0)
    assert torch.bfloat16 in wanted and dtypes() == wanted


@every_change
@every_own_network
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_survives_a_change_of_dtype(kind: str, name: str, dtype: torch.dtype) -> None:
    x = inputs(name).to(dtype)
    before, after = build(name), build(name).to(dtype)
    tweak = tweak_of(kind)
    for net in (before, after):  # attached first and cast then, and the other way round
        tweak.attach(net, 0)
        tweak.advance(net, Clock(step=10, total_steps=100))
    before.to(dtype)
    outs = [logits(net.train(), x) for net in (before, after)]
    for net, out in zip((before, after), outs, strict=True):
        assert out.dtype == dtype and bool(out.isfinite().all())
        out.float().logsumexp(1).sum().backward()
        assert all(p.grad is not None and p.grad.dtype == dtype for p in net.parameters() if p.requires_grad)
        tweak.advance(net, Clock(step=20, total_steps=100))
        assert logits(net, x).dtype == dtype
        tweak.detach(net)
        assert types_of(net) == types_of(build(name))
    assert torch.allclose(*(out.double() for out in outs), atol=1e-12 if dtype == torch.float64 else 0.1)


@pytest.mark.parametrize("kind", AROUND_STEPS)
@every_own_network
def test_steps_keep_the_mask_and_leave_nothing_in_the_network(kind: str, name: str) -> None:
    found, x = [], inputs(name, 4)
    for tweaks in ([], [{"kind": kind, **SETTINGS.get(kind, {})}]):
        net = build(name).train()
        before = (types_of(net), list(net.state_dict()), ids_of(net), attributes_of(net))
        session = Session(net, {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": tweaks})
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        with session.drive(optimizer, total_steps=3):
            for _ in range(3):
                optimizer.zero_grad()
                logits(net, x).logsumexp(1).sum().backward()
                optimizer.step()
                assert session.is_plain
        params = {n: param.detach() for n, param in net.named_parameters()}
        assert all(bool(param.isfinite().all()) for param in params.values())
        assert not any(bool(params[n][~keep].any()) for n, keep in session.mask.items() if n in params)
        assert (types_of(net), list(net.state_dict()), ids_of(net), attributes_of(net)) == before
        found.append(params)
    assert any(not torch.equal(found[0][n], found[1][n]) for n in found[0])


@every_own_network
def test_order_of_attach_and_detach_is_irrelevant(name: str) -> None:
    x, plain = inputs(name), build(name)
    wanted = answers(plain, x)
    middle: list[Tensor] | None = None
    orders = [list(TWEAKS), list(reversed(TWEAKS))]
    for attach, detach in itertools.product(orders, orders):
        net, tweaks = build(name), {kind: tweak_of(kind) for kind in TWEAKS}
        for kind in attach:
            woken(tweaks[kind], net)
        found = answers(net, x)
        middle = middle or found
        assert same(found, middle), attach
        for kind in detach:
            tweaks[kind].detach(net)
        assert types_of(net) == types_of(plain) and list(net.state_dict()) == list(plain.state_dict())
        assert same(answers(net, x), wanted)


@every_change
@every_own_network
def test_gradients_are_the_same_under_gradient_checkpointing(kind: str, name: str) -> None:
    x = inputs(name, 4)
    grads = []
    for reentrant in (None, False, True):
        net, tweak = build(name).train(), tweak_of(kind)
        tweak.attach(net, 0)
        tweak.advance(net, Clock(step=10, total_steps=100))
        image = x.clone().requires_grad_()
        out = logits(net, image) if reentrant is None else checkpoint(net, image, use_reentrant=reentrant)
        out.square().sum().backward()
        grads.append([p.grad for p in net.parameters()] + [image.grad])
        copy.deepcopy(net)  # nothing of the graph may be left behind
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_checkpointing_blocks_of_a_library_network() -> None:
    pytest.importorskip("torchvision")
    grads = []
    for checkpointed in (False, True):
        net = build("torchvision/resnet18").train()
        for kind in STRUCTURAL:
            woken(tweak_of(kind), net)
        if checkpointed:
            for block in (net.layer1[0], net.layer2[0], net.layer4[1]):
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        logits(net, inputs("torchvision/resnet18", 4)).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class Checkpointed(nn.Module):
    """Its blocks, which call relu as a function, run again in the backward pass, when its own forward is over."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.net, self.reentrant = build("functional"), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.net.bn1(self.net.conv1(x)))
        for block in (self.net.block1, self.net.block2, self.net.block3):
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.net.fc(x.mean((2, 3)))


@every_change
def test_gradients_are_the_same_where_blocks_with_functional_relus_are_checkpointed(kind: str) -> None:
    grads = []
    for reentrant in (None, False, True):
        net, tweak = Checkpointed(reentrant).train(), tweak_of(kind)
        tweak.attach(net, 0)
        tweak.advance(net, Clock(step=10, total_steps=100))
        net(inputs("functional", 4).requires_grad_()).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_ghosts_refuse_threads_that_share_them() -> None:
    net = build("functional")
    GhostSkip().attach(net, 0)
    with pytest.raises(
        TostError, match=r"ghost_skip: expected one model per process, got nn.DataParallel, .*; start with"
    ):
        net.block1.conv1._replicate_for_data_parallel()(torch.zeros(1, 6, 8, 8))


def test_nothing_to_act_on_is_an_error_and_changes_nothing() -> None:
    no_conv = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.GELU(), nn.Linear(4, 2))
    only_stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 4, 1))
    cases = [
        ("ghost_skip", no_conv, "a convolution with a kernel above 1 besides the stem"),
        ("ghost_skip", only_stem, "a convolution with a kernel above 1 besides the stem"),
        ("soft_activation", no_conv, "nn.ReLU, nn.ReLU6 or F.relu"),
        ("soft_activation", only_stem, "nn.ReLU, nn.ReLU6 or F.relu"),
    ]
    for kind, net, what in cases:
        before = (types_of(net), list(net.state_dict()), attributes_of(net))
        with pytest.raises(Inapplicable, match=rf"^{kind}: expected {what}.* got none in Sequential; leave {kind} out"):
            tweak_of(kind).attach(net, 0)
        assert (types_of(net), list(net.state_dict()), attributes_of(net)) == before


def test_globs_that_match_no_spatial_convolution_are_an_error() -> None:
    net = build("plain")
    before = (types_of(net), list(net.state_dict()))
    with pytest.raises(
        TostError, match=r"ghost_skip.layers: expected globs .*got \['6', 'x.\*'\]; there are 2, 4"
    ) as error:
        GhostSkip(layers=("6", "x.*")).attach(net, 0)
    assert not isinstance(error.value, Inapplicable)  # `optional` does not cover a slip of the pen
    assert (types_of(net), list(net.state_dict())) == before


class Compiled:
    """A network under torch.compile that counts its graphs."""

    def __init__(self, net: nn.Module) -> None:
        torch._dynamo.reset()
        self.graphs = 0
        self.net = torch.compile(net, backend=self._compile, fullgraph=True)

    def _compile(self, graph: Any, example: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, example)


@pytest.mark.parametrize("name", ["functional", "plain", "depthwise", "timm/fused"])
def test_at_most_two_recompilations_over_a_whole_schedule(name: str) -> None:
    net, x = build(name).train(), inputs(name, 4)
    eager = build(name).train()
    tweaks = [tweak_of("ghost_skip", until="4ba"), tweak_of("soft_activation", until="6ba")]
    for tweak in tweaks:
        tweak.attach(net, 0)
        tweak.attach(eager, 0)
    compiled = Compiled(net)
    for step in range(8):
        for tweak in tweaks:
            tweak.advance(net, Clock(step))
            tweak.advance(eager, Clock(step))
        outs = []
        for run in (compiled.net, eager):
            run.zero_grad()
            torch.manual_seed(step)
            outs.append(logits(run, x))
            outs[-1].square().mean().backward()
        torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)
        for a, b in zip(net.parameters(), eager.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
    assert 1 <= compiled.graphs <= 3, compiled.graphs
    torch._dynamo.reset()


# ---- ghost_skip


@every_network
def test_a_ghost_beside_every_spatial_convolution_but_the_stem(name: str) -> None:
    net = build(name)
    convs = {n: m for n, m in net.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))}
    spatial = [conv for conv in convs.values() if max(conv.kernel_size) > 1]
    tweak = tweak_of("ghost_skip")
    woken(tweak, net)
    assert len(ghosts(net)) == ZOO[name].spatial
    beside = Counter(id(weight) for _, weight in tweak.companions(net))
    assert beside == Counter({id(conv.weight): 3 for conv in spatial[1:]})  # a 1x1 weight, the norm's gain and shift
    logits(net.train(), inputs(name)).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for ghost in ghosts(net) for p in ghost.parameters())
    assert all(bool(ghost.norm.bias.grad.any()) for ghost in ghosts(net))


@every_network
def test_each_ghost_changes_one_layer_and_the_other_layers_stay(name: str) -> None:
    """Every convolution and norm is given the input that it has in the plain network, and its output compared."""
    net, x = build(name).eval(), inputs(name)
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    layers = {path: module for path, module in net.named_modules() if isinstance(module, kinds)}
    plain: list[tuple[str, Tensor, Tensor]] = []
    for path, layer in layers.items():
        layer.register_forward_hook(lambda _m, args, out, path=path: plain.append((path, args[0].clone(), out.clone())))
    logits(net, x)
    for layer in layers.values():
        layer._forward_hooks.clear()
    woken(GhostSkip(), net)
    for ghost in ghosts(net):
        nn.init.constant_(ghost.norm.bias, 0.5)
    calls, changed = iter(plain), set()
    current: list[tuple[str, Tensor, Tensor]] = []

    def before(_m: nn.Module, args: Any) -> Any:
        current.append(next(calls))
        return (current[-1][1], *args[1:])

    def after(_m: nn.Module, args: Any, out: Tensor) -> Tensor:
        path, _, wanted = current.pop()
        if not torch.equal(out, wanted):
            changed.add(path)
        return wanted

    for layer in layers.values():
        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)
    with torch.no_grad():
        logits(net, x)
    assert len(changed) == ZOO[name].spatial
    convs = [path for path in layers if isinstance(layers[path], (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    spatial = [path for path in convs if max(layers[path].kernel_size) > 1]
    assert not changed & (set(convs) - set(spatial[1:]))


def test_a_convolution_with_a_norm_per_call_has_its_ghost_beside_itself() -> None:
    net, calls = build("shared").eval(), []
    woken(GhostSkip(), net)
    net.shared.register_forward_hook(lambda m, args, out: calls.append((args[0], out)))
    net.twice[1].register_forward_hook(lambda m, args, out: calls.append((args[0], out)))
    with torch.no_grad():
        logits(net, inputs("shared"))
    for x, out in calls[:2]:
        conv, ghost = net.shared, net.shared.ghost_skip
        plain = F.conv2d(x, conv.weight, conv.bias, padding=1)
        torch.testing.assert_close(out, plain + ghost.norm(ghost.conv(x)))
    # a norm of its own reads each call of the other one: there the ghost stands behind the norm, at both calls
    assert len(calls) == 4 and hasattr(net.twice[1], "ghost_skip") and not hasattr(net.twice[0], "ghost_skip")
    for x, out in calls[2:]:
        assert not torch.allclose(out, F.batch_norm(x, *(getattr(net.twice[1], key) for key in (
            "running_mean", "running_var", "weight", "bias"))))  # fmt: skip


def tiny(stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(),
        nn.Conv2d(2, 2, 3, stride, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU(),
    )  # fmt: skip


def batch_norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """BatchNorm in train mode, written out."""
    mean = x.mean((0, 2, 3), keepdim=True)
    var = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5) * gain.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


@pytest.mark.parametrize("stride", [1, 2])
def test_value_of_a_ghost_by_hand(stride: int) -> None:
    net, x = tiny(stride).train(), torch.randn(3, 1, 6, 6)
    tweak = tweak_of("ghost_skip")
    tweak.attach(net, 0)
    (ghost,) = ghosts(net)
    with torch.no_grad():
        ghost.norm.weight.copy_(torch.tensor([1.5, -0.5]))
        ghost.norm.bias.copy_(torch.tensor([0.25, 0.75]))
    assert ghost.conv.weight.shape == (2, 2, 1, 1) and ghost.conv.bias is None
    tweak.advance(net, Clock(step=9, total_steps=100))  # 0.3dur: 9 of 30 steps have passed
    h = torch.relu(batch_norm(F.conv2d(x, net[0].weight, net[0].bias, padding=1), net[1].weight, net[1].bias))
    trunk = batch_norm(F.conv2d(h, net[3].weight, None, stride, 1), net[4].weight, net[4].bias)
    mixed = torch.einsum("oc,nchw->nohw", ghost.conv.weight[:, :, 0, 0], h)[:, :, ::stride, ::stride]
    branch = batch_norm(mixed, ghost.norm.weight, ghost.norm.bias)
    torch.testing.assert_close(net(x), torch.relu(trunk + 0.7 * branch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("conv", "first", "last"),
    [
        (nn.Conv2d(1, 1, 3, padding=1), 0, 7),  # the centre of the kernel walks over every place
        (nn.Conv2d(1, 1, 3, stride=2, padding=1), 0, 6),
        (nn.Conv2d(1, 1, 5), 2, 5),
        (nn.Conv2d(1, 1, 5, stride=2), 2, 4),
        (nn.Conv2d(1, 1, 3, dilation=2), 2, 5),
        (nn.Conv2d(1, 1, 3, padding=2), -1, 8),
        (nn.Conv2d(1, 1, 2, stride=2), 0, 6),  # the nearest to the middle of an even kernel
        (nn.Conv2d(1, 1, 4, padding=1), 0, 6),
        (nn.Conv2d(1, 1, 3, padding="same"), 0, 7),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else f"k{value.kernel_size[0]}s{value.stride[0]}",
)
def test_the_branch_looks_where_the_kernel_has_its_centre(conv: nn.Module, first: int, last: int) -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 1), copy.deepcopy(conv)).eval()  # attached in eval mode: so is the ghost
    tweak = tweak_of("ghost_skip")
    woken(tweak, net)
    (ghost,) = ghosts(net)
    for weight in (net[0].weight, ghost.conv.weight):
        nn.init.ones_(weight)
    for zero in (net[0].bias, net[1].weight, net[1].bias):
        nn.init.zeros_(zero)
    places = (torch.arange(8.0) + 1).expand(1, 1, 8, 8)  # column i holds i + 1; the padding holds 0
    step = conv.stride[0]
    columns = range(first, last + 1, step)
    wanted = torch.tensor([float(i + 1) if 0 <= i < 8 else 0.0 for i in columns])
    out = net(places)
    row = out[0, 0, out.shape[2] // 2]
    torch.testing.assert_close(row, wanted / math.sqrt(1 + 1e-5))


def test_alpha_falls_linearly_to_zero_at_until_and_the_branch_lies_dormant() -> None:
    net, x, tweak = build("functional"), inputs("functional"), GhostSkip(until="4ba")
    tweak.attach(net, 0)
    seen = []
    for step in range(7):
        tweak.advance(net, Clock(step))
        (alpha,) = {float(ghost.alpha) for ghost in ghosts(net)}
        assert tweak.metrics(net) == {"tost/ghost_skip/alpha": alpha}
        seen.append(alpha)
        net.zero_grad()
        statistics = [ghost.norm.running_mean.clone() for ghost in ghosts(net)]
        logits(net.train(), x).square().sum().backward()
        runs = [not torch.equal(g.norm.running_mean, old) for g, old in zip(ghosts(net), statistics, strict=True)]
        assert set(runs) == {alpha > 0}
        assert {p.grad is not None for g in ghosts(net) for p in g.parameters()} == {alpha > 0}
    assert seen == [1, 0.75, 0.5, 0.25, 0, 0, 0]


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 1), ("linear", 0.5), ("cosine", 0.5), ("cubic", 0.125)])
def test_every_schedule_of_alpha_ends_at_zero(schedule: str, middle: float) -> None:
    net, tweak = build("plain"), GhostSkip(until="1dur", schedule=schedule)
    tweak.attach(net, 0)
    for step, wanted in ((0, 1), (5, middle), (10, 0), (11, 0)):
        tweak.advance(net, Clock(step, total_steps=10))
        assert [float(ghost.alpha) for ghost in ghosts(net)] == pytest.approx([wanted] * 2)


def test_alpha_can_go_back_as_after_loading_an_older_checkpoint() -> None:
    net, x, tweak = build("functional"), inputs("functional"), GhostSkip(until="4ba")
    woken(tweak, net.train())
    wanted = logits(net, x)
    for step in (2, 5, 0):
        tweak.advance(net, Clock(step))
    assert {float(ghost.alpha) for ghost in ghosts(net)} == {1.0}
    assert torch.equal(logits(net, x), wanted)


def test_layers_selects_by_globs() -> None:
    net, tweak = build("functional"), GhostSkip(layers=("block1.*", "*.conv2"))
    tweak.attach(net, 0)
    names = {id(param): name for name, param in net.named_parameters()}
    assert {names[id(weight)] for _, weight in tweak.companions(net)} == {
        f"block{i}.{conv}.weight" for i, conv in ((1, "conv1"), (1, "conv2"), (2, "conv2"), (3, "conv2"))
    }


def test_initial_values_come_from_the_seed_alone() -> None:
    found = []
    for seed, noise in ((0, 0), (0, 1), (1, 0)):
        net = build("functional")
        torch.manual_seed(noise)
        GhostSkip().attach(net, seed)
        found.append(torch.cat([p.detach().flatten() for g in ghosts(net) for p in g.parameters()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["timm/fused", "timm/mobilenetv3_small_100"])
def test_the_branch_sits_before_the_activation_of_a_fused_norm(name: str) -> None:
    from_timm = pytest.importorskip("timm.layers")
    net = build(name).eval()
    fused = [m for m in net.modules() if isinstance(m, from_timm.BatchNormAct2d) and isinstance(m.act, nn.ReLU)]
    woken(GhostSkip(), net)
    for ghost in ghosts(net):
        nn.init.constant_(ghost.norm.bias, -1000.0)  # behind a ReLU this would show as large negative numbers
    lows: list[float] = []
    with_ghost = [m for m in fused if any(hasattr(child, "ghost_skip") for child in m.modules())]
    for module in with_ghost:
        module.register_forward_hook(lambda _m, _a, out: lows.append(float(out.max())))
    with torch.no_grad():
        logits(net, inputs(name))
    assert lows == [0] * len(with_ghost) and lows


def test_a_forward_that_fails_half_way_leaves_nothing_behind() -> None:
    net, x = build("plain"), inputs("plain")
    net[2] = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8))
    woken(GhostSkip(), net)
    with pytest.raises(RuntimeError, match="stop"):
        handle = net[2][0].register_forward_hook(_stop)
        net(x)
    handle.remove()
    twin = copy.deepcopy(net)  # cannot copy tensors that are part of a graph
    assert torch.equal(twin(x), net(x))


def _stop(*_: Any) -> None:
    raise RuntimeError("stop")


class Silent(nn.Module):
    """Cannot be run on made-up images: it wants more than one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("functional")

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.inner(x * scale.item() + shift.item())


def test_a_network_that_cannot_be_traced_has_its_ghosts_beside_the_convolutions() -> None:
    net, x = Silent(), inputs("functional")
    woken(GhostSkip(), net)
    woken(SoftActivation(), net)
    assert len(ghosts(net)) == 6
    assert {n for n, m in net.named_modules() if hasattr(m, "ghost_skip")} == {
        f"inner.block{i}.conv{j}" for i in (1, 2, 3) for j in (1, 2)
    }
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    wanted = build("functional").eval()(x)
    assert not torch.allclose(net.eval()(x, one, zero), wanted)
    for tweak in (GhostSkip(), SoftActivation()):
        tweak.advance(net, LATE)
    assert torch.equal(net(x, one, zero), wanted)


class Noisy(nn.Module):
    """Draws from the global generator in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("functional")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + torch.rand(4)


def test_looking_at_a_network_draws_no_random_numbers_and_runs_no_hooks() -> None:
    net, called = Noisy(), []
    net.inner.fc.register_forward_hook(lambda *_: called.append(1))
    state = torch.get_rng_state()
    for kind in TWEAKS:
        tweak_of(kind).attach(net, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not called


def test_looking_at_a_network_leaves_the_logging_of_others_alone() -> None:
    logging.disable(logging.ERROR)
    try:
        GhostSkip().attach(build("functional"), 0)
        assert logging.root.manager.disable == logging.ERROR
    finally:
        logging.disable(logging.NOTSET)


# ---- soft_activation


def test_values_of_soft_by_hand() -> None:
    x = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    for beta in (0.0, 1.0, 2.5, 100.0):
        wanted = [v / (1 + math.exp(-beta * v)) if -beta * v < 700 else 0.0 for v in x.tolist()]
        torch.testing.assert_close(soft(x, beta), torch.tensor(wanted))
        torch.testing.assert_close(soft(x, torch.tensor(beta)), torch.tensor(wanted))
    torch.testing.assert_close(soft(x, 5.0, "swish"), soft(x, 1.0))
    mish = [v * math.tanh(math.log1p(math.exp(v))) for v in x.tolist()]
    torch.testing.assert_close(soft(x, 5.0, "mish"), torch.tensor(mish))
    torch.testing.assert_close(soft(x, 1000.0), torch.relu(x))


@pytest.mark.parametrize("shape", ["pswish", "swish", "mish"])
def test_relu6_keeps_its_cap(shape: str) -> None:
    net = nn.Sequential(nn.ReLU6(), nn.ReLU())
    woken(SoftActivation(shape=shape, beta=(1, 1)), net)
    x = torch.tensor([-1.0, 5.0, 6.5, 100.0])
    assert net[0](x).max() == 6 and net[1](x).max() == 100
    assert net[0](x)[0] < 0 and 4.9 < net[0](x)[1] < 5
    torch.testing.assert_close(F.relu6(x), soft(x, 1e4, "pswish", 6.0))


class Spelled(nn.Module):
    """One functional relu."""

    def __init__(self, relu: Any) -> None:
        super().__init__()
        self.relu = relu
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x))


def relu_in_place(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)


def relu_by_keyword(x: Tensor) -> Tensor:
    return F.relu(input=x)


def method_relu_(x: Tensor) -> Tensor:
    return x.relu_()


@pytest.mark.parametrize(
    ("relu", "cap"),
    [
        (F.relu, None), (torch.relu, None), (Tensor.relu, None), (relu_in_place, None), (relu_by_keyword, None),
        (F.relu_, None), (torch.relu_, None), (method_relu_, None), (F.relu6, 6.0),
    ],
    ids=["F.relu", "torch.relu", "x.relu", "inplace", "keyword", "F.relu_", "torch.relu_", "x.relu_", "F.relu6"],
)  # fmt: skip
def test_every_functional_relu_is_caught(relu: Any, cap: float | None) -> None:
    net, x = Spelled(relu), torch.tensor([[-1.0, 0.5, 9.0]])
    nn.init.eye_(net.fc.weight)
    nn.init.zeros_(net.fc.bias)
    tweak = SoftActivation(until="10ba", beta=(1, 3), schedule="linear")
    tweak.attach(net, 0)
    tweak.advance(net, Clock(5))
    torch.testing.assert_close(net(x), soft(x, 2.0, cap=cap))
    tweak.advance(net, Clock(10))
    assert torch.equal(net(x), F.relu6(x) if cap else F.relu(x))
    tweak.detach(net)
    assert type(net) is Spelled and list(net.state_dict()) == ["fc.weight", "fc.bias"]


def test_relu_outside_the_network_stays_relu() -> None:
    net, x = Spelled(F.relu), torch.tensor([-1.0, 2.0, 3.0])
    woken(SoftActivation(), net)
    net(x)
    assert torch.equal(F.relu(x), torch.tensor([0.0, 2.0, 3.0]))


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 1), ("linear", 50.5), ("geometric", 10)])
def test_beta_rises_to_its_end_and_then_relu_is_exact(schedule: str, middle: float) -> None:
    net, tweak = build("functional"), SoftActivation(until="0.5dur", beta=(1, 100), schedule=schedule)
    mixed = nn.Sequential(net, nn.ReLU())
    tweak.attach(mixed, 0)
    seen = []
    for step in (0, 5, 9, 10, 20):
        tweak.advance(mixed, Clock(step, total_steps=20))
        seen.append(tweak.metrics(mixed))
    assert [entry["tost/soft_activation/active"] for entry in seen] == [1, 1, 1, 0, 0]
    betas = [entry["tost/soft_activation/beta"] for entry in seen]
    assert betas[0] == 1 and betas[1] == pytest.approx(middle) and betas[3:] == [100, 100]
    assert betas == sorted(betas)
    x = torch.tensor([-1.0, -1e-3, 0.0, 2.0])
    assert torch.equal(mixed[1](x), F.relu(x))
    tweak.advance(mixed, Clock(5, total_steps=20))  # as after loading an older checkpoint
    torch.testing.assert_close(mixed[1](x), soft(x, middle))


class OwnReLU(nn.ReLU):
    """With a forward of its own: not ours to change."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0) + 1


class NamedReLU(nn.ReLU):
    """ReLU under another name."""


def test_subclasses_of_relu() -> None:
    net = nn.Sequential(OwnReLU(), NamedReLU(), nn.LeakyReLU(), nn.ReLU())
    woken(SoftActivation(beta=(1, 1)), net)
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(net[0](x), torch.tensor([1.0, 3.0])) and torch.equal(net[2](x), F.leaky_relu(x))
    torch.testing.assert_close(net[1](x), soft(x, 1.0))
    assert isinstance(net[1], NamedReLU)
    with pytest.raises(Inapplicable):
        SoftActivation().attach(nn.Sequential(nn.Linear(2, 2), OwnReLU(), nn.LeakyReLU()), 0)


# ---- surgery


class Louder:
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)  # type: ignore[misc]


class Shifted:
    def forward(self, x: Tensor) -> Tensor:
        return 1 + super().forward(x)  # type: ignore[misc]


def test_swaps_stack_and_come_off_in_any_order() -> None:
    x = torch.tensor([3.0])
    for order in itertools.permutations((Louder, Shifted)):
        module = nn.Identity()
        swap(module, Louder)
        swap(module, Louder)
        swap(module, Shifted)
        assert module(x) == 7 and isinstance(module, nn.Identity) and repr(module) == "Identity()"
        restore(module, order[0])
        assert module(x) == (4 if order[0] is Louder else 6)
        restore(module, order[1])
        assert type(module) is nn.Identity and module(x) == 3
        restore(module, Louder)
        assert type(module) is nn.Identity


def test_the_signature_of_forward_stays() -> None:
    import inspect

    net = build("functional")
    before = inspect.signature(net.forward)
    SoftActivation().attach(net, 0)
    assert inspect.signature(net.forward) == before and "x" in before.parameters
