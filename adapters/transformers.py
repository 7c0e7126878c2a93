"""Hugging Face: `Trainer(model=model, callbacks=[TostCallback()], ...)`."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler, ExportableState

from tost_plugins.errors import TostError
from tost_plugins.files.renamed import own_names, renamed
from tost_plugins.masks.mask import Mask
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.session.ends import ends, plain_from
from tost_plugins.session.session import Session, session_of
from tost_plugins.training.batches import length
from tost_plugins.training.calling import call, check_callable, logits_of
from tost_plugins.training.clock import Clock
from tost_plugins.training.log import say
from tost_plugins.tweaks.label_smoothing import check_hard

_OTHER = "where that is another one, TostCallback(criterion=lambda outputs, batch: ...) says so"
_WHERE = "Trainer(model=model, callbacks=[TostCallback(...)])"


class TostCallback(TrainerCallback, ExportableState):
    """ToST as a Trainer callback: attaches when the Trainer is made, finishes when training ends.

    Give it to the Trainer's constructor; `trainer.add_callback` comes too late and is an error, and so is `model_init`.
    `recipe` is a Recipe, a dict, a path or a shipped name (None: "tost_any_mask"); overrides are `mask` (a kind, a path,
    a dict or a Mask), `sparsity`, `tweaks`, `seed`, `compact`, `watch`. Masks and initialisations that look at data use the
    loss that the model returns; `forward(model, batch)` and `criterion(outputs, batch)` say how else it is called, and what
    else its loss is.

    Label smoothing acts on the loss that the model returns or an overridden `compute_loss` computes; with an own loss pass
    `compute_loss_func=callback.criterion(loss_fn)`. `load_best_model_at_end` chooses among the checkpoints from the
    moment on when all ghosts and soft activations have ended: an earlier one is another network than the finished one.
    A second `train()` keeps the mask, without tweaks if the first came to its end. Raises TostError for what cannot
    work, before a weight changes.

    Example:
        >>> TostCallback(mask="snip", sparsity=0.95).recipe.mask.kind
        'snip'
    """

    def __init__(
        self,
        recipe: Recipe | dict | str | None = None,
        *,
        forward: Callable[[Any, Any], Any] = call,
        criterion: Callable[[Any, Any], Tensor] | None = None,
        **overrides: Any,
    ) -> None:
        check_callable(forward=forward, criterion=criterion)
        self._forward, self._criterion = forward, criterion
        self._mask = overrides.pop("mask") if isinstance(overrides.get("mask"), Mask) else None
        self.recipe = Recipe.of(recipe, **overrides)
        self._session: Session | None = None
        self._plain_from = 0  # the step from which on the network is the plain one
        self._shifts = False  # whether the Trainer counts no first label of a row, as for causal language models
        self._unfollow: list[Callable[[], None]] = []  # what ends the smoothing of the Trainer's loss
        self._names: Any = None  # the hook that gives what the Trainer loads the model's own names

    @property
    def session(self) -> Session:
        """The Session of the Trainer's model; raises TostError before the Trainer is made."""
        if self._session is None:
            raise TostError(f"TostCallback.session: expected a Trainer with this callback, got none; write {_WHERE}")
        return self._session

    def criterion(self, loss_fn: Callable[..., Tensor] = F.cross_entropy) -> Callable[..., Tensor]:
        """A `compute_loss_func` for the Trainer: `loss_fn(logits, labels)`, a mean over the labels that count (those that are
        not -100), with smoothed labels in training, scaled for gradient accumulation as the Trainer expects. Masks and
        initialisations that look at the loss look at this one."""
        check_callable(optional=False, loss_fn=loss_fn)
        if any(t.kind == "label_smoothing" and not t.optional and not t.least_steps for t in self.recipe.tweaks):
            check_hard("TostCallback.criterion: label_smoothing", loss_fn)

        def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
            loss = self.session.criterion(loss_fn)(logits_of(outputs), labels)
            if num_items_in_batch is None:
                return loss
            counted = labels[..., 1:] if self._shifts else labels
            return loss * ((counted != -100).sum() / num_items_in_batch)

        compute_loss.loss_fn = loss_fn  # type: ignore[attr-defined]
        return compute_loss

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into `trainer_state.json`: the recipe to rebuild us from."""
        return {"args": {"recipe": self.recipe.to_dict()}, "attributes": {}}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        _come_first(self)
        session = Session(model, self.recipe, self._mask)
        session.smoothing.remedy = "pass compute_loss_func=callback.criterion(loss_fn) to the Trainer"
        if session.smoothing.tweak is not None and not session.smoothing.tweak.least_steps:
            _smooth_once(session, args)  # else when it is known whether it rests
        if args.n_gpu > 1:
            raise TostError(
                f"TostCallback: expected one process per GPU, got one for {args.n_gpu} (DataParallel, whose copies share "
                f"the ghosts); use torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        _check_kind(args)
        self._names = model.register_load_state_dict_pre_hook(_own_names)  # ahead of the session's
        self._session = session.attach(kwargs.get("optimizer"))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        _come_first(self)
        found = session_of(model)  # of the callback that the Trainer may have built this one for, in its place
        self._session = session = self._session or (None if found and found.state == "finished" else found)
        if session is None:
            raise TostError(
                f"TostCallback: expected to be there when the Trainer is made, got added later; the ghosts "
                f"must exist before the optimizer does: write {_WHERE}"
            )
        if session.model is not model:
            raise TostError(
                f"TostCallback: expected the model that the Trainer was made with, got another one "
                f"(model_init makes it anew); build it first and write {_WHERE}"
            )
        _check_checkpoint(session, state)
        loader = kwargs["train_dataloader"]
        batches = length(loader)
        per_epoch = None if batches is None else math.ceil(batches / args.gradient_accumulation_steps)
        trainer, clock = _caller(Trainer), Clock(state.global_step, state.max_steps, per_epoch)
        _check_synchronised(args, trainer)
        own = getattr(trainer, "compute_loss_func", None)
        how = {"forward": self._forward, "criterion": self._criterion}
        given = self._criterion is not None or self._forward not in (call, None)
        session.start(kwargs["optimizer"], loader, clock=clock, **(how if given or own is None else _conventions(own)))
        if session.state == "running":
            _smooth_once(session, args)
        if "the model's own" in session.looked and type(trainer).compute_loss is not Trainer.compute_loss:
            say(
                f"{type(trainer).__name__}.compute_loss: was not looked at, but the loss that the model returns; {_OTHER}"
            )
        self._shifts = getattr(trainer, "_loss_shifts_labels", False)
        if trainer is not None and own is None and not self._unfollow:  # an own function is smoothed by `criterion`
            self._unfollow = [functools.partial(setattr, trainer, "compute_loss", trainer.compute_loss)]
            trainer.compute_loss = functools.partial(session.smoothing.around, trainer.compute_loss)
        self._plain_from = plain_from(session)
        if args.load_best_model_at_end and self._plain_from:
            say(f"load_best_model_at_end: the best from step {self._plain_from} on, where the network is the plain one")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs.get("optimizer")
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and self.session.tweaks.around_steps:
            with contextlib.suppress(
                RuntimeError
            ):  # where the Trainer has looked at their norm they are unscaled already
                scaler.unscale_(optimizer.optimizer)  # type: ignore[union-attr]
        self.session.before_step(check_finite=scaler is None)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.after_step(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step <= self._plain_from:  # what has been the best until now was not the plain network
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._session is not None and self.session.state in ("running", "finished") and logs is not None:
            metrics = self.session.metrics()
            logs.update(metrics)
            if state.log_history:
                state.log_history[-1].update(metrics)  # the Trainer has put a copy of `logs` there already

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        if self.session.state == "running":
            self.session.finish()
        self.session.release()
        if self._names is not None:
            self._names.remove()
        while self._unfollow:
            self._unfollow.pop()()


def _own_names(model: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """The Trainer writes some models (ViT, Swin, SegFormer) under other names than they have, as `from_pretrained` takes them,
    and loads them as they lie there, without being strict, so that nothing comes: give each tensor its name in the model."""
    there = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    here = renamed(there, own_names(model))
    for name in there.keys() - here.keys():
        del state_dict[f"{prefix}{name}"]
    state_dict.update({f"{prefix}{name}": value for name, value in here.items()})


def _conventions(own: Callable[..., Tensor]) -> dict[str, Any]:
    """How the Trainer comes to a loss with a `compute_loss_func`, ours or another: the network is not given the labels."""

    def forward(call: Callable[..., Any], batch: Any) -> Any:
        return call(**{key: value for key, value in batch.items() if key != "labels"})

    if hasattr(own, "loss_fn"):
        return {"forward": forward, "loss_fn": own.loss_fn}  # type: ignore[attr-defined]
    return {
        "forward": forward,
        "criterion": lambda outputs, batch: own(outputs, batch.get("labels"), num_items_in_batch=None),
    }


def _smooth_once(session: Session, args: Any) -> None:
    """Raise TostError where the Trainer smooths labels too, or leave that to it where ours is optional."""
    if session.smoothing.tweak is not None and args.label_smoothing_factor:
        twice = TostError(
            f"TostCallback: label_smoothing: expected to be the only one, got "
            f"label_smoothing_factor={args.label_smoothing_factor}; set it to 0, or leave label_smoothing out of the tweaks"
        )
        session.smoothing.leave_out(twice, "the Trainer smooths labels itself")


def _check_checkpoint(session: Session, state: Any) -> None:
    """The Trainer loads weights without being strict: see that what it has loaded is of this recipe, and fits a network
    whose ghosts are gone."""
    if session.state == "finished" and 0 < state.global_step < ends(session, *session.tweaks):
        raise TostError(
            f"resume_from_checkpoint: expected one from after the ghosts and soft activations have ended, got step "
            f"{state.global_step} for a model that is finished, where they are gone; make a new {_WHERE} with a new model"
        )
    saved = (state.stateful_callbacks or {}).get("TostCallback")
    if state.global_step and session.state == "attached" and session.saved_step() < 0:
        raise TostError(
            "resume_from_checkpoint: expected a checkpoint of a run with TostCallback, got one without; "
            "load its weights into the model and start a new run"
        )
    if state.global_step and isinstance(saved, dict):
        session.load_state_dict({"recipe": saved["args"]["recipe"], "state": session.state})


def _check_kind(args: Any) -> None:
    """Raise TostError where the Trainer keeps weights in parts, as its arguments or `accelerate launch` have it do."""
    launched = AcceleratorState().distributed_type.value if AcceleratorState._shared_state else ""
    asked = {"DEEPSPEED": args.deepspeed, "FSDP": args.fsdp, "MEGATRON_LM": None}
    got = next((kind for kind, value in asked.items() if value or kind == launched), None)
    if got is not None:
        raise TostError(
            f"TostCallback: expected one process or DDP, got {got}, which keeps weights where no mask reaches them; use "
            f"torchrun without fsdp and deepspeed (DDP), or FSDP2 in a loop of your own (TostHook, or session.drive)"
        )


def _check_synchronised(args: Any, trainer: Any) -> None:
    """Warn where several processes train networks of their own: a Trainer that has evaluated before never wraps its model."""
    if args.world_size > 1 and trainer is not None:
        parts = trainer.model_wrapped.modules()
        if not any(isinstance(part, nn.parallel.DistributedDataParallel) for part in parts):
            say(
                f"TostCallback: expected the model in DDP, got {args.world_size} processes that each train by themselves, as the "
                f"Trainer does after an evaluate() before train(); evaluate with another Trainer, or by eval_on_start=True",
                logging.WARNING,
            )


def _come_first(callback: TostCallback) -> None:
    """Move a callback to the front, so that what it adds in on_log reaches TensorBoard and the like; raises TostError
    if there is another. Without a handler the metrics reach `log_history` and the callbacks behind us."""
    handler = _caller(CallbackHandler)
    if handler is None:
        return
    if sum(isinstance(other, TostCallback) for other in handler.callbacks) > 1:
        raise TostError("TostCallback: expected one in a Trainer, got several; merge their recipes")
    handler.callbacks = [callback, *(other for other in handler.callbacks if other is not callback)]


def _caller(kind: type) -> Any:
    """A callback is not given its Trainer or their handler, but they have called it: the nearest that has, if any."""
    frame: Any = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), kind):
        frame = frame.f_back
    return frame and frame.f_locals["self"]
