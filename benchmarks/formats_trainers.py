"""The same for what trainers and model libraries write: transformers, accelerate, Composer, Lightning, timm."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from formats_made import Made, Row, small, sparse
from safetensors.torch import load_file
from torch import Tensor, nn

from tost_plugins import Mask

_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}
_SIZE = {"image_size": 32}


def _vit(hub: Any) -> nn.Module:
    return hub.ViTForImageClassification(hub.ViTConfig(**_VIT, **_SIZE))


def _swin(hub: Any) -> nn.Module:
    config = hub.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], patch_size=4, window_size=4, **_SIZE)
    return hub.SwinForImageClassification(config)


def _segformer(hub: Any) -> nn.Module:
    config = hub.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
    )  # fmt: skip
    return hub.SegformerForImageClassification(config)


def _detr(hub: Any) -> nn.Module:
    backbone = hub.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    config = hub.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2, num_queries=5,
    )  # fmt: skip
    return hub.DetrForObjectDetection(config)


def _resnet(hub: Any) -> nn.Module:
    return hub.ResNetForImageClassification(hub.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))


def _hub(build: Callable[[Any], nn.Module], part: str = "", **options: Any) -> Callable[[Path], Made]:
    """A maker of what `save_pretrained` writes."""

    def make(folder: Path) -> Made:
        import transformers

        torch.manual_seed(0)
        net, mask = sparse(build(transformers))
        with contextlib.redirect_stderr(io.StringIO()):
            net.save_pretrained(folder / "net", **options)  # type: ignore[operator]
        return Made(folder / "net" / part, net, mask)

    return make


def _pickled_shards(folder: Path) -> Made:
    from huggingface_hub import save_torch_state_dict

    torch.manual_seed(0)
    net, mask = sparse(small())
    save_torch_state_dict(
        net.state_dict(),
        folder,
        safe_serialization=False,
        max_shard_size=2000,
        filename_pattern="pytorch_model{suffix}.bin",
    )
    return Made(folder, net, mask)


class Images(torch.utils.data.Dataset):
    """Two classes of noise."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.rand(3, 32, 32), "labels": torch.tensor(i % 2)}


def _trainer(folder: Path) -> Made:
    import transformers

    from tost_plugins.adapters.transformers import TostCallback

    torch.manual_seed(0)
    net = _vit(transformers)
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, save_steps=1, use_cpu=True, report_to=[],
        disable_tqdm=True, learning_rate=0.01,
    )  # fmt: skip
    tost = TostCallback({"mask": {"kind": "random", "sparsity": 0.7}, "tweaks": []})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        transformers.Trainer(model=net, args=args, train_dataset=Images(), callbacks=[tost]).train()
    return Made(folder, net, tost.session.mask)


def _accelerate(save: Callable[[Any, nn.Module, Path], Any], part: str = "") -> Callable[[Path], Made]:
    def make(folder: Path) -> Made:
        import accelerate

        torch.manual_seed(0)
        net, mask = sparse(small())
        accelerator = accelerate.Accelerator(cpu=True)
        prepared = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))[0]
        save(accelerator, prepared, folder / "saved")
        return Made(folder / "saved" / part, net, mask)

    return make


def _composer(net: nn.Module) -> Any:
    from composer.models import ComposerClassifier

    return ComposerClassifier(net, num_classes=10)


def _composer_file(folder: Path) -> Made:
    import composer

    torch.manual_seed(0)
    net, mask = sparse(small())
    wrapped = _composer(net)
    options: dict[str, Any] = {"device": "cpu", "progress_bar": False, "log_to_console": False}
    trainer = composer.Trainer(model=wrapped, max_duration="1ba", run_name="a", **options)
    path = trainer.save_checkpoint(str(folder / "a.pt"))
    trainer.close()
    return Made(Path(path or folder / "a.pt"), net, mask)


def _composer_folder(folder: Path) -> Made:
    """As Composer lays out what several ranks keep in parts: its state under `state`, in a folder for each time."""
    import torch.distributed.checkpoint as dcp

    torch.manual_seed(0)
    net, mask = sparse(small())
    dcp.save({"state": {"model": _composer(net).state_dict()}}, checkpoint_id=str(folder / "ep1-ba2"))
    return Made(folder, net, mask)


def _lightning(folder: Path) -> tuple[Any, nn.Module, Mask]:
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self, net: nn.Module, lr: float = 0.0) -> None:
            super().__init__()
            self.save_hyperparameters("lr")
            self.module = net

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.module(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    torch.manual_seed(0)
    net, mask = sparse(small())
    data = torch.utils.data.TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8))
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
        logger=lightning.pytorch.loggers.CSVLogger(folder), log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(Classifier(net), torch.utils.data.DataLoader(data, batch_size=4))
    return trainer, net, mask


def _lightning_file(folder: Path) -> Made:
    trainer, net, mask = _lightning(folder)
    return Made(Path(trainer.checkpoint_callback.best_model_path), net, mask)


def _lightning_folder(folder: Path) -> Made:
    trainer, net, mask = _lightning(folder)
    return Made(Path(trainer.log_dir), net, mask)


def _lightning_shards(folder: Path) -> Made:
    """As its strategies for weights in parts write: the checkpoint's tensors, and `meta.pt` with the rest."""
    from lightning.fabric.strategies.fsdp import _distributed_checkpoint_save

    trainer, net, mask = _lightning(folder / "run")
    checkpoint = trainer._checkpoint_connector.dump_checkpoint(False)
    path = folder / "sharded.ckpt"
    _distributed_checkpoint_save({"model": checkpoint.pop("state_dict")}, path)
    torch.save(checkpoint, path / "meta.pt")
    return Made(path, net, mask)


def _timm_net() -> nn.Module:
    import timm

    return timm.create_model("resnet10t", num_classes=3)


def _timm_saver(folder: Path) -> Made:
    import timm.utils

    torch.manual_seed(0)
    net, mask = sparse(_timm_net())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    timm.utils.CheckpointSaver(net, optimizer, checkpoint_dir=str(folder)).save_checkpoint(0, metric=1.0)
    return Made(folder / "last.pth.tar", net, mask)


def _timm_hub(folder: Path) -> Made:
    import timm.models

    torch.manual_seed(0)
    net, mask = sparse(_timm_net())
    timm.models.save_for_hf(net, str(folder), safe_serialization="both")
    return Made(folder, net, mask)


def _run(folder: Path) -> Made:
    from tost_plugins import Recipe
    from tost_plugins.lab import models
    from tost_plugins.lab.train import train

    recipe = Recipe.from_dict({
        "mask": {"kind": "random", "sparsity": 0.7}, "tweaks": [], "model": "cifar/resnet8", "duration": "2ba",
        "data": {"name": "digits", "limit": 64, "batch_size": 32},
    })  # fmt: skip
    train(recipe, folder / "run")
    net = models.build("cifar/resnet8", 10, 1)
    net.load_state_dict(load_file(folder / "run" / "model.safetensors"))
    return Made(folder / "run", net, Mask.load(folder / "run" / "mask.safetensors"))


_SHARDS = {"max_shard_size": 20_000}
ROWS = [
    Row("folder", "transformers, ResNet", ("transformers",), _hub(_resnet)),
    Row("folder, other names", "transformers, ViT", ("transformers",), _hub(_vit)),
    Row("folder, other names", "transformers, Swin", ("transformers",), _hub(_swin)),
    Row("folder, other names", "transformers, SegFormer", ("transformers",), _hub(_segformer)),
    Row("folder, other names", "transformers, DETR", ("transformers",), _hub(_detr)),
    Row("`model.safetensors` in it", "transformers, ViT", ("transformers",), _hub(_vit, "model.safetensors")),
    Row("folder of shards", "transformers, ViT", ("transformers",), _hub(_vit, **_SHARDS)),
    Row("the index of shards", "transformers", ("transformers",), _hub(_vit, "model.safetensors.index.json", **_SHARDS)),
    Row("one shard of several", "transformers", ("transformers",), _hub(_vit, "model-00001-of-00002.safetensors", **_SHARDS)),
    Row("folder of pickled shards", "huggingface_hub", ("huggingface_hub",), _pickled_shards),
    Row("folder of a run, with masks", "transformers, Trainer", ("transformers", "accelerate"), _trainer),
    Row("folder", "Accelerate, `save_state`", ("accelerate",), _accelerate(lambda a, net, path: a.save_state(str(path)))),
    Row("folder, pickled", "Accelerate, `save_state`", ("accelerate",), _accelerate(
        lambda a, net, path: a.save_state(str(path), safe_serialization=False))),
    Row("folder of shards", "Accelerate, `save_model`", ("accelerate",), _accelerate(
        lambda a, net, path: a.save_model(net, str(path), max_shard_size=2000))),
    Row("checkpoint", "Composer", ("composer",), _composer_file),
    Row("folder of parts", "Composer", ("composer",), _composer_folder),
    Row("`.ckpt`", "Lightning", ("lightning",), _lightning_file),
    Row("folder of a run", "Lightning", ("lightning",), _lightning_folder),
    Row("folder of parts", "Lightning", ("lightning",), _lightning_shards),
    Row("`last.pth.tar`", "timm, `CheckpointSaver`", ("timm",), _timm_saver),
    Row("folder", "timm, `save_for_hf`", ("timm",), _timm_hub),
    Row("folder of a run", "`tost train`", ("sklearn",), _run),
]  # fmt: skip
