"""The same ten steps in five real trainers, with what people put around a step: clipping, micro-batches, precision."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moving_cases import STEPS, Digits, digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tost_plugins import Session

TRAINERS = ("torch", "accelerate", "transformers", "composer", "lightning")
SIZE = 8  # samples of a step
Look = Callable[[int, Session], None]


@dataclass
class Around:
    """What surrounds the steps."""

    recipe: dict[str, Any]
    clip: float = 0.0  # the largest norm
    parts: int = 1  # micro-batches of a step
    size: int = SIZE  # samples of a step, where the data is cut into other batches
    automatic: bool = False  # whether the trainer takes fewer at once when memory runs out
    bf16: bool = False
    dtype: torch.dtype = torch.float32
    scaled: bool = False  # float16's loss scaling, on a GPU in float16
    gpu: bool = False
    overflows: tuple[int, ...] = ()  # steps, from 0, whose loss is infinite
    left_out: tuple[int, ...] = ()  # steps whose batches are not there at all
    backend: str = ""  # of torch.compile
    steps: int = STEPS
    optimizer: Callable[[Any], torch.optim.Optimizer] = field(
        default=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3)
    )
    algorithms: Callable[[Any], list[Any]] = field(default=lambda tost: [tost])  # Composer's, around ours
    look: Look = lambda step, session: None  # after each step

    def loader(self) -> DataLoader:
        """Micro-batches in their order; Composer cuts whole batches itself."""
        batches = [batch for i, batch in enumerate(digits(self.steps, SIZE)) if i not in self.left_out]
        images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
        return DataLoader(TensorDataset(images.to(self.dtype), labels), batch_size=self.size // self.parts)

    def logits(self, out: Tensor) -> Tensor:
        return out.float() if self.bf16 or self.gpu else out

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"

    def scaler(self) -> torch.amp.GradScaler | None:
        return torch.amp.GradScaler(self.device, init_scale=1024.0, growth_interval=1000) if self.scaled else None


class Overflowing(nn.Module):
    """Makes the loss of some steps infinite, by logits that a float cannot hold."""

    def __init__(self, net: nn.Module, around: Around) -> None:
        super().__init__()
        self.module, self.around, self.calls = net, around, 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.module(x)
        if self.training and torch.is_grad_enabled():
            step, self.calls = self.calls // self.around.parts, self.calls + 1
            if step in self.around.overflows:
                out = out * float("inf")
        return out


def train(trainer: str, around: Around, net: nn.Module | None = None) -> Session:
    """Ten steps in a trainer; skips the test where that is not installed."""
    if trainer != "torch":
        pytest.importorskip(trainer)
    torch.manual_seed(5)
    return _RUN[trainer](net or Digits(), around)


def _torch(net: nn.Module, around: Around) -> Session:
    session = Session(net.to(around.device), around.recipe).attach()
    model: Any = torch.compile(net, backend=around.backend) if around.backend else net
    model = Overflowing(model, around) if around.overflows else model
    optimizer, scaler = around.optimizer(net.parameters()), around.scaler()
    loss_fn, loader = session.criterion(F.cross_entropy), around.loader()
    with session.drive(optimizer, loader, F.cross_entropy, around.steps, around.steps):
        dtype = torch.float16 if around.gpu else torch.bfloat16
        for i, (x, y) in enumerate(loader, 1):
            with torch.autocast(around.device, dtype, enabled=around.bf16 or around.gpu):
                out = model(x.to(around.device))
            loss = loss_fn(around.logits(out), y.to(around.device)) / around.parts
            (scaler.scale(loss) if scaler else loss).backward()
            if i % around.parts:
                continue
            if around.clip:
                if scaler:
                    scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(net.parameters(), around.clip)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            optimizer.zero_grad()
            around.look(i // around.parts, session)
    return session


@contextlib.contextmanager
def _no_state_of_others() -> Iterator[None]:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def _scale_on_cpu(accelerator: Any, scaler: Any) -> None:
    """Accelerate has a loss scaler for GPUs only: give it one that works here, before it prepares anything."""
    accelerator.scaler = scaler
    accelerator.unscale_gradients = lambda optimizer=None: [
        scaler.unscale_(getattr(o, "optimizer", o)) for o in accelerator._optimizers
    ]


def _accelerate(net: nn.Module, around: Around) -> Session:
    from accelerate import Accelerator

    from tost_plugins import TostHook

    with _no_state_of_others():
        accelerator = Accelerator(
            cpu=not around.gpu, gradient_accumulation_steps=around.parts,
            mixed_precision="fp16" if around.gpu else "bf16" if around.bf16 else "no", dynamo_backend=around.backend or None,
        )  # fmt: skip
        if around.scaled and not around.gpu:
            _scale_on_cpu(accelerator, around.scaler())
        tost = TostHook(around.recipe, accelerator)
        tost.attach(net)
        model: Any = Overflowing(net, around) if around.overflows else net
        model, optimizer, loader = accelerator.prepare(model, around.optimizer(net.parameters()), around.loader())
        tost.start(optimizer, loader, around.steps, around.steps, F.cross_entropy)
        loss_fn, step = tost.criterion(F.cross_entropy), 0
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_fn(around.logits(model(x)), y))
                if accelerator.sync_gradients and around.clip:
                    accelerator.clip_grad_norm_(model.parameters(), around.clip)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                around.look(step := step + 1, tost.session)
        tost.finish()
    return tost.session


class _Columns(nn.Module):
    """The Hugging Face Trainer passes a batch's columns by name."""

    def __init__(self, net: nn.Module, around: Around) -> None:
        super().__init__()
        self.module, self.around = net, around

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.around.logits(self.module(pixel_values))}


def _transformers(net: nn.Module, around: Around) -> Session:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from tost_plugins import TostCallback

    class Each(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            around.look(state.global_step, tost.session)

    class InOrder(Trainer):
        def get_train_dataloader(self) -> Any:
            loader = around.loader()
            rows = [{"pixel_values": x, "labels": y} for x, y in loader.dataset]
            return self.accelerator.prepare(DataLoader(rows, batch_size=self._train_batch_size))

    with _no_state_of_others(), tempfile.TemporaryDirectory() as folder:
        tost = TostCallback(around.recipe)
        compiled = {"torch_compile": True, "torch_compile_backend": around.backend} if around.backend else {}
        args = TrainingArguments(
            output_dir=folder, max_steps=around.steps, per_device_train_batch_size=around.size // around.parts,
            gradient_accumulation_steps=around.parts, max_grad_norm=around.clip, save_strategy="no", report_to=[],
            logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, use_cpu=not around.gpu,
            fp16=around.gpu, bf16=around.bf16, seed=5, auto_find_batch_size=around.automatic, **compiled,
        )  # fmt: skip
        model = _Columns(Overflowing(net, around) if around.overflows else net, around)
        optimizer = around.optimizer(model.parameters())
        trainer = InOrder(
            model=model, args=args, callbacks=[tost, Each()], compute_loss_func=tost.criterion(F.cross_entropy),
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if around.scaled and not around.gpu:
            _scale_on_cpu(trainer.accelerator, around.scaler())
        trainer.train()
    return tost.session


def _composer(net: nn.Module, around: Around) -> Session:
    from composer import Callback, Trainer
    from composer.algorithms import GradientClipping
    from composer.core import Precision
    from composer.models import ComposerClassifier

    from tost_plugins import TostAlgorithm

    class Each(Callback):
        def batch_end(self, state: Any, logger: Any) -> None:
            around.look(int(state.timestamp.batch), tost.session)

    class Classifier(ComposerClassifier):
        """Composer casts on GPUs only."""

        def forward(self, batch: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=around.bf16):
                return around.logits(self.module(batch[0]))

    tost = TostAlgorithm(around.recipe)
    algorithms = around.algorithms(tost)
    if around.clip:
        algorithms.append(GradientClipping("norm", around.clip))
    whole = DataLoader(around.loader().dataset, batch_size=around.size)
    model = Classifier(Overflowing(net, around) if around.overflows else net, num_classes=10,
                       loss_fn=lambda outputs, target: F.cross_entropy(outputs, target))  # fmt: skip
    trainer = Trainer(
        model=model, train_dataloader=whole, max_duration=f"{around.steps}ba", algorithms=algorithms,
        optimizers=around.optimizer(model.parameters()), callbacks=[Each()], progress_bar=False, seed=5,
        device="gpu" if around.gpu else "cpu", precision="amp_fp16" if around.gpu else "fp32",
        device_train_microbatch_size=around.size // around.parts,
        compile_config={"backend": around.backend} if around.backend else None,
    )  # fmt: skip
    trainer.state.auto_microbatching = around.automatic  # Composer's "auto" is for GPUs
    if around.scaled and not around.gpu:  # Composer, too, scales losses on GPUs only
        trainer.state.precision, trainer.state.scaler = Precision.AMP_FP16, around.scaler()
    trainer.fit()
    trainer.close()
    return tost.session


def _lightning(net: nn.Module, around: Around) -> Session:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.plugins import MixedPrecision

    from tost_plugins import TostLightning

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.module = Overflowing(net, around) if around.overflows else net

        def forward(self, x: Tensor) -> Tensor:
            return around.logits(self.module(x))

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return around.optimizer(self.parameters())

    class Each(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if (index + 1) % around.parts == 0:
                around.look((index + 1) // around.parts, tost.session)

    class Scaled(MixedPrecision):
        """A loss scaler alone, on the CPU too."""

        def forward_context(self) -> Any:
            return contextlib.nullcontext()

    tost, module = TostLightning(around.recipe), Module()
    cast: dict[str, Any] = {"precision": "16-mixed" if around.gpu else "bf16-mixed" if around.bf16 else "32-true"}
    if around.scaled and not around.gpu:
        cast = {"plugins": [Scaled("16-mixed", "cpu", around.scaler())]}
    trainer = Trainer(
        accelerator="gpu" if around.gpu else "cpu", devices=1, max_epochs=1, max_steps=around.steps, callbacks=[Each(), tost],
        accumulate_grad_batches=around.parts, gradient_clip_val=around.clip or None, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **cast,
    )  # fmt: skip
    trainer.fit(torch.compile(module, backend=around.backend) if around.backend else module, around.loader())
    return tost.session


_RUN = {
    "torch": _torch,
    "accelerate": _accelerate,
    "transformers": _transformers,
    "composer": _composer,
    "lightning": _lightning,
}
