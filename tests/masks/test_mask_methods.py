"""The laws that every row of the registry of masks keeps, and the errors of `masks.find`."""

import copy
import functools
import logging
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mask_nets import (
    IN_ROUNDS,
    KINDS,
    OPTIONS,
    RANDOM,
    WITH_SPARSITY,
    Pictures,
    batches,
    method,
    net,
    unpacking_task,
    zeroed,
)  # fmt: skip
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from tost_plugins import masks
from tost_plugins.errors import TostError
from tost_plugins.masks import MASKS, Mask, find, run, search
from tost_plugins.masks.methods.magnitude import Magnitude
from tost_plugins.masks.methods.snip import Snip
from tost_plugins.training.params import prunable
from tost_plugins.training.task import Task

NAMES = ["0.weight", "3.weight", "8.weight"]
DATA_DRIVEN = ["snip", "grasp"]
find_ = functools.partial(find, batches=batches())


# Laws


def test_the_registry_has_a_row_per_file_and_options_for_every_row() -> None:
    folder = Path(masks.__file__).parent / "methods"
    assert all((folder / f"{kind}.py").is_file() for kind in MASKS)
    assert all(cls.__module__ == f"tost_plugins.masks.methods.{kind}" for kind, cls in MASKS.items())
    assert set(OPTIONS) | {"file"} | IN_ROUNDS == set(MASKS)


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_those_of_the_prunable_weights(kind: str, tmp_path: Path) -> None:
    model = zeroed(net())
    mask = find_(model, method(kind, tmp_path, model))
    assert {name: m.shape for name, m in mask.items()} == {n: p.shape for n, p in prunable(model).items()}
    assert list(mask) == NAMES


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_layers_get_no_mask(kind: str, tmp_path: Path) -> None:
    model = zeroed(net(), ignore=("0", "8.*"))
    assert list(find_(model, method(kind, tmp_path, model, ignore=("0", "8.*")))) == ["3.weight"]


@pytest.mark.parametrize(
    ("kind", "allocation"),
    [
        (k, a)
        for k in WITH_SPARSITY
        if k != "auto"
        for a in ("global", "uniform", "erk")
        if a != "global" or k not in ("dnw", "top_kast", "edge_popup")
    ],
)
def test_the_kept_count_is_exact(kind: str, allocation: str, tmp_path: Path) -> None:
    model = net()
    size = sum(param.numel() for param in prunable(model).values())
    for sparsity in (0, 0.1, 1 / 3, 0.5, 0.77, 0.9, 0.95):
        made = method(kind, tmp_path, model, sparsity=sparsity, allocation=allocation, on_collapse="keep_one")
        assert search(made, Task.of(model, batches=batches()), 0).kept == round((1 - sparsity) * size)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_mask(kind: str, tmp_path: Path) -> None:
    model = zeroed(net())
    made = method(kind, tmp_path, model)
    first = find_(model, made, seed=3)
    torch.rand(7), random.random(), np.random.rand()
    assert find_(copy.deepcopy(model), made, seed=3) == first
    assert (find_(model, made, seed=4) == first) == (kind not in RANDOM)


class Watched:
    """All that a score might change: weights, buffers, gradients, modes, and the state of every generator."""

    def __init__(self, model: nn.Module, *generators: torch.Generator) -> None:
        self.model, self.generators = model, generators
        self.before = self.look()

    def look(self) -> tuple:
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        grads = {name: param.grad for name, param in self.model.named_parameters()}
        return (
            {name: (id(t), t.detach().clone(), t.requires_grad) for name, t in tensors.items()},
            {name: (id(grad), None if grad is None else grad.clone()) for name, grad in grads.items()},
            {name: module.training for name, module in self.model.named_modules()},
            (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
            [generator.get_state() for generator in self.generators],
        )

    def assert_unchanged(self) -> None:
        assert same(self.before, self.look())


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a) if isinstance(a, dict) else a == b


class Noisy(nn.Module):
    """Draws from every global generator in its forward pass, as data augmentation inside a model may."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * (torch.rand(()) + random.random() + float(np.random.rand()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_and_every_generator_come_back_as_they_were(kind: str, tmp_path: Path) -> None:
    model = zeroed(net())
    model.insert(0, Noisy())
    model[0].extra = nn.Linear(2, 2)  # ignored, so that the loss need not depend on it
    model[1].weight.grad = torch.rand(8, 3, 3, 3)
    model[9].weight.requires_grad_(kind in ("set", "rigl", "snfs"))  # which have no use for a frozen layer, and say so
    model[2].eval()  # a frozen norm in a network that trains
    data = TensorDataset(torch.randn(40, 3, 8, 8), torch.arange(40) % 4)
    own, samplers = torch.Generator().manual_seed(5), torch.Generator().manual_seed(6)
    loaders = [
        DataLoader(data, 10, shuffle=True, generator=own),
        DataLoader(data, 10, sampler=RandomSampler(data, generator=samplers)),
        DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data, generator=samplers), 10, False)),
    ]
    made = method(kind, tmp_path, model, ignore=("0.extra",))
    for loader in loaders:
        watched = Watched(model, own, samplers)
        find(model, made, batches=loader)
        watched.assert_unchanged()


def test_the_watch_sees_changes() -> None:
    for change in ("weight", "buffer", "grad", "mode", "torch", "python", "numpy"):
        model = net()
        watched = Watched(model)
        {
            "weight": lambda m=model: m[0].weight.data.mul_(2),
            "buffer": lambda m=model: m(torch.rand(2, 3, 8, 8)),
            "grad": lambda m=model: m[0].weight.sum().backward(),
            "mode": lambda m=model: m[1].eval(),
            "torch": lambda: torch.rand(1),
            "python": random.random,
            "numpy": np.random.rand,
        }[change]()
        with pytest.raises(AssertionError):
            watched.assert_unchanged()


def test_the_model_comes_back_after_an_error() -> None:
    model = net()
    watched = Watched(model)
    with pytest.raises(TostError):
        find(model, "snip", 0.5, [(torch.full((4, 3, 8, 8), float("nan")), torch.zeros(4).long())])
    watched.assert_unchanged()


@pytest.mark.parametrize("kind", KINDS)
def test_methods_and_masks_can_be_copied_and_pickled(kind: str, tmp_path: Path) -> None:
    model = zeroed(net())
    made = method(kind, tmp_path, model)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other == made
        assert find_(model, other) == find_(model, made)
    with pytest.raises(Exception, match=r"frozen|cannot assign"):
        made.ignore = ("x",)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_not_aliased_to_the_model(kind: str, tmp_path: Path) -> None:
    model = zeroed(net())
    mask = find_(model, method(kind, tmp_path, model))
    before = copy.deepcopy(mask)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(7)
    assert mask == before


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_mask_that_moves_the_first_is_found_and_said_to_be(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = zeroed(net())
    with caplog.at_level(logging.INFO, "tost_plugins"):
        mask = find_(model, method(kind, tmp_path, model))
    lines = [
        record.getMessage() for record in caplog.records if "moves while the network trains" in record.getMessage()
    ]
    assert len(lines) == hasattr(MASKS[kind], "update")
    assert all(line.startswith(f"mask {kind}: ") and f"sparsity {mask.sparsity:.4f};" in line for line in lines)


# Ways to call a network


@pytest.mark.parametrize("kind", ["snip", "grasp", "synflow"])
def test_dict_batches_as_of_hugging_face(kind: str, tmp_path: Path) -> None:
    model = Pictures()
    dicts = [{"pixel_values": x, "labels": y} for x, y in batches()]
    made = method(kind, tmp_path, model)
    mask = find(model, made, batches=dicts)
    plain = find_(model.body, made)
    assert Mask({name.removeprefix("body."): m for name, m in mask.items()}) == plain


@pytest.mark.parametrize("kind", ["snip", "grasp", "synflow"])
def test_models_that_unpack_their_batch_as_of_composer(kind: str, tmp_path: Path) -> None:
    task = unpacking_task(batches())
    made = method(kind, tmp_path, task.model)
    # `module.` is what DDP puts in front as well, so the names are those of the network inside.
    assert run(made, task, 0) == find_(task.model.module, made)


def test_synflow_calls_a_model_that_unpacks_its_batch_without_batches() -> None:
    made = MASKS["synflow"](sparsity=0.5, rounds=2, input_shape=(3, 8, 8))
    assert run(made, unpacking_task(None), 0).sparsity == 0.5


@pytest.mark.parametrize("kind", ["snip", "grasp", "synflow", "magnitude"])
def test_wrappers_are_looked_through(kind: str, tmp_path: Path) -> None:
    model = net()
    made = method(kind, tmp_path, model)
    expected = find_(model, made)
    assert find_(torch.compile(model, backend="eager"), made) == expected
    assert find_(nn.DataParallel(model), made) == expected
    inside = copy.deepcopy(model)
    inside[0] = torch.compile(inside[0], backend="eager")
    assert list(find_(inside, made)) == NAMES


def test_a_network_compiled_in_place_has_second_derivatives(tmp_path: Path) -> None:
    model = net()
    expected = find_(model, method("grasp", tmp_path, model))
    model.compile(backend="aot_eager")
    assert find_(model, method("grasp", tmp_path, model)) == expected


@pytest.mark.parametrize("kind", ["snip", "grasp", "synflow", "magnitude"])
def test_frozen_weights_are_scored_like_others(kind: str, tmp_path: Path) -> None:
    model = net()
    expected = find_(model, method(kind, tmp_path, model))
    model.requires_grad_(False)
    assert find_(model, method(kind, tmp_path, model)) == expected


class Tied(nn.Module):
    """A linear layer that shares its weight with another, and one that shares an embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 6)
        self.a, self.b, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        nn.init.normal_(self.a.weight)
        self.b.weight, self.out.weight = self.a.weight, self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.b(F.relu(self.a(x)))))


@pytest.mark.parametrize("kind", ["snip", "grasp", "synflow", "magnitude", "random"])
def test_tied_weights_come_once(kind: str, tmp_path: Path) -> None:
    data = [(torch.rand(12, 6), torch.arange(12) % 6)]
    mask = find(Tied(), method(kind, tmp_path, Tied()), batches=data)
    assert list(mask) == ["a.weight", "out.weight"]
    assert mask.kept == round(0.2 * 72)


def test_a_tied_checkpoint_and_other_tensors_of_it_need_no_mask(tmp_path: Path) -> None:
    model = zeroed(Tied())
    model.table = nn.Embedding(4, 4, padding_idx=0)  # with a row of zeros
    torch.save(model.state_dict(), tmp_path / "tied.pt")
    assert list(find(model, "file", path=str(tmp_path / "tied.pt"))) == ["a.weight", "out.weight"]
    with pytest.raises(TostError, match=r"got zeros for (a|b)\.weight; take it off `ignore`"):
        find(model, "file", path=str(tmp_path / "tied.pt"), ignore=("a", "b"))


def test_half_precision_weights_are_scored_in_float32() -> None:
    model, data = nn.Linear(8, 4).bfloat16(), [(torch.randn(8, 8).bfloat16(), torch.arange(8) % 4)]
    for kind in ("snip", "grasp", "magnitude"):
        assert find(model, kind, 0.5, data).kept == 16


# Errors


@pytest.mark.parametrize("sparsity", [1.0, 98, -0.1, float("nan")])
@pytest.mark.parametrize("kind", WITH_SPARSITY)
def test_sparsity_outside_0_to_1_is_an_error(kind: str, sparsity: float) -> None:
    with pytest.raises(TostError) as error:
        find_(net(), kind, sparsity)
    text = str(error.value)
    assert text.startswith(f"masks.find({kind}): sparsity: expected a sparsity in [0, 1), got {sparsity!r}")
    assert sparsity != 98 or "98 % is written 0.98" in text


@pytest.mark.parametrize("kind", ["file", "from_zeros"])
def test_a_given_mask_has_its_own_sparsity(kind: str) -> None:
    with pytest.raises(TostError, match=rf"masks\.find\({kind}\): sparsity: expected no such key"):
        find(net(), kind, 0.5, **({"path": "mask.pt"} if kind == "file" else {}))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "synflo",
            {},
            "masks.find(synflo): kind: expected a known mask method, got 'synflo'; did you mean 'synflow'",
        ),
        ("snip", {}, "masks.find(snip): sparsity: expected a value, got none"),
        ("snip", {"sparsity": 0.5, "batchs": 3}, "masks.find(snip): batchs: expected no such key"),
        (
            "grasp",
            {"sparsity": 0.5, "temperature": 0},
            "masks.find(grasp): temperature: expected",
        ),
        ("grasp", {"sparsity": 0.5, "per_class": 0}, "masks.find(grasp): per_class: expected"),
        ("synflow", {"sparsity": 0.5, "rounds": 0}, "masks.find(synflow): rounds: expected"),
        (
            "synflow",
            {"sparsity": 0.5, "input_shape": (3, 0, 8)},
            "masks.find(synflow): input_shape.1: expected",
        ),
        ("random", {"sparsity": 0.5, "on_collapse": "ignore"}, "masks.find(random): on_collapse: expected"),
        (
            "random",
            {"sparsity": 0.5, "ignore": ("9",)},
            "masks.find(random): ignore: expected globs that match",
        ),
        (
            "random",
            {"sparsity": 0.5, "allocation": {"9": 0.1}},
            "masks.find(random): allocation: expected globs",
        ),
        (Snip, {"sparsity": 0.5}, "masks.find(snip): kind: expected a name or a method that is made already, got"),
        (None, {}, "masks.find(None): kind: expected a name or a method that is made already, got None; known:"),
        ("file", {"path": "nowhere.pt"}, "masks.find(file): mask file nowhere.pt: expected an existing file"),
        (
            Magnitude(sparsity=0.5),
            {"ignore": ("0",)},
            "masks.find(magnitude): expected no options beside a method",
        ),
    ],
)
def test_wrong_options_are_errors_that_say_where(kind: object, options: dict, message: str) -> None:
    with pytest.raises(TostError) as error:
        find_(net(), kind, **options)
    assert str(error.value).startswith(message)


def test_a_model_is_expected() -> None:
    with pytest.raises(TostError, match=r"model: expected a torch\.nn\.Module, got dict; pass the network"):
        find({}, "random", 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", DATA_DRIVEN)
def test_methods_that_look_at_data_need_batches_that_can_be_read_twice(kind: str) -> None:
    empty = DataLoader(TensorDataset(torch.rand(2, 3, 8, 8), torch.zeros(2)), 4, drop_last=True)
    for given, message in (
        (None, "expected batches to look at, got None; pass batches=train_dataloader"),
        (iter(batches()), "expected something that can be read twice, got a one-shot list_iterator"),
        ([], "expected at least one batch, got an empty loader"),
        (empty, "expected at least one batch, got an empty loader"),
    ):
        with pytest.raises(TostError, match=message):
            find(net(), kind, 0.5, given)


class Stream(IterableDataset):
    """Samples without a length."""

    def __iter__(self):
        yield from zip(*batches(1)[0], strict=True)


@pytest.mark.parametrize("kind", [*DATA_DRIVEN, "synflow"])
def test_a_loader_without_a_length_will_do(kind: str, tmp_path: Path) -> None:
    model = net()
    assert find(model, method(kind, tmp_path, model), batches=DataLoader(Stream(), 12)).kept == 115


@pytest.mark.parametrize("kind", DATA_DRIVEN)
def test_nan_in_the_data_names_the_loss(kind: str) -> None:
    bad = [(torch.full((8, 3, 8, 8), float("nan")), torch.arange(8) % 4)]
    with pytest.raises(TostError, match=rf"masks\.find\({kind}\): {kind}: expected finite numbers, .* in the loss"):
        find(net(), kind, 0.5, bad)


class Steep(nn.Module):
    """A finite output with an infinite gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + (self.last.weight * 0).abs().sqrt().sum() * 0


def test_a_gradient_that_is_not_finite_names_its_layer() -> None:
    data = [(torch.rand(8, 3), torch.arange(8) % 4)]
    with pytest.raises(TostError, match=r"snip: expected finite numbers, got NaN or infinity in the gradient of last"):
        find(Steep(), "snip", 0.5, data)


def test_weights_that_are_not_finite_name_their_layer() -> None:
    model = net()
    model[3].weight.data[0] = float("nan")
    with pytest.raises(TostError, match=r"masks\.find\(magnitude\): expected finite scores, got .* in 3\.weight"):
        find(model, "magnitude", 0.5)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize("kind", [*DATA_DRIVEN, "synflow"])
def test_a_layer_that_the_loss_does_not_depend_on_is_named(kind: str) -> None:
    data = [(torch.rand(8, 3), torch.arange(8) % 4)]
    with pytest.raises(TostError, match=r"got none that depends on unused\.weight; add 'unused' to `ignore`"):
        find(Unused(), kind, 0.5, data)
    assert list(find(Unused(), kind, 0.5, data, ignore=("unused",))) == ["used.weight"]


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (
            lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"),
            r"one number, got \(12,\)",
        ),
        (lambda logits, labels: 1.0, "one number, got float"),
        (lambda logits, labels: F.cross_entropy(logits.detach(), labels), "got one without a gradient"),
    ],
)
@pytest.mark.parametrize("kind", DATA_DRIVEN)
def test_a_loss_that_cannot_be_differentiated(kind: str, loss_fn: object, message: str) -> None:
    with pytest.raises(TostError, match=message):
        find_(net(), kind, 0.5, loss_fn=loss_fn)


@pytest.mark.parametrize("kind", [kind for kind in WITH_SPARSITY if kind != "auto"])
def test_a_collapsed_network_is_an_error_and_an_empty_layer_may_keep_one(kind: str, tmp_path: Path) -> None:
    layers = {"0.weight": 0.1, "*": 0.99999}
    size = 216 + 72 + 288
    sparsity = 1 - round(0.9 * 216) / size
    begin = {"gradual": {"initial": sparsity}, "ac_dc": {"begin": "0ba"}}.get(kind, {})
    with pytest.raises(
        TostError, match=rf"masks\.find\({kind}\): expected a path .* without any weight: 3\.weight, 8\.weight\)"
    ):
        find_(net(), kind, sparsity, allocation=layers, **begin)
    model = net()
    made = method(kind, tmp_path, model, sparsity=sparsity, allocation=layers, on_collapse="keep_one", **begin)
    mask = search(made, Task.of(model, batches=batches()), 0)
    assert [int(m.sum()) for m in mask.values()] == [192, 1, 1]


def test_from_zeros_needs_zeros() -> None:
    with pytest.raises(TostError, match=r"masks\.find\(from_zeros\): expected a model with zeros"):
        find(net(), "from_zeros")


def test_a_dense_file_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(net().state_dict(), tmp_path / "dense.pt")
    assert find(net(), "file", path=str(tmp_path / "dense.pt")).sparsity == 0
    assert "it keeps every weight; is it a dense checkpoint?" in caplog.text


def test_from_zeros_and_file_refuse_an_empty_last_layer(tmp_path: Path) -> None:
    model = zeroed(net())
    model[8].weight.data.zero_()
    for kind in ("from_zeros", "file"):
        with pytest.raises(
            TostError, match=r"got none: the last one ends at 8\.weight \(layers without any weight: 8\.weight"
        ):
            find_(model, method(kind, tmp_path, model))
        kept = find(model, method(kind, tmp_path, model, on_collapse="keep_one"))["8.weight"]
        assert int(kept.sum()) == 1


def test_a_method_given_as_an_object_has_options_that_find_cannot_pass() -> None:
    model = net()
    assert find_(model, Snip(sparsity=0.5, batches=3)) != find_(model, "snip", 0.5)
