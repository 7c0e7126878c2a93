"""A network that transformers writes under other names than it loads: never trained on with dense weights in silence."""

from pathlib import Path

import pytest
import torch

from tost_plugins import TostError

transformers = pytest.importorskip("transformers")


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(i)
        return {"pixel_values": torch.rand(3, 16, 16, generator=generator), "labels": torch.tensor(i % 2)}


def trainer(out: Path, steps: int, **arguments: object) -> "transformers.Trainer":
    from tost_plugins.adapters.transformers import TostCallback

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    args = transformers.TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=8, save_steps=2, use_cpu=True, report_to=[],
        disable_tqdm=True, **arguments,
    )  # fmt: skip
    tost = TostCallback({"mask": {"kind": "random", "sparsity": 0.9, "allocation": "uniform"}})
    net = transformers.ViTForImageClassification(config)
    return transformers.Trainer(model=net, args=args, train_dataset=Images(), callbacks=[tost])


def test_a_resumed_run_is_sparse_or_refused(tmp_path: Path) -> None:
    trainer(tmp_path, 2).train()
    again = trainer(tmp_path, 4)
    try:
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    except TostError as error:
        assert "checkpoint: expected masks under the model's own names" in str(error)
    else:  # a version of transformers that loads what it has written
        session = next(
            callback.session for callback in again.callback_handler.callbacks if hasattr(callback, "session")
        )
        assert session.mask.sparsity == pytest.approx(0.9, abs=0.01) and session.clock.step == 4
