"""What strangers may send: recipes, masks and checkpoints, generated, and valid ones torn, flipped and spliced.

Each input must end in success or in a TostError of one line. tests/test_strangers.py runs some hundreds; by hand:

    python tests/fuzz.py --target recipe|mask|export|packed|index --count 10000 [--seed 0] [--engine hypothesis|atheris]

It prints how many inputs ended how, and stops at the first that ends in anything else (after 120 s as a hang).
"""

from __future__ import annotations

import argparse
import atexit
import collections
import faulthandler
import io
import json
import pickle
import struct
import sys
import tempfile
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import yaml
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn
from torch.nn.utils import prune

from tost_plugins import Mask, Recipe, TostError, load_packed
from tost_plugins.files.packed import FORMAT, checksum, save_packed
from tost_plugins.lab.export import export
from tost_plugins.recipe.recipe import shipped

ENDINGS: collections.Counter[str] = collections.Counter()


def ends_well(action: Callable[[], object]) -> None:
    """The action succeeds or raises a TostError of one line; anything else comes through."""
    try:
        action()
    except TostError as error:
        text = str(error)
        assert text.isprintable() and len(text) < 3200, ascii(text)
        ENDINGS["TostError"] += 1
    else:
        ENDINGS["success"] += 1


# Targets: what happens to a file


def read_recipe(path: Path) -> None:
    recipe = Recipe.load(path)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    recipe.to_yaml(path.with_suffix(".out"))
    assert Recipe.load(path.with_suffix(".out")) == recipe


def read_mask(path: Path) -> None:
    mask = Mask.load(path)
    assert 0 <= mask.sparsity <= 1 and len(mask.sparsities()) == len(mask)
    mask.save(path.with_suffix(".out"))
    assert Mask.load(path.with_suffix(".out")) == mask


def read_checkpoint(path: Path) -> None:
    export(path, path.with_suffix(".out"), unfinished=True)


def read_packed(path: Path) -> None:
    net = network()
    load_packed(net, path)(torch.zeros(1, 1, 3, 3))


def read_index(path: Path) -> None:
    """A folder of torch.distributed.checkpoint with this index, beside the data of a valid one."""
    folder = path.with_suffix(".dcp")
    if not folder.exists():
        dcp.save({"model": network().state_dict()}, checkpoint_id=str(folder))
    (folder / ".metadata").write_bytes(path.read_bytes())
    read_mask(folder)


TARGETS = {
    "recipe": read_recipe,
    "mask": read_mask,
    "export": read_checkpoint,
    "packed": read_packed,
    "index": read_index,
}


def attempt(target: str, content: bytes, folder: Path) -> None:
    path = folder / "input"
    path.write_bytes(content)
    ends_well(lambda: TARGETS[target](path))


# Valid inputs


def recipes() -> list[bytes]:
    return [path.read_bytes() for path in shipped().values()]


def network() -> nn.Sequential:
    """A small network, of which much is 0."""
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        net[0].weight[::2] = 0
    return net


def packed() -> list[bytes]:
    """Its packed file, and one of the same network without its last channel."""
    net, small = network(), nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    with tempfile.TemporaryDirectory() as folder:
        whole, part = Path(folder) / "whole", Path(folder) / "part"
        save_packed(whole, net.state_dict())
        save_packed(part, small.state_dict(), SIZES)
        return [whole.read_bytes(), part.read_bytes()]


SIZES = {"0": {"in_channels": (1, 1), "out_channels": (3, 2), "groups": (1, 1)},
         "2": {"in_features": (3, 2), "out_features": (2, 2)}}  # fmt: skip


def indexes() -> list[bytes]:
    """What torch.distributed.checkpoint says of its folder, in two layouts."""
    found = []
    for state in (network().state_dict(), {"model": network().state_dict(), "epoch": 3}):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state, checkpoint_id=folder)
            found.append((Path(folder) / ".metadata").read_bytes())
    return found


def masks() -> list[bytes]:
    """A small network's mask in each format that is read: ours, pruned, plain, weights, old torch, numpy, nested."""
    net = network()
    mask = Mask.from_zeros({"0.weight": net[0].weight, "2.weight": net[2].weight})
    with tempfile.TemporaryDirectory() as folder:
        mask.save(Path(folder) / "mask")
        found = [(Path(folder) / "mask").read_bytes()]
    plain = {name: tensor.float() for name, tensor in mask.items()}
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for layer in (net[0], net[2]):
        prune.random_unstructured(layer, "weight", amount=0.5)
    ghosts = {**weights, "0.weight_mask": mask["0.weight"], "0.ghost_skip.alpha": torch.tensor(0.5),
              "tost_clock": torch.tensor([3, 9, -1]), "1.tost_beta": torch.tensor(1.0)}  # fmt: skip
    nested = {"state": {"model": {f"module.{name}": w for name, w in weights.items()}}, "epoch": 3,
              "rng": [("numpy", np.arange(4, dtype=np.uint32)), torch.get_rng_state()]}  # fmt: skip
    contents = [net.state_dict(), plain, dict(mask), weights, ghosts, nested]
    found += [_saved(content) for content in contents] + [_saved(net.state_dict(), zipped=False)]
    found += [save({name: w.contiguous() for name, w in content.items()}) for content in (plain, ghosts)]
    array = io.BytesIO()
    np.savez(array, **{name: w.numpy() for name, w in plain.items()})
    single = io.BytesIO()
    np.save(single, plain["0.weight"].numpy())
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(network().eval()), script)
    front = {
        "0.parametrizations.weight.original": weights["0.weight"],
        "0.parametrizations.weight.0.mask": mask["0.weight"],
    }
    found += [script.getvalue(), _saved(front)]
    return [*found, array.getvalue(), single.getvalue(), pickle.dumps({n: w.numpy() for n, w in plain.items()}, 2)]


def _saved(content: object, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


# Mutations

INTERESTING = [
    b"\x00",
    b"\xff",
    b"{",
    b"[",
    b'"',
    b"-1",
    b"9" * 30,
    b"NaN",
    b"\xff\xff\xff\x7f",
    b"(",
    b")",
    b".",
    b"h\x01",
    b"q\x01",
    b"\x85",
    b"\x86",
    b"R",
    b"}",
    b"s",
    b"cbuiltins\neval\n",
    b"cbuiltins\nbytearray\n",
    b"null",
    b"F8_E4M3",
    b"U64",
    b"C64",
    b"!!python/name:os.system",
    b"&a ",
    b"*a",
    b"<<: ",
    b"\xe2\x80\xa8",
    b"\xed\xa0\x80",
    b"!!binary ",
    b"2001-12-14",
    b"1:2:3",
    b"0x",
    b"? ",
    b"- ",
    b": ",
    b"\n",
    b"\t",
]


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid input with some of its bytes changed, also inside a zip file, whose checksums then fit again."""
    content = draw(st.sampled_from(seeds))
    others = st.sampled_from(seeds)
    if zipfile.is_zipfile(io.BytesIO(content)) and draw(st.booleans()):
        return _within(content, draw)
    for _ in range(draw(st.integers(1, 4))):
        content = _changed(content, draw, others)
    return content


def _changed(content: bytes, draw: st.DrawFn, others: st.SearchStrategy[bytes]) -> bytes:
    at = draw(st.integers(0, min(len(content), 4000)))  # the heads of files say how to read the rest
    end = min(len(content), at + draw(st.integers(0, 8)))
    kind = draw(st.sampled_from(["flip", "cut", "drop", "insert", "splice", "again"]))
    if kind == "flip":
        return content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
    if kind == "cut":
        return content[:at]
    if kind == "drop":
        return content[:at] + content[end:]
    if kind == "insert":
        return content[:at] + draw(st.sampled_from(INTERESTING)) + content[end:]
    if kind == "splice":
        other = draw(others)
        return content[:at] + other[draw(st.integers(0, len(other))) :]
    return content[:at] + content[at:end] * draw(st.integers(2, 50)) + content[end:]


def _within(content: bytes, draw: st.DrawFn) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        entries = {entry.filename: file.read(entry) for entry in file.infolist()}
    name = draw(st.sampled_from([*[n for n in entries if n.endswith("data.pkl")] * 3, *entries]))
    for _ in range(draw(st.integers(1, 3))):
        entries[name] = _changed(entries[name], draw, st.sampled_from(list(entries.values())))
    packing = draw(st.sampled_from([zipfile.ZIP_STORED] * 3 + [zipfile.ZIP_DEFLATED]))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packing) as file:
        for key, value in entries.items():
            file.writestr(key, value)
    return stream.getvalue()


# Grammars

KEYS = [
    "name",
    "source",
    "seed",
    "mask",
    "tweaks",
    "model",
    "data",
    "optimizer",
    "schedule",
    "duration",
    "trainer",
    "precision",
    "kind",
    "sparsity",
    "allocation",
    "ignore",
    "batches",
    "rounds",
    "input_shape",
    "until",
    "every",
    "path",
    "limit",
    "batch_size",
    "image_size",
    "lr",
    "at",
    "warmup",
    "iterations",
    "norm",
    "prune",
    "<<",
    "__class__",
    "a\x00b",
]
WORDS = [
    "random",
    "snip",
    "synflow",
    "file",
    "lottery_ticket",
    "ghost_skip",
    "rescaled_init",
    "global",
    "erk",
    "0.4dur",
    "60ep",
    "1e300ep",
    "9" * 30 + "ba",
    "../../etc/passwd",
    "/dev/zero",
    "*" * 30 + "a",
    "[!a-",
    "\ud800",
    "\x00",
    "ａ",
    "\u202e",
    "1.5e400",
    "-0",
    "inf",
    "[/bold]",
    "\x1b[31m",
    "x" * 5000,
]
SCALARS = st.one_of(
    st.sampled_from(WORDS),
    st.text(max_size=20),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([2**63, -(2**63) - 1, 10**39, 10**400, float("nan"), float("inf"), -0.0, 5e-324]),
)
NAMES = st.one_of(st.sampled_from(KEYS), st.text(max_size=8), st.integers(-1, 3))
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(NAMES, v, max_size=4), max_leaves=12)
SNIPPETS = st.sampled_from(
    [
        "!!python/object/apply:os.system [id]",
        "!!python/name:os.system ",
        "&a ",
        "*a",
        "!!set {a, b}",
        "!!binary aGk=",
        "!!omap [a: 1]",
        "<<: ",
        "? ",
        "- ",
        ": ",
        "{",
        "}",
        "[",
        "]",
        "|\n ",
        ">\n ",
        "\n",
        " ",
        "#",
        "---\n",
        "...\n",
        "%YAML 9.9\n",
        "'",
        '"',
        ",",
        "\t",
        "!",
        "2001-99-99",
        "0x" + "f" * 5000,
        "190:20:30",
        ".nan",
        "\\ud800",
        '"\\ud800"',
        "~",
        "mask: ",
        "kind: ",
        "random",
        "sparsity: 0.5",
        "\x85",
    ]
) | st.text(max_size=4)


@st.composite
def edited(draw: st.DrawFn) -> bytes:
    """A shipped recipe with some values exchanged for any."""
    recipe: Any = yaml.safe_load(draw(st.sampled_from(recipes())))
    for _ in range(draw(st.integers(1, 3))):
        place, key = recipe, draw(NAMES)
        for _ in range(draw(st.integers(0, 2))):
            inner = [
                value
                for value in (place.values() if isinstance(place, dict) else place)
                if isinstance(value, dict | list)
            ]
            place = draw(st.sampled_from(inner)) if inner else place
        if isinstance(place, dict):
            key = draw(st.sampled_from(list(place))) if place and draw(st.booleans()) else key
            place[key] = draw(VALUES)
        elif place:
            place[draw(st.integers(0, len(place) - 1))] = draw(VALUES)
    return _dumped(recipe)


def _dumped(value: object) -> bytes:
    sys.set_int_max_str_digits(0)
    text = yaml.safe_dump(value, allow_unicode=True)
    sys.set_int_max_str_digits(4300)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def headed(draw: st.DrawFn) -> bytes:
    """A safetensors file with any header: types, shapes, offsets and the shapes of our masks."""
    side = st.sampled_from([0, 1, 2, 3, 8, -1, 2**31, 2**32, 2**63, 10**20, True, 1.5, "3", None])
    types = st.sampled_from(
        ["U8", "BOOL", "F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "F4", "U16", "U32", "U64", "I64", "C64", "X"]
    )
    head: dict[str, Any] = {}
    data = draw(st.sampled_from([b"", b"\x01", b"\x00\x01" * 8, b"\xff" * 64]))
    for name in draw(
        st.lists(st.sampled_from(["w", "0.weight", "w_mask", "module.w", "x.weight_mask", "", "\x1b[0m"]), max_size=3)
    ):
        span = draw(st.sampled_from([[0, len(data)], [0, 0], [0, 1], [len(data), 0], [0, 2**40]]))
        shape = draw(st.one_of(st.just([len(data)]), st.lists(side, max_size=4)))
        head[name] = {"dtype": draw(types), "shape": shape, "data_offsets": span}
    if draw(st.booleans()):
        shapes: Any = {
            name: draw(st.one_of(st.just([len(data) * 8]), st.lists(side, max_size=4), VALUES)) for name in head
        }
        text = draw(st.one_of(st.just(json.dumps(shapes)), st.just("[" * 3000), st.text(max_size=5)))
        head["__metadata__"] = {"format": "tost_mask", "shapes": text}
    text = json.dumps(head).encode()
    length = draw(st.sampled_from([len(text), len(text), len(text), len(text) + 1, 2**40, 0]))
    return struct.pack("<Q", length) + text + data


@st.composite
def described(draw: st.DrawFn) -> bytes:
    """A packed file whose checksum is right, and whose header says anything about what is in it."""
    side = st.sampled_from([0, 1, 2, 3, 9, -1, 2**31, 2**63, 10**20, True, 1.5, "3", None, [3, 2], [3, 3], [3]])
    tensors = {name: tensor.clone() for name, tensor in network().state_dict().items()}
    tensors["0.weight"] = tensors["0.weight"].reshape(-1)[9:18]
    tensors["bits:0.weight"] = torch.from_numpy(np.packbits([i in range(9, 18) for i in range(27)]))
    shapes, sizes = {"0.weight": [3, 1, 3, 3]}, {}
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(["0.weight", "2.weight", "0.bias", "other", ""]))
        path = draw(st.sampled_from(["0", "2", "1", "", "other"]))
        change = draw(st.sampled_from(["drop", "cut", "shape", "size", "sizes", "shapes"]))
        if change == "drop":
            tensors.pop(draw(st.sampled_from(sorted(tensors))))
        elif change == "cut":
            key = draw(st.sampled_from(sorted(tensors)))
            tensors[key] = tensors[key][: draw(st.integers(0, 3))].clone()
        elif change == "shape":
            shapes = {**shapes, name: draw(st.lists(side, max_size=4))}
        elif change == "size":
            sizes = {
                path: draw(st.dictionaries(st.sampled_from(["in_channels", "in_features", "groups"]), side, max_size=3))
            }
        elif change == "sizes":
            sizes = draw(VALUES)
        else:
            shapes = draw(st.one_of(st.just({}), VALUES))
        if not isinstance(shapes, dict):
            break
    version = draw(st.sampled_from([1] * 9 + [0, 2, "1", None, 10**20, True]))
    about = {"version": version, "checksum": checksum(tensors), "shapes": shapes, "sizes": sizes}
    return save(tensors, metadata={FORMAT: json.dumps(about, default=str)})


def inputs(target: str) -> st.SearchStrategy[bytes]:
    if target == "recipe":
        return st.one_of(
            mutated(recipes()),
            edited(),
            VALUES.map(_dumped),
            st.binary(max_size=60),
            st.lists(SNIPPETS, max_size=20).map(lambda parts: "".join(parts).encode("utf-8", "surrogatepass")),
        )
    if target == "packed":
        return st.one_of(mutated(packed()), described(), described(), headed(), st.binary(max_size=60))
    if target == "index":
        return st.one_of(mutated(indexes()), mutated(indexes()), st.binary(max_size=60))
    return st.one_of(mutated(masks()), mutated(masks()), headed(), st.binary(max_size=60))


# Engines


def with_hypothesis(target: str, count: int, seed: int, folder: Path) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(inputs(target))
    def run(content: bytes) -> None:
        faulthandler.dump_traceback_later(120, exit=True)
        attempt(target, content, folder)

    run()


def with_atheris(target: str, count: int, seed: int, folder: Path) -> None:
    import atheris  # pip install atheris; it wants Python 3.12 at most

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, content in enumerate({"recipe": recipes, "packed": packed, "index": indexes}.get(target, masks)()):
        (corpus / str(number)).write_bytes(content)
    for function in _functions():
        atheris.instrument_func(function)
    options = [
        f"-runs={count}",
        f"-seed={seed + 1}",
        "-max_len=8192",
        "-timeout=120",
        "-rss_limit_mb=8192",
        str(corpus),
    ]
    atheris.Setup([sys.argv[0], *options], lambda content: attempt(target, content, folder))
    atexit.register(lambda: print(_summary(target, "atheris", seed)))
    atheris.Fuzz()  # ends the process


def _summary(target: str, engine: str, seed: int) -> str:
    return f"{target}, {engine}, seed {seed}: {sum(ENDINGS.values())} inputs, {dict(ENDINGS)}"


def _functions() -> list[types.FunctionType]:
    """Those that read the files: all of torch would take minutes to prepare."""
    found = []
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("tost_plugins", "yaml", "pickletools"):
            kinds = [module, *(thing for thing in vars(module).values() if isinstance(thing, type))]
            found += [f for kind in kinds for f in vars(kind).values() if isinstance(f, types.FunctionType)]
    return [f for f in dict.fromkeys(found) if f.__module__.split(".")[0] in ("tost_plugins", "yaml", "pickletools")]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--target", choices=TARGETS, required=True)
    arguments.add_argument("--count", type=int, default=10_000)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--engine", choices=["hypothesis", "atheris"], default="hypothesis")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = with_hypothesis if given.engine == "hypothesis" else with_atheris
        try:
            engine(given.target, given.count, given.seed, Path(folder))
        finally:
            print(_summary(given.target, given.engine, given.seed))


if __name__ == "__main__":
    main()
