"""Networks that transformers writes under other names than it loads: a resumed run goes on bit for bit, with its masks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tost_plugins import Session, TostError

transformers = pytest.importorskip("transformers")

SHAPE = {"image_size": 32, "num_labels": 2}
NETS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, patch_size=8, **SHAPE
        )
    ),
    "swin": lambda: transformers.SwinForImageClassification(
        transformers.SwinConfig(
            embed_dim=8, depths=[1, 1], num_heads=[2, 2], patch_size=4, window_size=4, drop_path_rate=0.0, **SHAPE
        )
    ),
    "segformer": lambda: transformers.SegformerForImageClassification(
        transformers.SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3],
            strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], drop_path_rate=0.0, **SHAPE,
        )
    ),
    "resnet, whose names are the same": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **SHAPE)
    ),
}  # fmt: skip


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(i)
        return {"pixel_values": torch.rand(3, 32, 32, generator=generator), "labels": torch.tensor(i % 2)}


def trainer(out: Path, name: str, mask: str, seed: int) -> "transformers.Trainer":
    from tost_plugins.adapters.transformers import TostCallback

    args = transformers.TrainingArguments(
        output_dir=str(out), max_steps=4, per_device_train_batch_size=8, save_steps=2, use_cpu=True, report_to=[],
        disable_tqdm=True, learning_rate=0.01,
    )  # fmt: skip
    kind = {"kind": mask, "sparsity": 0.9, "allocation": "uniform", "on_collapse": "keep_one"}
    tost = TostCallback({"mask": {**kind, **({"every": "1ba"} if mask == "rigl" else {})}, "tweaks": []})
    torch.manual_seed(seed)
    return transformers.Trainer(model=NETS[name](), args=args, train_dataset=Images(), callbacks=[tost])


@pytest.mark.parametrize("mask", ["random", "rigl"])
@pytest.mark.parametrize("name", NETS)
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, name: str, mask: str) -> None:
    whole = trainer(tmp_path, name, mask, seed=0)
    whole.train()
    resumed = trainer(tmp_path, name, mask, seed=1)  # other weights, which the checkpoint's replace
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (session,) = (c.session for c in resumed.callback_handler.callbacks if hasattr(c, "session"))
    assert session.clock.step == 4 and session.mask.sparsity == pytest.approx(0.9, abs=0.03)
    wanted, got = whole.model.state_dict(), resumed.model.state_dict()
    assert list(got) == list(wanted)
    assert all(torch.equal(value, got[key]) for key, value in wanted.items())
    assert not resumed.model._load_state_dict_pre_hooks


@pytest.mark.parametrize("name", ["vit", "swin", "segformer"])
def test_names_on_disk_that_nobody_translates_are_refused(tmp_path: Path, name: str) -> None:
    def attached() -> Session:
        return Session(NETS[name](), {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": []}).attach()

    session = attached()
    session.start(torch.optim.SGD(session.model.parameters(), lr=0.1), total_steps=4)
    session.model.save_pretrained(tmp_path)
    with pytest.raises(TostError, match="checkpoint: expected masks under the model's own names"):
        attached().model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
