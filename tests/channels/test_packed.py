"""Packed files: every bit comes back, they are small, and what strangers send is refused in one line."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
import zoo
from command import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from tost_plugins import TostError, compact, load_packed, masks
from tost_plugins.channels.sizes import changed
from tost_plugins.files.packed import FORMAT, checksum, read_packed, save_packed
from tost_plugins.lab import models
from tost_plugins.training.task import Task

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn,
)  # fmt: skip


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=60, database=None)
@given(
    shape=st.lists(st.integers(0, 7), max_size=4),
    dtype=st.sampled_from(DTYPES),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_every_bit_comes_back(
    tmp_path_factory: pytest.TempPathFactory, shape: list, dtype: torch.dtype, density: float, seed: int
) -> None:
    path, generator = tmp_path_factory.mktemp("packed") / "file", torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator) * 3
    tensor = torch.where(torch.rand(shape, generator=generator) < density, numbers, 0.0 * numbers).to(dtype)
    save_packed(path, {"a.weight": tensor, "b": torch.tensor(7)})
    found = read_packed(path).tensors
    assert (found["a.weight"].dtype, found["a.weight"].shape) == (dtype, tensor.shape)
    ours, theirs = ((each.double() + 0.0).to(dtype) for each in (found["a.weight"], tensor))  # -0.0 becomes 0.0
    assert bits(ours) == bits(theirs) and found["b"] == 7


def test_a_removed_weight_of_minus_0_takes_no_room(tmp_path: Path) -> None:
    save_packed(
        tmp_path / "packed", {"a": torch.cat([torch.full((10_000,), -0.0), torch.tensor([float("nan"), -1.0])])}
    )
    assert (tmp_path / "packed").stat().st_size < 10_000 / 8 + 500
    found = read_packed(tmp_path / "packed").tensors["a"]
    assert found[:-2].count_nonzero() == 0 and found[-2].isnan() and found[-1] == -1


def sparse(name: str = "cifar/resnet20", sparsity: float = 0.98) -> nn.Module:
    torch.manual_seed(0)
    net = models.build(name, 10)
    masks.find(net, "synflow", sparsity, rounds=5, input_shape=(3, 32, 32), on_collapse="keep_one").apply_(
        Task.of(net).params
    )
    return net


def test_a_path_may_be_text_and_what_is_no_state_dict_is_said(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    save_packed(str(tmp_path / "net.safetensors"), net.state_dict())
    assert read_packed(tmp_path / "net.safetensors").tensors.keys() == net.state_dict().keys()
    refused(lambda: save_packed(tmp_path / "x", net), "x: expected a state dict, got Linear; pass model.state_dict()")  # type: ignore[arg-type]


def test_a_file_is_a_bit_a_weight_and_what_is_kept(tmp_path: Path) -> None:
    net = sparse("cifar/resnet32")
    save_packed(tmp_path / "packed", net.state_dict())
    save_file(net.state_dict(), tmp_path / "dense")
    weights = sum(param.numel() for param in Task.of(net).params.values())
    kept = sum(int(param.count_nonzero()) for param in Task.of(net).params.values())
    rest = sum(t.numel() * t.element_size() for t in net.state_dict().values()) - 4 * weights
    size = (tmp_path / "packed").stat().st_size
    assert size < 1.15 * (weights / 8 + 4 * kept + rest) + 20_000  # names and shapes
    assert (tmp_path / "dense").stat().st_size > 12 * size
    loaded = load_packed(models.build("cifar/resnet32", 10), tmp_path / "packed")
    assert all(bits(t) == bits(net.state_dict()[name]) for name, t in loaded.state_dict().items())
    save_packed(tmp_path / "again", net.state_dict())
    assert (tmp_path / "again").read_bytes() == (tmp_path / "packed").read_bytes()


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", ["cifar/mobilenet_v2", "functional"])
def test_a_compact_network_comes_back_into_one_that_is_built_as_usual(name: str, pack: bool, tmp_path: Path) -> None:
    build: Callable[[], nn.Module] = (lambda: zoo.build(name)) if name in zoo.ZOO else (lambda: models.build(name, 10))
    net, images = build(), torch.randn(2, 3, 32, 32)
    mask = masks.find(net, "synflow", 0.9, rounds=5, input_shape=(3, 32, 32), on_collapse="keep_one")
    small = compact(net, mask, images)
    save_packed(tmp_path / "packed", small.state_dict(), changed(net, small), pack)
    for other in (build(), copy.deepcopy(small)):
        loaded = load_packed(other, tmp_path / "packed")
        assert loaded is other and str(loaded) == str(small)
        assert torch.equal(loaded.eval()(images), small(images))
    if not pack:
        with safe_open(tmp_path / "packed", "pt") as file:
            assert set(file.keys()) == set(small.state_dict())


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    net = sparse()
    save_packed(tmp_path / "packed", net.state_dict())
    for other, part in (
        (models.build("cifar/resnet20", 9), "expected shape (9, 64) for head.weight, got (10, 64)"),
        (models.build("cifar/resnet8", 10), "expected the tensors of this network, got stage1.1.conv1.weight"),
        (nn.Sequential(net, nn.Linear(10, 2)), "not 0.stem.conv.weight"),
    ):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        refused(lambda other=other: load_packed(other, tmp_path / "packed"), tmp_path / "packed", part)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    small = compact(net, masks.Mask.from_zeros(Task.of(net).params), torch.randn(2, 3, 32, 32))
    save_packed(tmp_path / "small", small.state_dict(), changed(net, small))
    refused(lambda: load_packed(models.build("cifar/resnet8", 10), tmp_path / "small"), "expected a layer")
    refused(
        lambda: load_packed(models.build("cifar/resnet20", 9), tmp_path / "small"),
        "layer head with",
        "'out_features': 10",
    )
    refused(lambda: load_packed(net, tmp_path / "none"), "expected an existing file")
    save_file(net.state_dict(), tmp_path / "plain")
    refused(lambda: load_packed(net, tmp_path / "plain"), "expected a file of tost export", "load_state_dict")


def about(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[FORMAT])


def changed_file(path: Path, change: Callable[[dict, dict], None]) -> Path:
    """The file at `path` with its tensors and its header changed."""
    header = about(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    change(tensors, header)
    header["checksum"] = checksum(tensors) + header.pop("wrong", 0)
    (path.parent / "changed").write_bytes(save(tensors, metadata={FORMAT: json.dumps(header)}))
    return path.parent / "changed"


CHANGES: dict[str, Callable[[dict, dict], object]] = {
    "a later version": lambda tensors, header: header.update(version=2),
    "another checksum": lambda tensors, header: header.update(wrong=1),
    "no version": lambda tensors, header: header.update(version="1"),
    "other shapes": lambda tensors, header: header["shapes"].update(weight=[100, 4]),
    "a huge shape": lambda tensors, header: header["shapes"].update(weight=[10**12, 2]),
    "a negative shape": lambda tensors, header: header["shapes"].update(weight=[-1, 2]),
    "no shapes": lambda tensors, header: header.pop("shapes"),
    "bits of nothing": lambda tensors, header: tensors.update({"bits:other": torch.zeros(1, dtype=torch.uint8)}),
    "fewer bits": lambda tensors, header: tensors.update({"bits:weight": tensors["bits:weight"][1:].clone()}),
    "another bit": lambda tensors, header: tensors["bits:weight"].__ixor__(1),
    "fewer values": lambda tensors, header: tensors.update(weight=tensors["weight"][1:].clone()),
    "values in rows": lambda tensors, header: tensors.update(weight=tensors["weight"][None].clone()),
    "no values": lambda tensors, header: tensors.pop("weight"),
    "odd sizes": lambda tensors, header: header.update(sizes={"": {"in_features": [101, -3], "out_features": [2, 2]}}),
    "sizes of nothing": lambda tensors, header: header.update(sizes={"other": {"num_features": [3, 3]}}),
    "one size": lambda tensors, header: header.update(sizes={"": {"in_features": 101, "out_features": 2}}),
    "sizes that are no numbers": lambda tensors, header: header.update(sizes={"": {"in_features": [101, "3"]}}),
    "huge sizes": lambda tensors, header: header.update(
        sizes={"": {"in_features": [101, 10**9], "out_features": [2, 10**9]}}
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_damaged_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    net = nn.Linear(101, 2)
    net.weight.data[:, 2:] = 0
    save_packed(tmp_path / "packed", net.state_dict())
    path, other = changed_file(tmp_path / "packed", CHANGES[name]), nn.Linear(101, 2)
    before = other.weight.clone()
    text = refused(lambda: load_packed(other, path), path)
    assert ("pip install" in text) == (name == "a later version")
    assert torch.equal(other.weight, before)


@settings(max_examples=150, database=None, suppress_health_check=list(hypothesis.HealthCheck))
@given(data=st.data())
def test_torn_and_flipped_files_are_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path, net = tmp_path_factory.mktemp("packed") / "file", nn.Sequential(nn.Linear(101, 2), nn.BatchNorm1d(2))
    net[0].weight.data[:, 2:] = 0
    before = {name: bits(tensor) for name, tensor in net.state_dict().items()}
    save_packed(path, net.state_dict(), {"0": {"in_features": (101, 101), "out_features": (2, 2)}})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2, 9, len(content) - 1]))])
    try:
        load_packed(net, path)
    except TostError as error:
        assert str(error).isprintable()
    assert {name: bits(tensor) for name, tensor in net.state_dict().items()} == before
