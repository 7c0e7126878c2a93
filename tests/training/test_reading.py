"""Looking leaves no trace: whatever the loader is made of, a run reads the same batches, and draws the same random numbers, with
and without the looks of a start before it."""

import copy
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, TensorDataset

from tost_plugins import Session, TostError, masks
from tost_plugins.training.reading import Batches

COUNT, CPU = 20, torch.device("cpu")


class Rows(Dataset):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.full((1, 6, 6), float(i)), i % 2


class Augmented(Rows):
    """With random numbers of all kinds in each sample, and some of its own."""

    def __init__(self, owned: bool) -> None:
        self.transforms = [np.random.default_rng(0), np.random.RandomState(0), random.Random(0)] if owned else []

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        own = [rng.random() for rng in self.transforms]
        return torch.full((1, 6, 6), i + sum([float(torch.rand(())), np.random.rand(), random.random(), *own])), i % 2


class Shuffler(Sampler):
    """Shuffles its own list where it is, with a generator of its own, and counts epochs."""

    def __init__(self) -> None:
        self.order, self.rng, self.epoch = list(range(COUNT)), random.Random(1), 0

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        self.rng.shuffle(self.order)
        return iter([(i + self.epoch) % COUNT for i in self.order])


class Nested(Sampler):
    """A sampler around another one, and that one's generator behind both."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[int]:
        return iter(self.inner)


class Position(IterableDataset):
    """A stream that goes on where it was."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for _ in range(COUNT):
            self.at += 1
            yield torch.full((1, 6, 6), float(self.at)), self.at % 2


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


LOADERS: dict[str, Callable[[], Any]] = {
    "global generator": lambda: DataLoader(Rows(), 4, shuffle=True),
    "the loader's generator": lambda: DataLoader(Rows(), 4, shuffle=True, generator=seeded()),
    "the sampler's generator": lambda: DataLoader(Rows(), 4, sampler=RandomSampler(Rows(), generator=seeded())),
    "the batch sampler's": lambda: DataLoader(
        Rows(), batch_sampler=BatchSampler(RandomSampler(Rows(), generator=seeded()), 4, True)
    ),
    "nested samplers": lambda: DataLoader(Rows(), 4, sampler=Nested(Nested(RandomSampler(Rows(), generator=seeded())))),
    "a list in a sampler": lambda: DataLoader(Rows(), 4, sampler=Shuffler()),
    "random transforms": lambda: DataLoader(Augmented(False), 4, shuffle=True),
    "transforms with generators": lambda: DataLoader(Augmented(True), 4),
    "a stream": lambda: DataLoader(Position(), 4),
    "workers": lambda: DataLoader(Augmented(False), 4, shuffle=True, num_workers=1),
    "workers that stay": lambda: DataLoader(Augmented(False), 4, shuffle=True, num_workers=1, persistent_workers=True),
    "a list": lambda: [(torch.rand(4, 1, 6, 6), torch.arange(4) % 2) for _ in range(3)],
}  # fmt: skip

RECIPE = {
    "mask": {"kind": "snip", "sparsity": 0.5, "on_collapse": "keep_one"},
    "tweaks": ["ghost_skip", {"kind": "rescaled_init", "iterations": 6}],
}


def net() -> nn.Module:
    conv = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*conv, nn.Flatten(), nn.Dropout(0.1), nn.Linear(144, 2))


def start(loader: Any, watched: dict[str, Any] | None = None) -> Session:
    model = net()
    session = Session(model, {**RECIPE, "watch": watched}).attach()
    session.start(torch.optim.SGD(model.parameters(), lr=0.1), loader, total_steps=40, steps_per_epoch=5)
    return session


def epochs(loader: Any) -> list[Any]:
    """Two epochs, and what the generators draw after them."""
    read = [batch[0] for _ in range(2) for batch in loader]
    return [*read, torch.rand(1), torch.tensor([np.random.rand(), random.random()])]


@pytest.mark.parametrize("name", LOADERS)
def test_a_run_reads_the_same_after_all_looks(name: str, tmp_path: Any) -> None:
    def run(looked: bool) -> list[Tensor]:
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        loader, model = LOADERS[name](), net()
        states = torch.get_rng_state()
        if looked:
            session = Session(
                model, {**RECIPE, "watch": {"measures": ["activation_sparsity"], "out": str(tmp_path)}}
            ).attach()
            after = torch.get_rng_state()  # ghosts are made from a seed of their own
            session.start(torch.optim.SGD(model.parameters(), lr=0.1), loader, total_steps=40, steps_per_epoch=5)
            assert torch.equal(torch.get_rng_state(), after) and torch.equal(after, states)
        return epochs(loader)

    for one, two in zip(run(True), run(False), strict=True):
        assert torch.equal(one, two)


def test_a_look_in_the_middle_of_an_epoch_leaves_it_alone() -> None:
    for name in ("workers that stay", "the loader's generator"):
        torch.manual_seed(0)
        loader = LOADERS[name]()
        running = iter(loader)
        first = next(running)[0]
        start(loader)
        torch.manual_seed(0)
        twin = iter(LOADERS[name]())
        assert torch.equal(first, next(twin)[0])
        assert all(torch.equal(a[0], b[0]) for a, b in zip(running, twin, strict=True))


OPENED: list[str] = []


class Counted(DataLoader):
    def __iter__(self) -> Any:
        OPENED.append("a pool of workers")
        return super().__iter__()


def test_one_start_reads_the_loader_once(tmp_path: Any) -> None:
    OPENED.clear()
    loader = Counted(Rows(), 2, shuffle=True)  # ten batches: more than all looks need
    start(loader, {"measures": ["activation_sparsity"], "out": str(tmp_path)})
    assert len(OPENED) == 1


def test_masks_do_not_depend_on_who_has_looked_before(tmp_path: Any) -> None:
    found = []
    for watch in (None, {"measures": ["activation_sparsity"], "out": str(tmp_path)}):
        torch.manual_seed(0)
        found.append(start(LOADERS["random transforms"](), watch).mask)
        torch.rand(3), np.random.rand(), random.random()
    assert found[0] == found[1]


def test_batches_are_kept_and_read_on() -> None:
    loader = LOADERS["global generator"]()
    with Batches(loader, CPU) as batches:
        first = batches.take(2)
        again, streamed = batches.take(3), list(batches)
        twice = list(batches)
    assert len(streamed) == 5 and len(again) == 3
    for other in (again, streamed, twice):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=False))
    assert sorted(x[0, 0, 0].item() for batch in streamed for x in batch[0]) == list(range(COUNT))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(streamed, twice, strict=True))


@pytest.mark.parametrize("kind", ["snip", "grasp", "synflow"])
def test_batches_without_samples_are_passed_over(kind: str) -> None:
    net, x, y = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)), torch.rand(12, 4), torch.arange(12) % 3
    found = masks.find(net, kind, 0.3, [(x[:0], y[:0]), (x, y), (x[:0], y[:0])])
    assert found == masks.find(net, kind, 0.3, [(x, y)])
    with pytest.raises(TostError, match="expected at least one batch, got an empty loader"):
        masks.find(net, kind, 0.3, [(x[:0], y[:0])])


def test_what_is_no_loader_is_an_error() -> None:
    for given, got in ((5, "got int"), (iter([1]), "got a one-shot list_iterator"), ([], "got an empty loader")):
        with pytest.raises(TostError, match=got):
            Batches(given, CPU).take(1)


def test_generators_of_the_network_return() -> None:
    class Noisy(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.draws = torch.Generator()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.rand(x.shape, generator=self.draws))

    model, loader = Noisy(), DataLoader(TensorDataset(torch.rand(8, 4), torch.arange(8) % 2), 4)
    before = model.draws.get_state()
    session = Session(model, {"mask": {"kind": "snip", "sparsity": 0.5}, "tweaks": []}).attach()
    session.start(torch.optim.SGD(model.parameters(), lr=0.1), loader, total_steps=4)
    assert torch.equal(model.draws.get_state(), before)


def test_loaders_of_accelerate_return_too() -> None:
    accelerate = pytest.importorskip("accelerate")

    def run(looked: bool, loader: Any) -> list[Tensor]:
        torch.manual_seed(0)
        ready = accelerate.Accelerator(
            cpu=True, dataloader_config=accelerate.DataLoaderConfiguration(use_seedable_sampler=True)
        )
        prepared, model = ready.prepare(loader()), net()
        before = (prepared.iteration, ready.gradient_state.in_dataloader)
        if looked:
            session = Session(model, RECIPE).attach()
            session.start(torch.optim.SGD(model.parameters(), lr=0.1), prepared, total_steps=40)
        assert (prepared.iteration, ready.gradient_state.in_dataloader) == before
        return [batch[0] for _ in range(2) for batch in prepared]

    for name in ("global generator", "the loader's generator", "workers that stay", "a stream"):
        for one, two in zip(run(True, LOADERS[name]), run(False, LOADERS[name]), strict=True):
            assert torch.equal(one, two), name


# ---- what a network keeps beside its buffers


class Keeps(nn.Module):
    """Keeps a mean of what it has seen in a tensor that is no buffer, and what it has done in lists, dicts and sets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.mean = nn.Linear(4, 6), nn.Linear(6, 3), torch.zeros(6)
        self.sizes, self.recent, self.seen = [], deque(maxlen=2), Counter()
        self.losses, self.means = {"sums": [], "first": None}, ([torch.zeros(6)],)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(x))
        self.mean.mul_(0.9).add_(x.detach().mean(0))
        self.means[0][0].add_(x.detach().mean(0))
        self.sizes.append(len(x))
        self.recent.append(len(self.sizes))
        self.seen[len(x)] += 1
        self.losses["sums"].append(float(x.sum()))
        self.losses["first"] = self.losses["first"] or float(x.sum())
        return self.head(x)

    def kept(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name in ("sizes", "recent", "seen", "losses")}


@pytest.mark.parametrize("kind", ["snip", "grasp", "synflow"])
def test_what_a_network_keeps_is_what_it_was(kind: str) -> None:
    net, x, y = Keeps(), torch.rand(12, 4), torch.arange(12) % 3
    net(x[:5])
    held, mean, lists = net.mean, net.mean.clone(), net.kept()
    before, average = copy.deepcopy(lists), net.means[0][0].clone()
    masks.find(net, kind, 0.3, [(x, y)], on_collapse="keep_one")
    assert net.mean is held and torch.equal(held, mean) and bool(mean.any())
    assert net.kept() == before and all(net.kept()[name] is value for name, value in lists.items())
    assert net.sizes == [5] and torch.equal(net.means[0][0], average)


@pytest.mark.parametrize("kind", ["snip", "grasp"])
def test_a_loss_of_one_number_in_a_row_is_one_number(kind: str) -> None:
    net, x, y = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.rand(12, 4), torch.arange(12) % 3

    def row(outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels)[None]

    recipe = {"mask": {"kind": kind, "sparsity": 0.3}, "tweaks": [{"kind": "rescaled_init", "iterations": 2}]}
    found = []
    for loss_fn in (row, nn.functional.cross_entropy):
        twin = copy.deepcopy(net)
        session = Session(twin, recipe).attach()
        session.start(torch.optim.SGD(twin.parameters(), lr=0.1), [(x, y)], loss_fn=loss_fn, total_steps=1)
        found.append(twin.state_dict())
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())
