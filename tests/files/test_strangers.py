"""Recipes, masks and checkpoints from strangers: no code runs, nothing is taken without bounds, errors are one line."""

import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import hypothesis
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from tost_plugins import Mask, Recipe, TostError
from tost_plugins.lab.cli import app
from tost_plugins.lab.data import load
from tost_plugins.lab.export import export
from tost_plugins.lab.progress import progress
from tost_plugins.lab.train import train
from tost_plugins.recipe import plain_yaml
from tost_plugins.recipe.recipe import DataSpec, apply_changes

PLAIN = {"mask": {"kind": "random", "sparsity": 0.5}}
SOME = settings(suppress_health_check=list(hypothesis.HealthCheck), database=None)


@pytest.mark.parametrize(
    ("target", "count"), [("recipe", 150), ("mask", 300), ("export", 150), ("packed", 200), ("index", 150)]
)
def test_whatever_comes_in_ends_well(target: str, count: int, tmp_path: Path) -> None:
    @settings(SOME, max_examples=count)
    @given(fuzz.inputs(target))
    def run(content: bytes) -> None:
        fuzz.attempt(target, content, tmp_path)

    fuzz.ENDINGS.clear()
    run()
    assert fuzz.ENDINGS["success"] > count // 50 and fuzz.ENDINGS["TostError"] > count // 2


@pytest.mark.long
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_ten_thousand_end_well(target: str) -> None:
    command = [sys.executable, fuzz.__file__, "--target", target, "--count", "10000", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "10000 inputs" in done.stdout, done.stderr[-3000:]


# Pickles


def _edited(path: Path, change: Callable[[dict[str, bytes]], Any], packing: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as file:
        entries = {entry.filename.split("/", 1)[1]: file.read(entry) for entry in file.infolist()}
    change(entries)
    with zipfile.ZipFile(path, "w", packing) as file:
        for name, content in entries.items():
            file.writestr(f"archive/{name}", content)


def _hash_bomb() -> bytes:
    """A key that is a tuple of a tuple twice, of a tuple twice, ...: to hash it takes 2 ** 60 steps."""
    doubled = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    return b"\x80\x02})" + doubled + b"K\x01s."


_TAKES = b"\x80\x02}X\x01\x00\x00\x00acbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85Rs."  # 2 GiB, written to


@pytest.mark.parametrize(
    ("change", "packing", "message"),
    [
        (lambda e: e.update({"data.pkl": _hash_bomb()}), zipfile.ZIP_STORED, "nested without end"),
        (lambda e: e.update({"data.pkl": _TAKES}), zipfile.ZIP_STORED, "it takes memory by a number"),
        (lambda e: e.update({"data/0": b"\0" * 4000}), zipfile.ZIP_DEFLATED, "compressed"),
        (lambda e: e.update({"byteorder": b"big"}), zipfile.ZIP_STORED, "another byte order"),
        (
            lambda e: e.update({"data.pkl": e["data.pkl"].replace(b"M\xe8\x03", b"J\0\0\0\x10")}),
            zipfile.ZIP_STORED,
            "RuntimeError",
        ),
    ],
    ids=["hash", "bytearray", "compressed", "byte order", "storage beyond the file"],
)
def test_a_file_that_wants_more_than_it_holds(change: Any, packing: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mask.pt"
    torch.save({"w": torch.ones(1000)}, path)
    _edited(path, lambda entries: None)
    assert Mask.load(path).size == 1000
    _edited(path, change, packing)
    for read in (Mask.load, lambda path: export(path, tmp_path / "out")):
        with pytest.raises(TostError, match=rf"mask\.pt: expected a safetensors or torch\.save file, got .*{message}"):
            read(path)


def test_bombs_of_the_old_format_and_of_plain_pickles(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    for bomb in (_hash_bomb(), _TAKES):
        torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
        whole = path.read_bytes()
        head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        assert whole.startswith(head[:-100])
        for content in (bomb, head + bomb + pickle.dumps([], 2)):
            path.write_bytes(content)
            with pytest.raises(TostError, match=r"nested without end|it takes memory by a number"):
                Mask.load(path)


def test_views_sparse_tensors_and_dicts_that_stand_for_more_than_the_file_holds(tmp_path: Path) -> None:
    path, itself = tmp_path / "m.pt", {}
    itself["state_dict"] = itself
    cases: list[tuple[Any, str]] = [
        ({"w": torch.ones(1).expand(10**6, 10**6)}, "expected tensors that the file holds in full, got views"),
        (
            {"w": torch.sparse_coo_tensor(torch.zeros(2, 0), torch.ones(0), (10**7, 10**7))},
            "expected dense tensors, got sparse",
        ),
        ({"w": torch.ones(3, device="meta")}, "expected dense tensors, got sparse or empty ones"),
        (itself, "expected a dict of tensors, got dict without any"),
        ({"w": torch.ones(2), "module.w": torch.zeros(2)}, "expected one tensor w, got module.w and another"),
    ]
    for content, message in cases:
        torch.save(content, path)
        with pytest.raises(TostError, match=message):
            Mask.load(path)
    torch.save({"w": torch.ones(1).expand(3, 3)}, path)
    assert Mask.load(path).kept == 9


@pytest.mark.parametrize(
    "shapes",
    [
        '{"w": [4294967296, 4294967296]}',
        '{"w": [-1, -16]}',
        '{"w": [true, 16]}',
        '{"w": [1e999]}',
        '{"w": [9223372036854775808, "3"]}',
        "[" * 100_000,
        '{"w": [' + "9" * 5000 + "]}",
    ],
)
def test_shapes_of_our_own_file_that_no_tensor_has(shapes: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for bits in (torch.zeros(2, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8)):
        save_file({"w": bits}, path, metadata={"format": "tost_mask", "shapes": shapes})
        with pytest.raises(TostError, match=r"mask file .*m\.safetensors: expected bits that fit the shapes it names"):
            Mask.load(path)


def test_masks_in_every_type_of_number(tmp_path: Path) -> None:
    types = [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.bfloat16,
        torch.complex64,
    ]
    for kind in types:
        torch.save({"w": torch.tensor([1.0, 0.0]).to(kind)}, tmp_path / "m.pt")
        assert Mask.load(tmp_path / "m.pt")["w"].tolist() == [True, False]


@pytest.mark.parametrize("trainer", ["torch", "composer", "lightning", "transformers", "accelerate"])
def test_a_run_from_a_stranger_is_not_resumed_by_running_its_code(trainer: str, tmp_path: Path) -> None:
    if trainer in ("composer", "lightning"):
        pytest.importorskip(trainer)
    pytest.importorskip("sklearn")
    files = {"torch": "last.pt", "composer": "last.pt", "lightning": "last.pt", "transformers": "checkpoint-1/optimizer.pt",
             "accelerate": "step-1/custom_checkpoint_0.pkl"}  # fmt: skip
    recipe = Recipe.of({**PLAIN, "trainer": trainer, "model": "cifar/resnet8", "duration": "1ep"})
    file = tmp_path / "run" / "checkpoints" / files[trainer]
    file.parent.mkdir(parents=True)
    recipe.to_yaml(tmp_path / "run" / "recipe.yaml")
    if file.parent.name != "checkpoints":  # else it is not taken for a checkpoint at all
        save_file({"w": torch.zeros(1)}, file.parent / "model.safetensors")
        (file.parent / "trainer_state.json").write_text("{}")
        for other in (
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
            "optimizer.bin",
            "scheduler.bin",
            "random_states_0.pkl",
        ):
            torch.save({}, file.parent / other)
    torch.save({"state": _Trap(tmp_path / "sprung")}, file)
    with pytest.raises(TostError, match=f"{file.name}: expected plain tensors, got a pickle with other objects"):
        train(recipe, tmp_path / "run", resume=True)
    assert not (tmp_path / "sprung").exists()
    for content in ("", "[" * 100_000, "[]", '{"a": '):
        (tmp_path / "run" / "result.json").write_text(content)
        with pytest.raises(TostError, match=r"result\.json: expected whole JSON, got something unreadable"):
            train(recipe, tmp_path / "run", resume=True)


class _Trap:
    """Pickled as a call of `Path.touch`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_tied_weights_are_exported_under_both_names(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    torch.save(net.state_dict(), tmp_path / "tied.pt")
    export(tmp_path / "tied.pt", tmp_path / "out.safetensors")
    with safe_open(str(tmp_path / "out.safetensors"), framework="pt") as file:
        assert all(torch.equal(file.get_tensor(name), net[0].weight) for name in ("0.weight", "1.weight"))


# Recipes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2", "the key 'seed' is there twice"),
        ("mask: {kind: random, sparsity: 0.5, sparsity: 0.9}", "the key 'sparsity' is there twice"),
        ("[" * 90_000, "nested deeper than 20 levels"),
        ("a:\n" + "".join(" " * i + "- a:\n" for i in range(1, 300)), "nested deeper than 20 levels"),
        ("seed: 0x" + "f" * 5000, "the number 0xf+... has 5002 digits"),
        ("name: " + "x" * 300_000, "more than 200,000 characters"),
        ("a: &b 1\nc: *b", "it has aliases"),
    ],
)
def test_yaml_is_bounded(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, yaml.YAMLError), match=message):
        plain_yaml.parse(text)
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(TostError, match=f"expected YAML, got something unreadable .*{message}"):
        Recipe.load(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2**32},
        {"seed": 10**400},
        {"name": "x" * 201},
        {"duration": "1e300ep"},
        {"data": {"batch_size": 10**9}},
        {"data": {"name": "folder", "image_size": 10**9}},
        {"optimizer": {"lr": float("inf")}},
        {"optimizer": {"lr": float("nan")}},
        {"optimizer": {"weight_decay": float("inf")}},
        {"mask": {"kind": "synflow", "sparsity": 0.5, "input_shape": [10**5, 10**5]}},
        {"mask": {"kind": "synflow", "sparsity": 0.5, "rounds": 10**9}},
        {"mask": {"kind": "snip", "sparsity": 0.5, "batches": 10**9}},
        {"mask": {"kind": "lottery_ticket", "sparsity": 0.9, "prune": 1e-17}},
        {"tweaks": [{"kind": "rescaled_init", "iterations": 10**9}]},
        {"model": "timm/" + "x" * 10**5},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_numbers_without_bounds_are_errors_that_say_so(changes: dict[str, Any]) -> None:
    with pytest.raises(TostError) as error:
        Recipe.of({**PLAIN, **changes})
    assert len(str(error.value)) < 500 and ": expected " in str(error.value)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800", "../" * 2000 + "r.yaml", ""])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    for read in (Mask.load, lambda name: export(name, tmp_path / "out")):
        with pytest.raises(TostError):
            read(name)
    with pytest.raises(TostError):
        Recipe.load(name or "no")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(TostError):
        Recipe.load(tmp_path / "folder.yaml")


def test_changes_from_the_shell_are_as_bounded_as_files() -> None:
    for change in ("mask=&a {b: *a}", "seed=" + "9" * 100, "name=" + "[" * 500, "mask={a: 1, a: 2}"):
        with pytest.raises(TostError, match="--set: expected a key of the recipe, got") as error:
            apply_changes(PLAIN, [change])
        assert str(error.value).isprintable()
    dated = plain_yaml.parse("name: 2001-12-14\nmask: {kind: random, sparsity: 0.5}")
    with pytest.raises(TostError, match="name: expected a valid string"):
        Recipe.from_dict(apply_changes(dated, ["seed=1"]))


def test_an_error_is_one_line_that_a_terminal_only_shows() -> None:
    error = TostError("a\nb \x1b[31mred\x07 \u202e" + "x" * 10_000)
    assert (
        str(error).startswith(r"a b \x1b[31mred\x07 \u202exx") and len(str(error)) < 3100 and str(error).isprintable()
    )


def test_names_in_a_recipe_or_a_mask_are_shown_and_not_obeyed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "[/red][link=x] \x1b[31m"
    with progress(False) as listen:
        assert listen is not None
        listen("run", {"name": name, "model": "m", "data": "d", "total": 1, "trainer": "torch"})
        listen("step", {"step": 1, "total": 1, "loss": 0.0})
    assert r"[/red][link=x] \x1b[31m: m on d" in capsys.readouterr().err
    Mask({name: torch.ones(2)}).save(tmp_path / "m.safetensors")
    shown = CliRunner().invoke(app, ["mask", "inspect", str(tmp_path / "m.safetensors")], catch_exceptions=False).stdout
    assert r"\x1b" in re.sub(r"\s", "", shown) and "\x1b[31m" not in shown


# Images


def test_images_that_do_not_fit_into_memory_are_refused_before_it_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / name / f"{number}.png")
    spec = DataSpec(name="folder", path=str(tmp_path), image_size=4096)
    monkeypatch.setattr(os, "sysconf", lambda name: 1 << 14)  # 2 ** 28 bytes in all
    with pytest.raises(TostError, match="expected images that fit into this machine's 0 GiB, got '0 GiB'"):
        load(spec)
    assert load(DataSpec(name="folder", path=str(tmp_path), image_size=4)).classes == 2
