"""Every kind of file and folder, made by the real programs: read exactly, or refused in one line that names it."""

import importlib
import json
import pickle
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import refused, tost
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata, planner

from tost_plugins import Mask, Recipe, Session, compact, load_packed, masks
from tost_plugins.channels.sizes import changed
from tost_plugins.files.packed import save_packed
from tost_plugins.files.records import read_records
from tost_plugins.files.renamed import own_names
from tost_plugins.lab.export import export

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # as if run from their folder
formats, made, trainers = map(importlib.import_module, ("formats", "formats_made", "formats_trainers"))

# What is not read, by format and maker, and what the one line says; all else is "exact".
MASKS_ALONE = "expected a checkpoint, got masks, and no weights; see tost mask"
REFUSED: dict[tuple[str, str], tuple[str, str]] = {
    ("masks, 0 and 1", "`torch.save`"): ("exact", MASKS_ALONE),
    ("masks, bool", "safetensors"): ("exact", MASKS_ALONE),
    ("masks", "`np.savez`"): ("exact", MASKS_ALONE),
    ("masks, compressed", "`np.savez_compressed`"): ("exact", MASKS_ALONE),
    ("our masks", "`Mask.save`"): ("exact", "got a mask file, which holds no weights; see tost mask"),
    ("our exports, packed", "`tost export --packed`"): ("exact", "load it with tost_plugins.load_packed"),
    ("our exports, compact", "`tost export --compact`"): ("exact", "load it with tost_plugins.load_packed"),
    ("prepared model", "`torch.ao.pruning`"): ("take it off, then save (sparsifier.squash_mask",) * 2,
    ("whole model", "`torch.save`"): ("save it again as torch.save(model.state_dict(), path)",) * 2,
    ("masks without names", "`np.savez`"): ("np.savez(path, **{name: array})",) * 2,
    ("one array", "`np.save`"): ("one array of NumPy, which has no name; np.savez(path, **{name: mask})",) * 2,
    ("TorchScript, frozen", "`torch.jit.freeze`"): ("save the network before it is frozen",) * 2,
    ("ONNX", "`torch.onnx.export`"): ("use the checkpoint that it was made of",) * 2,
    ("one file of such a folder", "torch.distributed.checkpoint"): ("pass its folder",) * 2,
    ("one shard of several", "transformers"): (
        "(others: model-00002-of-00002.safetensors); pass their folder, or model.safetensors.index.json",) * 2,
}  # fmt: skip
LONG = ("folder of two ranks", "ONNX", "checkpoint", "folder of a run, with masks")  # they take seconds each
ROWS = [
    pytest.param(
        row,
        marks=[pytest.mark.long] if row.format in LONG else [],
        id=f"{row.format}, {row.made_with}".replace("`", ""),
    )
    for row in formats.ROWS
    if "sparsimony" not in formats.missing(row)  # it is no package that tests ask for
]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.filterwarnings("ignore")
def test_a_mask_is_read_exactly_or_refused_in_one_line(row: Any, tmp_path: Path) -> None:
    for package in row.needs:
        pytest.importorskip(package)
    (tmp_path / "made").mkdir()
    found = formats.outcome(row.make(tmp_path / "made"), tmp_path)
    for got, wanted in zip(found, REFUSED.get((row.format, row.made_with), ("exact", "exact")), strict=True):
        assert got == wanted if wanted == "exact" else wanted in got, found


def small() -> tuple[nn.Module, Mask]:
    torch.manual_seed(0)
    return made.sparse(made.small())


def saved(tensors: dict[str, Any], folder: Path, name: str = "a.pt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / name)
    return folder / name


# Masks beside their weights


def test_parametrizations_as_sparsimony_keeps_them(tmp_path: Path) -> None:
    net, mask = small()
    state = {name: tensor for name, tensor in net.state_dict().items() if name not in mask}
    for name, kept in mask.items():
        front = f"module.{name.removesuffix('.weight')}.parametrizations.weight"
        state |= {f"{front}.original": torch.ones(kept.shape), f"{front}.0.mask": kept.float(),
                  f"{front}.0.dense_grad": torch.randn(kept.shape)}  # fmt: skip
    path = saved(state, tmp_path)
    assert Mask.load(path) == mask
    done = export(path, tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    made.small().load_state_dict(written, strict=True)
    assert all(torch.equal(written[name], kept.float()) for name, kept in mask.items())
    assert done["sparsity"] == pytest.approx(mask.sparsity)


def test_two_masks_of_one_weight_are_both_its_masks(tmp_path: Path) -> None:
    front = "fc.parametrizations.weight"
    parts = {f"{front}.original": torch.ones(2, 2), f"{front}.0.mask": torch.tensor([[1, 1], [0, 1]]),
             f"{front}.1.mask": torch.tensor([[1, 0], [1, 1]])}  # fmt: skip
    assert Mask.load(saved(parts, tmp_path))["fc.weight"].tolist() == [[True, False], [False, True]]
    other = {**parts, f"{front}.2.scale": torch.tensor(3.0)}
    assert Mask.load(saved(other, tmp_path))["fc.weight"].tolist() == [[True, False], [False, True]]
    refused(lambda: export(tmp_path / "a.pt", tmp_path / "out"), "fc.weight under more parametrizations than its mask")


def test_a_weight_that_nobody_can_tell_is_left_out_beside_sparse_ones_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tost_plugins")
    parts = {"a.parametrizations.weight.original": torch.ones(2, 2), "b.weight": torch.eye(2)}
    assert list(Mask.load(saved(parts, tmp_path))) == ["b.weight"]
    assert "checkpoint: without a.weight under a parametrization" in caplog.text
    parts["b.weight"] = torch.ones(2, 2)
    refused(lambda: Mask.load(saved(parts, tmp_path)), "got a.weight under a parametrization", "then save")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"w": torch.eye(2), "attn_mask": torch.ones(3)}, {"w": [[True, False], [False, True]]}),
        ({"fc.weight": torch.ones(2, 2), "fc.mask": torch.eye(2)}, {"fc.weight": [[True, False], [False, True]]}),
        ({"fc.weight": 2 * torch.eye(2), "fc.mask": torch.tensor([1.0, 0.5])}, {"fc.weight": [[True, False], [False, True]]}),
        ({"a_mask": torch.eye(2), "b_mask": torch.ones(2)}, {"a": [[True, False], [False, True]], "b": [True, True]}),
        (
            {"fc.weight": 2 * torch.eye(2), "pos_embed": torch.zeros(1, 2, 2), "causal_mask": torch.eye(3)},
            {"fc.weight": [[True, False], [False, True]]},
        ),
    ],
    ids=["no weight of its shape", "a layer's own", "no mask", "masks alone", "zeros of what is no layer"],
)  # fmt: skip
def test_what_counts_as_a_mask_and_as_a_weight(
    content: dict[str, Tensor], expected: dict[str, Any], tmp_path: Path
) -> None:
    found = Mask.load(
        saved({"state_dict": {**content, "n": torch.tensor(7)}} if "a_mask" not in content else content, tmp_path)
    )
    assert {name: kept.tolist() for name, kept in found.items()} == expected


Q = torch.tensor([[7, 0], [-3, 9]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("layer", "made"),
    [
        ({"qweight": Q, "qzeros": Q, "scales": torch.ones(1, 2), "g_idx": torch.arange(2)}, "GPTQ or AWQ"),
        ({"weight": Q.to(torch.uint8), "weight.absmax": torch.ones(2)}, ""),
        ({"weight": Q.to(torch.int8), "SCB": torch.ones(2)}, ""),
        ({"weight_packed": Q, "weight_scale": torch.ones(2, 1)}, "compressed-tensors"),
        ({"compressed": torch.ones(3), "bitmask": Q.to(torch.uint8)}, "compressed-tensors"),
        ({"W_q": Q.to(torch.uint8), "scale": torch.ones(2)}, "HQQ"),
        ({"up_blocks": Q.to(torch.uint8), "up_scales": Q.to(torch.uint8)}, "MXFP4"),
        ({"scale": torch.tensor(1.0), "zero_point": torch.tensor(0)}, "torch.ao.quantization"),
        ({"weight": Q, "bias": torch.ones(2)}, ""),
    ],
    ids=["GPTQ", "4 bits", "8 bits", "packed", "bits of a mask", "HQQ", "MXFP4", "torch.ao", "integers"],
)
def test_quantized_weights_are_not_passed_over(layer: dict[str, Tensor], made: str, tmp_path: Path) -> None:
    around = {"head.weight": 2 * torch.eye(2), "norm.weight": torch.ones(2)}
    path = saved({f"fc.{name}": tensor for name, tensor in layer.items()} | around, tmp_path)
    for read in (Mask.load, lambda path: export(path, tmp_path / "out.safetensors")):
        refused(
            lambda read=read: read(path),
            "expected weights as numbers, got fc.",
            f"quantized{made and f' ({made})'}; use the",
        )
    assert not (tmp_path / "out.safetensors").exists()


def test_weights_that_are_to_be_quantized_are_weights(tmp_path: Path) -> None:
    observed = {
        "fc.weight_fake_quant.scale": torch.ones(1),
        "fc.weight_fake_quant.zero_point": torch.zeros(1, dtype=torch.int32),
    }
    assert list(Mask.load(saved({"fc.weight": 2 * torch.eye(2), **observed}, tmp_path))) == ["fc.weight"]
    query = {"a.W_q": 2 * torch.eye(2), "a.up_blocks": torch.ones(2, 2), "a.up_scales": torch.ones(2)}
    assert list(Mask.load(saved(query, tmp_path))) == ["a.W_q", "a.up_blocks"]


def test_what_peft_adds_is_no_mask_unless_it_shows_one(tmp_path: Path) -> None:
    base, down, up = {"fc.base_layer.weight": 2 * torch.eye(2)}, torch.full((1, 2), 0.3), torch.zeros(2, 1)
    small = {"fc.lora_A.default.weight": down, "fc.lora_B.default.weight": up}
    assert list(Mask.load(saved({**base, **small}, tmp_path))) == list(base)
    refused(
        lambda: Mask.load(saved(small, tmp_path)), "got those that PEFT adds to a network; merge_and_unload() there"
    )
    pruned = {"fc.lora_A.default.weight": torch.tensor([[1.0, 0.0]]), "fc.lora_B.default.weight": up}
    assert list(Mask.load(saved({**base, **pruned}, tmp_path))) == [*base, "fc.lora_A.default.weight"]


# Folders and parts of something


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("zero_to_fp32.py", "a folder of DeepSpeed; python zero_to_fp32.py"),
        ("global_step10/mp_rank_00_model_states.pt", "a folder of DeepSpeed; pass mp_rank_00_model_states.pt"),
        ("saved_model.pb", "a folder of TensorFlow; save the weights with np.savez"),
        ("_CHECKPOINT_METADATA", "a folder of Orbax"),
        ("openvino_model.xml", "a folder of OpenVINO"),
    ],
)
def test_folders_that_are_only_named(file: str, said: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("what is in it does not count")
    for read in (Mask.load, lambda path: export(path, tmp_path / "out")):
        refused(lambda read=read: read(tmp_path), f"expected a checkpoint, got {said}")
    save_file(
        {"fc.weight": 2 * torch.eye(2)}, tmp_path / "model.safetensors"
    )  # a trainer has put the whole network beside
    assert Mask.load(tmp_path).kept == 2


def test_a_file_that_names_the_latest_is_nothing_special(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("epoch_3.pth")
    saved({"fc.weight": 2 * torch.eye(2)}, tmp_path, "epoch_3.pth")
    assert Mask.load(tmp_path).kept == 2


def test_of_several_things_in_a_folder_none_is_taken_in_silence(tmp_path: Path) -> None:
    weights = {"fc.weight": 2 * torch.eye(2)}
    refused(lambda: Mask.load(tmp_path), "mask file", "got none; check the path")
    saved(weights, tmp_path / "lightning_logs", "epoch=0-step=4.ckpt")
    assert Mask.load(tmp_path / "lightning_logs").kept == 2
    (tmp_path / "lightning_logs" / "last.ckpt").symlink_to("epoch=0-step=4.ckpt")
    assert Mask.load(tmp_path / "lightning_logs").kept == 2  # one file under two names
    saved(weights, tmp_path / "lightning_logs", "epoch=1-step=8.ckpt")
    refused(lambda: Mask.load(tmp_path / "lightning_logs"), "got several (", "epoch=1-step=8.ckpt", "pass one of them")
    for name in ("model.safetensors", "model_1.safetensors"):
        (tmp_path / "gan").mkdir(exist_ok=True)
        save_file(weights, tmp_path / "gan" / name)
    for read in (Mask.load, lambda path: export(path, tmp_path / "out")):
        refused(
            lambda read=read: read(tmp_path / "gan"),
            "got model.safetensors and model_1.safetensors; pass the file of one",
        )
    saved({"state": {"0": torch.ones(1)}}, tmp_path / "gan", "optimizer.bin")
    (tmp_path / "gan" / "model_1.safetensors").unlink()
    assert Mask.load(tmp_path / "gan").kept == 2


def test_the_newest_checkpoint_of_a_trainer_and_the_mask_of_a_run(tmp_path: Path) -> None:
    for step, kept in ((9, 1), (10, 2)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file({"fc.weight": torch.arange(4.0).view(2, 2) * (torch.arange(4).view(2, 2) > 3 - kept)},
                  tmp_path / f"checkpoint-{step}" / "model.safetensors")  # fmt: skip
    assert Mask.load(tmp_path).kept == 2
    Mask({"fc.weight": torch.ones(2, 2)}).save(tmp_path / "mask.safetensors")
    assert Mask.load(tmp_path).kept == 4


def test_shards_and_their_index(tmp_path: Path) -> None:
    shards = {f"net-{i}-of-2.safetensors": {f"{i}.weight": 2.0 * torch.eye(2)} for i in (1, 2)}
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / name)
    alone = tmp_path / "net-1-of-2.safetensors"
    refused(
        lambda: Mask.load(alone), "got one of several shards (others: net-2-of-2.safetensors)", "with their .index.json"
    )
    refused(lambda: Mask.load(tmp_path), "got one of several shards", "with their .index.json")
    index, places = (
        tmp_path / "net.safetensors.index.json",
        {f"{i}.weight": f"net-{i}-of-2.safetensors" for i in (1, 2)},
    )
    index.write_text(json.dumps({"weight_map": places}))
    assert list(Mask.load(tmp_path)) == list(Mask.load(index)) == ["1.weight", "2.weight"]
    refused(lambda: Mask.load(alone), "pass their folder, or net.safetensors.index.json")
    alone.rename(tmp_path / "first.safetensors")
    refused(
        lambda: Mask.load(index),
        "expected all of its 2 shards beside it, got none of net-1-of-2.safetensors; copy them too",
    )
    (tmp_path / "sub").mkdir()
    for other in ("../first.safetensors", "/etc/passwd", "sub"):
        index.write_text(json.dumps({"weight_map": {"1.weight": other}}))
        refused(lambda: Mask.load(index), "expected all of its 1 shards beside it, got none of", other)
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "["):
        index.write_text(text)
        refused(lambda: Mask.load(index), "net.safetensors.index.json: expected")


# torch.distributed.checkpoint


class InParts(Tensor):
    """A tensor that torch.distributed.checkpoint writes as it does one of which two ranks have two rows each."""

    def __create_write_items__(self, name: str, _: Any) -> list[planner.WriteItem]:
        properties = metadata.TensorProperties.create_from_tensor(self)
        return [
            planner.WriteItem(
                index=metadata.MetadataIndex(name, [row, 0]),
                type=planner.WriteItemType.SHARD,
                tensor_data=planner.TensorWriteData(
                    metadata.ChunkStorageMetadata(torch.Size([row, 0]), torch.Size([2, self.shape[1]])),
                    properties,
                    self.shape,
                ),
            )
            for row in (0, 2)
        ]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        row = index.offset[0]
        return self.as_subclass(Tensor)[row : row + 2].clone()


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Tensor]:
    """A folder with a tensor in two parts, and the tensor."""
    whole = torch.randn(4, 6) * (torch.rand(4, 6) < 0.5)
    state = {"model": {"fc.weight": whole.as_subclass(InParts)}, "epoch": 3}
    torch.distributed.checkpoint.save(state, checkpoint_id=str(tmp_path / "dcp"))
    return tmp_path / "dcp", whole


@pytest.mark.filterwarnings("ignore")
def test_parts_of_a_tensor_are_put_together(parts: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, whole = parts
    assert torch.equal(Mask.load(folder)["fc.weight"], whole != 0)
    export(folder, tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["fc.weight"], whole)
    shutil.move(folder, tmp_path / "pytorch_model_fsdp_0")  # as accelerate calls it
    assert torch.equal(Mask.load(tmp_path)["fc.weight"], whole != 0)


@pytest.mark.filterwarnings("ignore")
def test_an_index_from_a_stranger_runs_no_code_and_takes_no_memory(parts: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, _ = parts
    index = (folder / ".metadata").read_bytes()
    changes = {
        "one file for another": index.replace(b"__0_0.distcp", b"../../../etc"),
        "torn": index[:-200],
        "another size": index.replace(b"K\x04K\x06\x86", b"K\x09K\x06\x86"),
        "code": pickle.dumps(_Trap(tmp_path / "sprung")),
        "a tuple of tuples": _hash_bomb(),
        "memory by a number": b"\x80\x04Nr\xff\xff\xff\x7f.",
        "other codes": b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",
        "nothing": b"",
    }
    for change, content in changes.items():
        if change != "parts are missing":
            assert content != index
            (folder / ".metadata").write_bytes(content)
            refused(
                lambda: Mask.load(folder), "expected a whole folder of torch.distributed.checkpoint, got a damaged one"
            )
    assert not (tmp_path / "sprung").exists()


class _Trap:
    """Pickled as a call of `Path.touch`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def _hash_bomb() -> bytes:
    """A key that is a tuple of a tuple twice, of a tuple twice, ...: to hash it takes 2 ** 60 steps."""
    return b"\x80\x02})" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)) + b"K\x01s."


def test_records_are_names_and_spoil_nothing(tmp_path: Path) -> None:
    found = read_records(pickle.dumps({"a": _Trap(tmp_path / "sprung"), "b": [1, (2.5, None)]}))
    assert not (tmp_path / "sprung").exists()
    assert found["a"].name in ("getattr", "Path.touch") and found["b"] == [1, (2.5, None)]


# Archives


def test_arrays_of_numpy_that_are_none(tmp_path: Path) -> None:
    path, kept = tmp_path / "m.npz", np.array([[True, False], [True, True]])
    np.savez(path, **{"fc.weight": np.asfortranarray(kept), "other": kept.astype(">f4")})
    assert [mask.tolist() for mask in Mask.load(path).values()] == [kept.tolist()] * 2
    whole = path.read_bytes()
    np.savez(path, **{"fc.weight": np.array([_Trap(tmp_path / "sprung")])}, allow_pickle=True)
    refused(
        lambda: Mask.load(path),
        "expected arrays of numbers, got one of Python objects (fc.weight), which would run code",
    )
    assert not (tmp_path / "sprung").exists()
    np.savez(path, **{"fc.weight": kept, "names": np.array(["fc.weight"])})
    refused(lambda: Mask.load(path), "expected arrays of numbers, got <U9 in names; save the masks or weights alone")
    np.savez_compressed(path, **{"fc.weight": np.zeros((20_000, 10_000), bool)})
    refused(lambda: Mask.load(path), "Suspect: compressed too far")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("fc.weight.npy", _npy({"descr": "|b1", "fortran_order": False, "shape": (2**40,)}))
    refused(lambda: Mask.load(path), "in fc.weight.npy")
    path.write_bytes(whole[:-80])
    refused(lambda: Mask.load(path), "m.npz: expected")


def _npy(header: dict[str, Any]) -> bytes:
    text = f"{header}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\x01" * 8


def _changed(path: Path, end: str, change: Any) -> None:
    with zipfile.ZipFile(path) as file:
        entries = {entry.filename: file.read(entry) for entry in file.infolist()}
    (name,) = [name for name in entries if name.endswith(end)]
    entries[name] = change(entries[name])
    with zipfile.ZipFile(path, "w") as file:
        for key, content in entries.items():
            file.writestr(key, content)


def test_torchscript_is_read_and_not_run(tmp_path: Path) -> None:
    net, mask = small()
    twice = nn.ModuleDict({"a": net, "b": nn.Sequential(net[0], nn.Linear(2, 2))})  # a layer in two places

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.flag = twice, 3

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["a"](x)

    path = tmp_path / "both.pt"
    torch.jit.save(torch.jit.script(Both().eval()), str(path))
    found = Mask.load(path)
    assert found["parts.a.0.weight"].equal(mask["0.weight"]) and found["parts.a.4.weight"].equal(mask["4.weight"])
    for content in (b"", pickle.dumps(_Trap(tmp_path / "sprung"), 2), _hash_bomb()):
        _changed(path, "both/data.pkl", lambda _, content=content: content)
        refused(lambda: Mask.load(path), "both.pt: expected a")
    assert not (tmp_path / "sprung").exists()


def test_an_exported_program_of_a_later_torch(tmp_path: Path) -> None:
    """As torch 2.13 lays it out: the numbers of each tensor by themselves, and JSON that says what they are."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]])

    def write(**changes: Any) -> Path:
        meta = {"dtype": 7, "sizes": [{"as_int": 2}, {"as_int": 2}], "strides": [{"as_int": 1}, {"as_int": 2}],
                "storage_offset": {"as_int": 0}, **changes}  # fmt: skip
        about = {"config": {"fc.weight": {"path_name": "weight_0", "use_pickle": False, "tensor_meta": meta}}}
        with zipfile.ZipFile(tmp_path / "a.pt2", "w") as file:
            file.writestr("a/archive_format", "pt2")
            file.writestr("a/data/weights/weight_0", weight.t().contiguous().numpy().tobytes())
            file.writestr("a/data/weights/model_weights_config.json", json.dumps(about))
        return tmp_path / "a.pt2"

    assert Mask.load(write())["fc.weight"].equal(weight != 0)
    for change in (
        {"dtype": 99},
        {"sizes": [{"as_int": 2**40}, {"as_int": 2}]},
        {"storage_offset": {"as_int": 3}},
        {"sizes": 3},
    ):
        refused(
            lambda change=change: Mask.load(write(**change)),
            "expected a whole file of torch.export.save, got a damaged one",
        )


def test_what_is_only_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "a.h5", "a.keras", "a.tflite", "a.msgpack", "a.pdparams", "a.mlmodel", "a.engine"):
        (tmp_path / name).write_bytes(b"whatever")
        for read in (Mask.load, lambda path: export(path, tmp_path / "out")):
            refused(
                lambda name=name, read=read: read(tmp_path / name), name, "expected tensors with names, got a file of"
            )
    save_file({"base_model.fc.lora_B.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    refused(
        lambda: Mask.load(tmp_path / "adapter_model.safetensors"), "PEFT adds to a network; merge_and_unload() there"
    )
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "__0.metadata").touch()
    refused(
        lambda: Mask.load(tmp_path / "ranks"), "got __0.metadata, one for each rank; save it with use_collectives=True"
    )
    if Path("/proc/self/mem").exists():  # a file that nobody can read from its beginning
        refused(lambda: Mask.load("/proc/self/mem"), "/proc/self/mem: expected what can be read")


# Names that transformers writes


def test_a_mask_of_a_renamed_network_finds_its_layers_wherever_it_lies(tmp_path: Path) -> None:
    hub = pytest.importorskip("transformers")
    found = trainers._hub(trainers._vit)(tmp_path)
    shutil.copy(found.path / "model.safetensors", tmp_path / "alone.safetensors")
    assert "vit.encoder.layer.0.output.dense.weight" in Mask.load(tmp_path / "alone.safetensors")
    assert masks.find(found.net, "file", path=str(tmp_path / "alone.safetensors")) == found.mask
    assert masks.find(trainers._vit(hub), "file", path=str(found.path)) == found.mask
    text = json.loads(tost("mask", "inspect", found.path, "--json"))
    assert set(found.mask) <= {row["layer"] for row in text["layers"]}


def test_a_weight_that_is_shared_and_written_once_has_both_names(tmp_path: Path) -> None:
    hub = pytest.importorskip("transformers")
    net = hub.GPT2LMHeadModel(
        hub.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, bos_token_id=0, eos_token_id=0)
    )
    assert own_names(net) == {"transformer.wte.weight": ["transformer.wte.weight", "lm_head.weight"]}
    net.save_pretrained(tmp_path / "net")
    assert "lm_head.weight" not in load_file(tmp_path / "net" / "model.safetensors")
    export(tmp_path / "net", tmp_path / "out.safetensors")
    net.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**8},
        {"num_hidden_layers": 4000, "hidden_size": 2, "num_attention_heads": 1},
        {"hidden_size": 10**12},
        {"architectures": ["os.system"]},
        {"architectures": ["pipeline"]},
        {"model_type": "nowhere", "auto_map": {"AutoConfig": "evil.Config"}},
    ],
    ids=str,
)
def test_a_config_from_a_stranger_ends_well(
    changes: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("transformers")
    caplog.set_level("INFO", "tost_plugins")
    folder = trainers._hub(trainers._vit)(tmp_path).path
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    assert "vit.encoder.layer.0.output.dense.weight" in Mask.load(folder)
    assert "names are those in the file, since its network cannot be made" in caplog.text
    assert not (tmp_path / "sprung").exists()


# Our own files


def test_a_packed_and_a_compact_export_have_the_masks_of_what_they_hold(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight[2:] = net[0].bias[2:] = net[2].weight[:, 3:] = 0
    mask = Mask.from_zeros({"0.weight": net[0].weight, "2.weight": net[2].weight})
    save_packed(tmp_path / "packed", net.state_dict())
    assert Mask.load(tmp_path / "packed") == mask
    shown = json.loads(tost("mask", "inspect", tmp_path / "packed", "--json"))
    assert (shown["kept"], shown["size"], [row["layer"] for row in shown["layers"]]) == (mask.kept, 24, list(mask))
    small_net = compact(net, mask, torch.randn(2, 4))
    save_packed(tmp_path / "compact", small_net.state_dict(), changed(net, small_net), pack=False)
    assert {name: tuple(kept.shape) for name, kept in Mask.load(tmp_path / "compact").items()} == {
        "0.weight": (2, 4), "2.weight": (2, 2)}  # fmt: skip
    for wrong in (None, 3, tmp_path):
        refused(
            lambda wrong=wrong: load_packed(net, wrong),
            "packed file",
            "expected an existing file, got none; check the path",
        )


def test_a_folder_is_a_mask_in_a_recipe_too(tmp_path: Path) -> None:
    net, mask = small()
    saved(net.state_dict(), tmp_path / "run", "last.pt")
    recipe = Recipe.of({"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": []}, mask=str(tmp_path / "run"))
    session = Session(made.small(), recipe).attach()
    session.start(torch.optim.SGD(session.model.parameters(), lr=0.1), total_steps=2)
    assert session.mask == mask
