"""Accelerate: `tost = TostHook(recipe, accelerator)` in a training loop of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from tost_plugins.errors import TostError
from tost_plugins.masks.mask import Mask
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.session.drive import check_stepped, follow
from tost_plugins.session.session import Report, Session
from tost_plugins.training.batches import length
from tost_plugins.training.calling import call
from tost_plugins.training.params import unwrap


class TostHook:
    """ToST for an Accelerate loop: `attach` before `prepare`, `start` after it, `finish` at the end.

    Accelerate has no hooks for training loops: this object uses the optimizer's own, so that accumulation and skipped
    steps count right, saves its state with `accelerator.save_state`, and logs through `accelerator.log`. `recipe` is a
    Recipe, a dict, a path or a shipped name (None: "tost_any_mask"); overrides are `mask` (a kind, a path, a dict or a
    Mask), `sparsity`, `tweaks`, `seed`, `compact`, `watch`.

    Example:
        tost = TostHook("tost_any_mask", accelerator)
        tost.attach(model)
        model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
        tost.start(optimizer, loader, total_steps=epochs * len(loader))
        loss_fn = tost.criterion(torch.nn.functional.cross_entropy)
        ...  # the loop, as it was
        tost.finish()
    """

    def __init__(
        self, recipe: Recipe | dict | str | None = None, accelerator: Accelerator | None = None, **overrides: Any
    ) -> None:
        if not isinstance(accelerator, Accelerator):
            raise TostError(
                f"TostHook: expected an Accelerator, got {accelerator!r}; write TostHook(recipe, accelerator)"
            )
        _check_kind(accelerator)
        self._mask = overrides.pop("mask") if isinstance(overrides.get("mask"), Mask) else None
        self.recipe, self.accelerator = Recipe.of(recipe, **overrides), accelerator
        self._session: Session | None = None
        self._stop: Callable[[], None] = lambda: None

    @property
    def session(self) -> Session:
        """The Session of the attached model; raises TostError before `attach`."""
        if self._session is None:
            raise TostError("TostHook: expected an attached model, got none; call attach(model) before prepare")
        return self._session

    @property
    def is_over(self) -> bool:
        """Whether the run has come to its end."""
        return self._session is not None and self._session.state == "finished"

    def attach(self, model: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
        """Put ghosts and buffers into the bare model, before `accelerator.prepare`; returns the same model.

        An optimizer made before is given the ghosts here, or else in `start`; give it here where `load_state` comes
        before `start`. Raises TostError, with the model unchanged, where the model is prepared already or a part of the
        recipe has nothing to act on, and with another model while the run of the first goes on.
        """
        if self._session is not None and not self.is_over and unwrap(model) is not self._session.model:
            raise TostError(
                "TostHook.attach: expected the model that it has, got a second; make a TostHook for each, or finish() first"
            )
        prepared = [self.accelerator.unwrap_model(other) for other in self.accelerator._models]
        if any(unwrap(model) is unwrap(other) for other in prepared):
            raise TostError(
                f"TostHook.attach: expected the model before accelerator.prepare, got a prepared "
                f"{type(model).__name__}; call attach(model) first, then make the optimizer and prepare both"
            )
        self._session = Session(model, self.recipe, self._mask).attach(optimizer)
        self._session.smoothing.remedy = "make the training loss with tost.criterion(loss_fn)"
        # an earlier run that is over, or that `free_memory` has taken the model of, is not saved with ours
        registered = self.accelerator._custom_objects
        registered[:] = [
            other for other in registered if not (isinstance(other, TostHook) and other._is_left(prepared))
        ]
        self.accelerator.register_for_checkpointing(self)
        return model

    def start(
        self,
        optimizer: Optimizer,
        dataloader: Any = None,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
        *,
        forward: Callable[[Any, Any], Any] = call,
        criterion: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        """Find the mask (after `prepare`, before the first step) and follow the optimizer's steps from here on.

        `total_steps` counts optimizer steps of the whole run; `steps_per_epoch` is `len(dataloader)` divided by the
        accumulation steps where not given; a stream has none. `loss_fn(outputs, labels)`, `forward(model, batch)` and
        `criterion(outputs, batch)` are those of `Session.drive`.
        """
        if steps_per_epoch is None and (batches := length(dataloader)) is not None:
            steps_per_epoch = math.ceil(batches / self.accelerator.gradient_accumulation_steps)
        session = self.session
        self._stop()
        session.start(
            optimizer,
            dataloader,
            loss_fn=loss_fn,
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            forward=forward,
            criterion=criterion,
        )
        self._stop = follow(session, after=self._log)

    def criterion(self, loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The training loss: `loss_fn(logits, labels)`, with smoothed labels if the recipe smooths them."""
        return self.session.criterion(loss_fn)

    def finish(self) -> Report:
        """Take the ghosts away; call it after the last step, before saving the model."""
        if self.session.state == "running":
            check_stepped(self.session)
        self._stop()
        return self.session.finish()

    def state_dict(self) -> dict[str, Any]:
        """For `accelerator.save_state`: primitives; masks, alpha and beta travel in the model."""
        return self.session.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For `accelerator.load_state`, which loads us after model and optimizer."""
        self.session.load_state_dict(state)

    def _is_left(self, prepared: list[nn.Module]) -> bool:
        """Whether the run is over, or was interrupted and its model let go."""
        begun = self._session is not None and self._session.state == "running"
        return self.is_over or (begun and all(self.session.model is not other for other in prepared))

    def _log(self, *_: Any) -> None:
        if self.accelerator.trackers:
            self.accelerator.log(self.session.metrics(), step=self.session.clock.step)


def _check_kind(accelerator: Accelerator) -> None:
    """Raise TostError where weights are kept so that no mask reaches them."""
    unfit = {
        DistributedType.DEEPSPEED: "DeepSpeed, whose engine trains copies of the weights that no mask reaches",
        DistributedType.MEGATRON_LM: "Megatron-LM, whose engine takes the steps by itself",
        DistributedType.FSDP: "FSDP1, which hides weights in flat rows that no mask fits",
    }
    if accelerator.distributed_type in unfit and not accelerator.is_fsdp2:
        raise TostError(
            f"TostHook: expected DDP or FSDP2, got {unfit[accelerator.distributed_type]}; launch with "
            f"`accelerate launch --multi_gpu` (DDP), or with `--use_fsdp --fsdp_version 2`"
        )
