"""mask.py: every format that people keep masks in, what is refused, and what masks can be asked."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from tost_plugins.errors import TostError
from tost_plugins.masks.mask import Mask

TENSORS = {"conv.weight": torch.rand(8, 3, 3, 3) < 0.3, "fc.weight": torch.rand(5, 7) < 0.5}
MASK = Mask(TENSORS)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5))


def test_a_mask_is_a_mapping_that_holds_its_own_tensors() -> None:
    source = {"a": torch.tensor([1, 0, 1])}
    mask = Mask(source)
    source["a"][0] = 0
    assert list(mask) == ["a"]
    assert mask["a"].dtype == torch.bool
    assert mask["a"].tolist() == [True, False, True]
    assert (mask.kept, mask.size, len(mask)) == (2, 3, 1)
    with pytest.raises(TypeError):
        mask["a"] = torch.ones(3)  # type: ignore[index]


def test_numbers_by_hand() -> None:
    mask = Mask({"a": torch.tensor([1, 0, 0, 0]), "b": torch.tensor([1, 1])})
    assert mask.sparsity == 0.5
    assert mask.sparsities() == {"a": 0.75, "b": 0.0}
    assert repr(mask) == "Mask(2 layers, 3 of 6 weights kept, sparsity 0.5000)"


def test_difference_and_overlap_by_hand() -> None:
    a, b = Mask({"x": torch.tensor([1, 1, 0, 0])}), Mask({"x": torch.tensor([0, 1, 1, 0])})
    assert (a - b)["x"].tolist() == [True, False, False, False]
    assert a.overlap(b) == 1 / 3
    assert a.overlap(a) == 1
    empty = Mask({"x": torch.zeros(4)})
    assert empty.overlap(empty) == 1
    assert a.overlap(empty) == 0


def test_a_dict_of_zeros_and_ones_is_compared_like_a_mask() -> None:
    mask, other = Mask({"x": torch.tensor([1, 1, 0, 0])}), {"x": torch.tensor([0.0, 1.0, 1.0, 0.0])}
    sparse = {"x": other["x"].to_sparse()}
    assert Mask(sparse) == Mask.from_zeros(sparse) == Mask(other)
    for given in (other, sparse):
        assert mask.overlap(given) == 1 / 3 and (mask - given)["x"].tolist() == [True, False, False, False]


@pytest.mark.parametrize("other", [Mask({"y": torch.ones(4)}), Mask({"x": torch.ones(2, 2)})])
def test_masks_of_different_layers_are_not_compared(other: Mask) -> None:
    mask = Mask({"x": torch.ones(4)})
    assert mask != other
    with pytest.raises(TostError, match="expected two masks of the same layers"):
        mask.overlap(other)
    with pytest.raises(TostError, match="expected two masks of the same layers"):
        mask - other


def test_equality_deepcopy_and_pickle() -> None:
    assert copy.deepcopy(MASK) == MASK == pickle.loads(pickle.dumps(MASK))
    assert Mask(TENSORS) == MASK
    assert Mask({**TENSORS, "fc.weight": ~TENSORS["fc.weight"]}) != MASK
    assert MASK != TENSORS


def test_apply_writes_exact_zeros_in_place() -> None:
    weights = {name: torch.full(mask.shape, float("inf")) for name, mask in MASK.items()}
    same = dict(weights)
    MASK.apply_(weights)
    for name, weight in weights.items():
        assert weight is same[name]
        assert bool((weight[~MASK[name]] == 0).all())
        assert bool((weight[MASK[name]] == float("inf")).all())


@pytest.mark.parametrize("wrong", [{}, {"conv.weight": torch.ones(2)}])
def test_apply_changes_nothing_when_a_tensor_does_not_fit(wrong: dict[str, Tensor]) -> None:
    weights = {"fc.weight": torch.ones(5, 7), **wrong}
    with pytest.raises(TostError, match=r"expected a tensor conv\.weight of shape \(8, 3, 3, 3\)"):
        MASK.apply_(weights)
    assert bool((weights["fc.weight"] == 1).all())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "expected at least one layer, got none"),
        ({"a": [1, 0]}, "mask a: expected a tensor, got list"),
        ({"a": torch.ones(2, device="meta")}, "mask a: expected numbers, got a tensor on the device meta"),
        (torch.ones(2), "mask: expected names and their tensors, got tensor"),
        (None, "mask: expected names and their tensors, got None"),
        ({"a": torch.tensor([0.5, 1])}, "expected only 0 and 1, got other values"),
        ({"a": torch.tensor([float("nan"), 1])}, "expected only 0 and 1, got other values"),
    ],
)
def test_what_is_no_mask_is_refused(tensors: dict[str, object], message: str) -> None:
    with pytest.raises(TostError, match=message):
        Mask(tensors)  # type: ignore[arg-type]


def test_names_lose_the_prefixes_of_wrappers() -> None:
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."):
        assert list(Mask({f"{prefix}fc.weight": torch.ones(2)})) == ["fc.weight"]


# Files


def test_save_and_load_packs_one_bit_a_weight(tmp_path: Path) -> None:
    mask = Mask({"big": torch.rand(1000, 801) < 0.1, "odd": torch.rand(3, 3) < 0.5})
    path = tmp_path / "deep" / "mask.safetensors"
    mask.save(path)
    assert Mask.load(path) == mask
    assert path.stat().st_size < mask.size / 8 + 1000
    beside = [f"{path.name}.card.{end}" for end in ("json", "md")]
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, *beside]
    mask.save(tmp_path / "alone" / "mask.safetensors", card=False)
    assert [file.name for file in (tmp_path / "alone").iterdir()] == [path.name]


def test_our_file_is_known_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "mask.of_mine"
    MASK.save(path)
    assert Mask.load(str(path)) == MASK


def test_a_pruned_state_dict_gives_its_masks(tmp_path: Path) -> None:
    model = net()
    for layer in (model[0], model[2]):
        prune.random_unstructured(layer, "weight", amount=0.5)
    torch.save(model.state_dict(), tmp_path / "pruned.pt")
    mask = Mask.load(tmp_path / "pruned.pt")
    assert set(mask) == {"0.weight", "2.weight"}
    assert torch.equal(mask["0.weight"], model[0].weight_mask.bool())
    assert mask.sparsities()["0.weight"] == 0.5


@pytest.mark.parametrize("nest", [(), ("state_dict",), ("state", "model"), ("model_state_dict",), ("net",)])
def test_the_zeros_of_a_checkpoint(tmp_path: Path, nest: tuple[str, ...]) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[::2] = 0
    content: dict = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    for key in reversed(nest):
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "checkpoint.pt")
    mask = Mask.load(tmp_path / "checkpoint.pt")
    assert set(mask) == {"0.weight", "2.weight"}
    assert mask.sparsities() == {"0.weight": 0.5, "2.weight": 0.0}


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.int64])
def test_a_plain_dict_of_zeros_and_ones(tmp_path: Path, dtype: torch.dtype) -> None:
    plain = {name: tensor.to(dtype) for name, tensor in TENSORS.items()}
    torch.save(plain, tmp_path / "plain.pt")
    save_file(plain, tmp_path / "plain.safetensors")
    assert Mask.load(tmp_path / "plain.pt") == MASK == Mask.load(tmp_path / "plain.safetensors")


def test_the_zeros_of_a_safetensors_checkpoint(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.tensor([[0.5, 0.0]]), "fc.bias": torch.zeros(1)}, tmp_path / "m.safetensors")
    assert Mask.load(tmp_path / "m.safetensors") == Mask({"fc.weight": torch.tensor([[1, 0]])})


class Trap:
    """Pickled as a call of `Path.touch`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "trap.pt").write_bytes(pickle.dumps({"fc.weight": Trap(tmp_path / "sprung")}, protocol=2))
    torch.save({"fc.weight": torch.ones(2), "extra": Trap(tmp_path / "sprung")}, tmp_path / "zipped.pt")
    for name in ("trap.pt", "zipped.pt"):
        with pytest.raises(TostError, match="expected plain tensors, got a pickle with other objects"):
            Mask.load(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("name", ["ours.safetensors", "plain.pt"])
def test_a_torn_file_is_an_error_that_names_it(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    MASK.save(path) if name.startswith("ours") else torch.save(TENSORS, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(TostError) as error:
        Mask.load(path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_packed_bits_that_do_not_fit_their_shapes(tmp_path: Path) -> None:
    bits = {"fc.weight": torch.zeros(2, dtype=torch.uint8)}
    for shapes in ("[]", "{", '{"fc.weight": [100]}', '{"other": [16]}', '{"fc.weight": "ab"}'):
        save_file(bits, tmp_path / "m.safetensors", metadata={"format": "tost_mask", "shapes": shapes})
        with pytest.raises(TostError, match=r"mask file .*m\.safetensors: expected"):
            Mask.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected a dict of tensors, got dict without any"),
        ([1, 2], "expected a dict of tensors, got list"),
        ({"epoch": 3}, "expected a dict of tensors"),
        ({"fc.bias": torch.rand(3)}, "expected masks or weights, got neither"),
        ({"fc.weight_mask": torch.rand(3)}, "expected only 0 and 1"),
    ],
)
def test_files_without_a_mask(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(TostError, match=message) as error:
        Mask.load(tmp_path / "other.pt")
    assert "other.pt" in str(error.value)


def test_a_missing_file_and_a_text_file(tmp_path: Path) -> None:
    with pytest.raises(
        TostError, match="expected an existing file, or a folder with weights, got none; check the path"
    ):
        Mask.load(tmp_path / "nowhere.pt")
    (tmp_path / "notes.txt").write_text("not a mask")
    with pytest.raises(TostError, match=r"notes\.txt: expected"):
        Mask.load(tmp_path / "notes.txt")


# Fitting a mask to a network


def params() -> dict[str, Tensor]:
    return {name: torch.ones(mask.shape) for name, mask in MASK.items()}


def test_fit_cuts_to_the_layers_asked_for() -> None:
    more = Mask({**TENSORS, "bn.weight": torch.ones(8)})
    assert more.fit(params()) == MASK
    assert list(more.fit(dict(reversed(params().items())))) == ["fc.weight", "conv.weight"]


def test_fit_names_a_missing_a_misshapen_and_a_left_over_layer() -> None:
    with pytest.raises(TostError, match=r"expected a layer head\.weight, got none; add it to the mask or"):
        MASK.fit({**params(), "head.weight": torch.ones(3)})
    with pytest.raises(TostError, match=r"expected shape \(7, 5\) for fc\.weight, got \(5, 7\)"):
        MASK.fit({**params(), "fc.weight": torch.ones(7, 5)})
    with pytest.raises(TostError, match=r"got zeros for conv\.weight; take it off `ignore`"):
        MASK.fit({"fc.weight": torch.ones(5, 7)})
    assert list(MASK.fit({"fc.weight": torch.ones(5, 7)}, known={"conv.weight": torch.ones(1)})) == ["fc.weight"]


def test_dense_and_from_zeros() -> None:
    weights = {"a": torch.tensor([0.0, -0.0, 1e-45, float("nan")], requires_grad=True)}
    assert Mask.dense(weights).sparsity == 0
    assert Mask.from_zeros(weights)["a"].tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda mask, net: mask.apply_(net), "mask: expected names and their tensors, got Linear("),
        (lambda mask, net: Mask.dense(net), "mask: expected names and their tensors, got Linear("),
        (lambda mask, net: Mask.from_zeros(net.weight), "mask: expected names and their tensors, got Parameter"),
        (lambda mask, net: Mask({3: torch.ones(2)}), "mask: expected names and their tensors, got the keys 3; "),
        (lambda mask, net: mask - 3, "mask: expected names and their tensors, got 3; "),
        (lambda mask, net: mask.overlap(None), "mask: expected names and their tensors, got None; "),
        (lambda mask, net: mask - {"weight": 0.5 * torch.eye(2)}, "mask weight: expected only 0 and 1, got other values; "),
        (lambda mask, net: mask.fit(net), "mask: expected names and their tensors, got Linear("),
        *[(lambda mask, net, call=call: call(mask, {"weight": torch.eye(2).numpy()}), "mask weight: expected a tensor, got nda")
          for call in (Mask.apply_, Mask.fit, Mask.overlap, lambda _, of: Mask.dense(of), lambda _, of: Mask.from_zeros(of))],
        (lambda mask, net: mask.save(3), "mask file: expected a path, got 3; "),
        (lambda mask, net: Mask.load(None), "mask file: expected a path, got None; "),
    ],
    ids=["apply_", "dense", "from_zeros", "keys", "minus", "overlap", "halves", "fit", "numpy apply_", "numpy fit",
         "numpy overlap", "numpy dense", "numpy from_zeros", "save", "load"],
)  # fmt: skip
def test_what_is_no_mask_and_no_weights_is_said_in_one_line(call: Callable[[Mask, nn.Module], Any], said: str) -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(TostError) as caught:
        call(Mask({"weight": torch.eye(2)}), net)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_a_folder_is_no_file_to_write_a_mask_to(tmp_path: Path) -> None:
    with pytest.raises(TostError, match="expected a file to write, got a folder; give it a name"):
        Mask({"weight": torch.eye(2)}).save(tmp_path)
