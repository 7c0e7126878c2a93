"""Files and folders of every kind that sparse networks are kept in, made by the programs that people make them with."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from tost_plugins import Mask, compact
from tost_plugins.channels.sizes import changed
from tost_plugins.files.packed import save_packed
from tost_plugins.training.params import prunable

SPARSITY = 0.7


class Made(NamedTuple):
    """What was made: its path, the plain network with its zeros, and the mask; `loads` is the network that its export is for,
    where that is another one."""

    path: Path
    net: nn.Module
    mask: Mask
    loads: nn.Module | None = None


def small() -> nn.Module:
    """A network of a convolution, a norm and a linear layer."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def sparse(net: nn.Module) -> tuple[nn.Module, Mask]:
    """The network with a random mask's zeros in it, and the mask."""
    generator = torch.Generator().manual_seed(0)
    params = prunable(net)
    mask = Mask({name: torch.rand(p.shape, generator=generator) >= SPARSITY for name, p in params.items()})
    with torch.no_grad():
        for name, param in params.items():
            param[param == 0] = 0.1  # what transformers starts at 0
            param[~mask[name]] = 0
    return net, mask


def _file(save: Callable[[nn.Module, Mask, Path], Any], name: str, net: Callable[[], nn.Module] = small) -> Any:
    """A maker of what `save(network, mask, path)` writes to a path of this name."""

    def make(folder: Path) -> Made:
        torch.manual_seed(0)
        made, mask = sparse(net())
        result = save(made, mask, folder / name)
        path, loads = (result if isinstance(result, kind) else None for kind in (Path, nn.Module))
        return Made(path or folder / name, made, mask, loads)

    return make


def _layers(net: nn.Module) -> list[nn.Module]:
    return [net[0], net[4]]  # type: ignore[index]


def _pruned(net: nn.Module, mask: Mask, path: Path) -> None:
    net = copy.deepcopy(net)
    for layer, kept in zip(_layers(net), mask.values(), strict=True):
        prune.custom_from_mask(layer, "weight", kept)
        getattr(layer, "weight_orig").data[~kept] = 0.5  # noqa: B009 (what is removed is only hidden)
    torch.save(net.state_dict(), path)


class _Times(nn.Module):
    """A parametrization that multiplies by a mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def _parametrized(net: nn.Module, mask: Mask, path: Path) -> None:
    net = copy.deepcopy(net)
    for layer, kept in zip(_layers(net), mask.values(), strict=True):
        layer.weight.data[~kept] = 0.5  # type: ignore[operator, union-attr]
        parametrize.register_parametrization(layer, "weight", _Times(kept))
    torch.save(net.state_dict(), path)


def _sparsimony(net: nn.Module, mask: Mask, path: Path) -> None:
    from sparsimony.parametrization.fake_sparsity import FakeSparsityDenseGradBuffer  # type: ignore[import-not-found]

    net = copy.deepcopy(net).eval()
    for layer, kept in zip(_layers(net), mask.values(), strict=True):
        layer.weight.data[~kept] = 0.5  # type: ignore[operator, union-attr]
        parametrize.register_parametrization(layer, "weight", FakeSparsityDenseGradBuffer(kept.float()))
    net(torch.randn(2, 3, 8, 8)).sum().backward()  # gradients of all weights, in `dense_grad`
    torch.save(net.state_dict(), path)


def _torch_ao(squash: bool) -> Callable[[nn.Module, Mask, Path], Any]:
    def save(net: nn.Module, mask: Mask, path: Path) -> None:
        from torch.ao.pruning import WeightNormSparsifier

        if not squash:
            net[0].weight.data.fill_(0.5)  # type: ignore[index, union-attr, operator]
        net = copy.deepcopy(net)
        sparsifier = WeightNormSparsifier(sparsity_level=0.0, sparse_block_shape=(1, 4))
        sparsifier.prepare(net, [{"tensor_fqn": "4.weight"}])
        net[4].parametrizations.weight[0].mask.data = mask["4.weight"].float()  # type: ignore[index, union-attr]
        if squash:
            sparsifier.squash_mask()
        torch.save(net.state_dict(), path)

    return save


def _norm(normed: Callable[..., Any]) -> Callable[[nn.Module, Mask, Path], Any]:
    def save(net: nn.Module, mask: Mask, path: Path) -> nn.Module:
        net = copy.deepcopy(net)
        normed(net[4], "weight")  # type: ignore[index]
        torch.save(net.state_dict(), path)
        return net

    return save


def _wrapped(net: nn.Module, mask: Mask, path: Path) -> None:
    nested = {"epoch": 3, "model": {f"module._orig_mod.{name}": tensor for name, tensor in net.state_dict().items()}}
    torch.save(nested, path)


def _swin(net: nn.Module, mask: Mask, path: Path) -> None:
    net.register_buffer("attn_mask", torch.tensor([[[0.0, -100.0], [-100.0, 0.0]]]))
    torch.save({"model": net.state_dict()}, path)


def _own_layers(net: nn.Module, mask: Mask, path: Path) -> None:
    masks = {name.replace("weight", "mask"): kept.float() for name, kept in mask.items()}
    torch.save({**net.state_dict(), **masks}, path)


def _numpy(
    arrays: Callable[[nn.Module, Mask], dict[str, Any]], save: Any = np.savez
) -> Callable[[nn.Module, Mask, Path], Any]:
    return lambda net, mask, path: save(path, **{name: np.asarray(array) for name, array in arrays(net, mask).items()})


def _exported(net: nn.Module, mask: Mask, path: Path) -> None:
    torch.export.save(torch.export.export(net.eval(), (torch.randn(2, 3, 8, 8),)), str(path))


def _script(freeze: bool, traced: bool = False) -> Callable[[nn.Module, Mask, Path], Any]:
    def save(net: nn.Module, mask: Mask, path: Path) -> None:
        net = net.eval()
        script = torch.jit.trace(net, torch.randn(2, 3, 8, 8)) if traced else torch.jit.script(net)
        torch.jit.save(torch.jit.freeze(script) if freeze else script, str(path))  # type: ignore[arg-type]

    return save


def _distributed(nest: Callable[[nn.Module], dict[str, Any]], part: str = "") -> Callable[[nn.Module, Mask, Path], Any]:
    def save(net: nn.Module, mask: Mask, path: Path) -> Path:
        import torch.distributed.checkpoint as dcp

        optimizer = torch.optim.AdamW(net.parameters())
        dcp.save({**nest(net), "optimizer": optimizer.state_dict()}, checkpoint_id=str(path))
        return path / part

    return save


def _ranks(net: nn.Module, mask: Mask, path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, net, path), nprocs=2)


def _rank(rank: int, port: int, net: nn.Module, path: Path) -> None:
    """One of two that keep the weights in parts (FSDP2)."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    dcp.save({"model": net.state_dict()}, checkpoint_id=str(path))
    dist.destroy_process_group()


def _onnx(net: nn.Module, mask: Mask, path: Path) -> None:
    torch.onnx.export(net.eval(), (torch.randn(2, 3, 8, 8),), str(path), dynamo=True, verbose=False)


def _whole(net: nn.Module, mask: Mask, path: Path) -> None:
    torch.save(net, path)


class Row(NamedTuple):
    """A format, what it is made with, the packages that takes, and how."""

    format: str
    made_with: str
    needs: tuple[str, ...]
    make: Callable[[Path], Made]


def _row(format: str, made_with: str, save: Callable[[nn.Module, Mask, Path], Any], name: str, *needs: str) -> Row:
    return Row(format, made_with, needs, _file(save, name))


def _compact(folder: Path) -> Made:
    """The network without a channel that has no weights; the mask is that of the smaller network."""
    torch.manual_seed(0)
    net, mask = sparse(small())
    mask["0.weight"][3] = False
    mask.apply_(dict(net.named_parameters()))
    made = compact(net.eval(), mask, torch.randn(2, 3, 8, 8))
    save_packed(folder / "a.safetensors", made.state_dict(), changed(net, made), pack=False)
    return Made(folder / "a.safetensors", made, Mask.from_zeros(prunable(made)))


ROWS = [
    _row("state dict", "`torch.save`", lambda net, mask, path: torch.save(net.state_dict(), path), "a.pt"),
    _row("state dict in a checkpoint, of DDP and `torch.compile`", "`torch.save`", _wrapped, "a.pt"),
    _row("state dict, old format", "`torch.save`", lambda net, mask, path: torch.save(
        net.state_dict(), path, _use_new_zipfile_serialization=False), "a.pt"),
    _row("masks, 0 and 1", "`torch.save`", lambda net, mask, path: torch.save(
        {name: kept.float() for name, kept in mask.items()}, path), "masks.pt"),
    _row("`weight_orig`, `weight_mask`", "`torch.nn.utils.prune`", _pruned, "a.pt"),
    _row("`parametrizations.weight.original`, `.0.mask`", "`torch.nn.utils.parametrize`", _parametrized, "a.pt"),
    _row("the same, with `dense_grad`", "sparsimony", _sparsimony, "a.pt", "sparsimony"),
    _row("`weight`, `mask`", "layers of one's own", _own_layers, "a.pt"),
    _row("prepared model", "`torch.ao.pruning`", _torch_ao(False), "a.pt"),
    _row("the same after `squash_mask`", "`torch.ao.pruning`", _torch_ao(True), "a.pt"),
    _row("weight norm", "`parametrizations.weight_norm`", _norm(nn.utils.parametrizations.weight_norm), "a.pt"),
    _row("weight norm, old", "`torch.nn.utils.weight_norm`", _norm(nn.utils.weight_norm), "a.pt"),
    _row("spectral norm", "`parametrizations.spectral_norm`", _norm(nn.utils.parametrizations.spectral_norm), "a.pt"),
    _row("spectral norm, old", "`torch.nn.utils.spectral_norm`", _norm(nn.utils.spectral_norm), "a.pt"),
    _row("state dict with an unrelated `attn_mask`", "the first Swin", _swin, "a.pth"),
    _row("whole model", "`torch.save`", _whole, "a.pt"),
    _row("state dict", "safetensors", lambda net, mask, path: save_file(net.state_dict(), path), "a.safetensors"),
    _row("masks, bool", "safetensors", lambda net, mask, path: save_file(dict(mask), path), "masks.safetensors"),
    _row("our masks", "`Mask.save`", lambda net, mask, path: mask.save(path), "mask.safetensors"),
    _row("our exports, packed", "`tost export --packed`", lambda net, mask, path: save_packed(
        path, net.state_dict()), "a.safetensors"),
    Row("our exports, compact", "`tost export --compact`", (), _compact),
    _row("masks", "`np.savez`", _numpy(lambda net, mask: dict(mask)), "masks.npz"),
    _row("masks, compressed", "`np.savez_compressed`", _numpy(lambda net, mask: dict(mask), np.savez_compressed), "m.npz"),
    _row("weights", "`np.savez`", _numpy(lambda net, mask: net.state_dict()), "a.npz"),
    _row("masks without names", "`np.savez`", lambda net, mask, path: np.savez(path, *mask.values()), "m.npz"),
    _row("one array", "`np.save`", lambda net, mask, path: np.save(path, mask["0.weight"]), "m.npy"),
    _row("exported program", "`torch.export.save`", _exported, "a.pt2"),
    _row("TorchScript", "`torch.jit.script`", _script(False), "a.pt"),
    _row("TorchScript", "`torch.jit.trace`", _script(False, traced=True), "a.ts"),
    _row("TorchScript, frozen", "`torch.jit.freeze`", _script(True), "a.pt"),
    _row("ONNX", "`torch.onnx.export`", _onnx, "a.onnx", "onnx", "onnxscript"),
    _row("folder", "torch.distributed.checkpoint", _distributed(lambda net: {"model": net.state_dict()}), "dcp"),
    _row("folder, names at the top", "torch.distributed.checkpoint", _distributed(lambda net: net.state_dict()), "dcp"),
    _row("folder of two ranks", "torch.distributed.checkpoint, FSDP2", _ranks, "dcp"),
    _row("one file of such a folder", "torch.distributed.checkpoint", _distributed(
        lambda net: {"model": net.state_dict()}, "__0_0.distcp"), "dcp"),
]  # fmt: skip
