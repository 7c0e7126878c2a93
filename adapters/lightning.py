"""PyTorch Lightning: `Trainer(callbacks=[TostLightning()], ...)`."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.masks.mask import Mask
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.session import buffers
from tost_plugins.session.drive import check_stepped, follow
from tost_plugins.session.ends import plain_from
from tost_plugins.session.session import Session, session_of
from tost_plugins.training.calling import call
from tost_plugins.training.clock import Clock
from tost_plugins.training.log import say
from tost_plugins.training.params import prunable, some

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:  # the same under its older name
    from pytorch_lightning import Callback

_WHERE = "Trainer(callbacks=[TostLightning(...)])"
_AVERAGES = ("WeightAveraging", "StochasticWeightAveraging")
_KEPT = ("state_dict", "current_model_state")  # in a checkpoint: the weights, and beside an average's the network's


class TostLightning(Callback):
    """ToST as a Lightning callback: attaches in `setup`, finds the mask when training starts, finishes when it ends.

    `recipe` is a Recipe, a dict, a path or a shipped name (None: "tost_any_mask"); overrides are `mask` (a kind, a path,
    a dict or a Mask), `sparsity`, `tweaks`, `seed`, `compact`, `watch`. Masks and initialisations that look at data call the
    LightningModule on a batch and take cross entropy; `forward(module, batch)` and `criterion(outputs, batch)` say how else
    it is called, and what else its loss is. `total_steps` counts optimizer steps, where the Trainer cannot know how many there
    will be (`max_time`, own accumulation in manual optimization).

    Steps are followed by the optimizers' own hooks, inside Lightning's closure and behind its clipping: with several optimizers
    and in manual optimization too. Label smoothing acts on what `training_step` returns; in manual optimization make the loss
    with `callback.criterion(loss_fn)`. Layers must be there before `setup`: those that `setup` or `configure_model` make come
    too late. Put it in front of WeightAveraging and StochasticWeightAveraging.

    Checkpoints hold the plain network from the moment on when ghosts and soft activations have ended, and beside it what a
    resumed run needs, so `load_from_checkpoint` works without us; ModelCheckpoint chooses the best from that moment on. A
    second `fit` keeps the mask, without tweaks if the first came to its end. Raises TostError for what cannot work, before
    a weight changes.

    Example:
        >>> TostLightning(mask="snip", sparsity=0.95).recipe.mask.kind
        'snip'
    """

    def __init__(
        self,
        recipe: Recipe | dict | str | None = None,
        *,
        forward: Callable[[Any, Any], Any] = call,
        criterion: Callable[[Any, Any], Tensor] | None = None,
        total_steps: int | None = None,
        **overrides: Any,
    ) -> None:
        self._forward, self._criterion, self._total = forward, criterion, total_steps
        self._mask = overrides.pop("mask") if isinstance(overrides.get("mask"), Mask) else None
        self.recipe = Recipe.of(recipe, **overrides)
        self._session: Session | None = None
        self._plain_from = 0  # the step from which on the network is the plain one
        self._unfollow: list[Callable[[], None]] = []  # what ends the care for a loop's steps and its loss
        self._undo: list[Callable[[], None]] = []  # what gives the module and the Trainer back what they had before `setup`

    @property
    def session(self) -> Session:
        """The Session of the LightningModule; raises TostError before `fit`."""
        if self._session is None:
            raise TostError(f"TostLightning.session: expected a Trainer's fit, got none yet; write {_WHERE}, then fit")
        return self._session

    def criterion(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """The training loss for manual optimization: `loss_fn`, with smoothed labels if the recipe smooths them."""

        def compute(*args: Any, **kwargs: Any) -> Any:
            session = self._session
            return (loss_fn if session is None else session.criterion(loss_fn))(*args, **kwargs)

        return compute

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints hold of us: primitives; masks, alpha and beta travel with the weights."""
        return {} if self._session is None else {"session": self._session.state_dict()}

    # ---- Lightning's events

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._let_go()  # of a stage that an error has left
        self._hook(trainer, pl_module)
        if stage != "fit":
            return
        _check_strategy(trainer.strategy)
        if sum(isinstance(other, TostLightning) for other in trainer.callbacks) > 1:
            raise TostError("TostLightning: expected one, got several; give the Trainer one whose recipe holds all tweaks")
        if self._session is None or self._session.model is not pl_module:
            found = session_of(pl_module)
            if found is not None and (found.recipe, found.given_mask) != (self.recipe, self._mask):
                raise TostError(
                    f"TostLightning: expected the recipe and mask that the model is attached with, {found.recipe.name!r}, "
                    f"got others, {self.recipe.name!r}; give the same ones, or finish() that session first"
                )
            self._session = found
        if self._session is None:
            self._attach(trainer, pl_module)
        self._go_last(trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        session = self.session
        layers = session.run.layers or ()
        late = [name for name in prunable(pl_module, self.recipe.mask.ignore) if name not in layers]
        if late and session.state == "attached":
            raise TostError(
                f"TostLightning: expected all layers before the callbacks' setup, got {some(late)} later; make them in the "
                f"module's __init__, where setup and configure_model make them too late"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        session = self.session
        how: dict[str, Any] = {"forward": self._forward, "criterion": self._criterion}
        session.start(trainer.optimizers, _Batches(trainer), clock=self._clock(trainer, pl_module), **how)
        self._stop()
        self._unfollow.append(follow(session))
        if pl_module.automatic_optimization:
            self._replace(pl_module, "training_step", session.smoothing.around)
            if getattr(trainer.precision_plugin, "scaler", None) is not None:
                self._replace(pl_module, "optimizer_step", self._counted)
        self._plain_from = plain_from(session)
        if self._plain_from and any(getattr(each, "monitor", None) for each in trainer.checkpoint_callbacks):
            say(f"ModelCheckpoint: the best from step {self._plain_from} on, where the network is the plain one")

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._averages(trainer):  # an average that is in the network for its norms' statistics
            self.session.weights.zero()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        session = self.session
        if session.clock.step <= self._plain_from:
            _forget_best(trainer)
        if trainer.loggers:
            pl_module.log_dict(session.metrics(), on_step=True, on_epoch=False)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._unfollow and self.session.state == "running" and self._averages(trainer):
            self.session.run.saved.write(self.session.clock)  # an average was in the network and its buffers

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        session = self.session
        if session.state == "running":
            if self._averages(trainer):  # an average is in the network, with masks and a clock that are averages too
                session.after_step(session.clock.step)
            check_stepped(session)
            session.finish()
            for each in trainer.callbacks:
                if _is_a(each, "WeightAveraging"):
                    each._average_model = None  # it has ghosts; the module holds the average now
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._session is not None:
            self._session.conceal()
        self._stop()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        session = self._session
        if stage == "fit" and session is not None and session.state == "attached":  # no step was left to train, or asked for
            resumed = session.saved_step() >= 0
            if resumed:
                session.start(trainer.optimizers, clock=self._clock(trainer, pl_module))
            session.finish()
            self._session = session if resumed else None
        self._let_go()

    # ---- what they do

    def _attach(self, trainer: Any, module: Any) -> None:
        before = trainer.callbacks[: trainer.callbacks.index(self)]
        averages = [type(other).__name__ for other in before if _is_a(other, *_AVERAGES)]
        if averages:
            raise TostError(
                f"TostLightning: expected to be in front of what averages the weights, got {averages[0]} in front, which copies "
                f"the module before we attach to it; write callbacks=[TostLightning(...), {averages[0]}(...)]"
            )
        session = Session(module, self.recipe, self._mask)
        session.smoothing.remedy = "make the training loss with callback.criterion(loss_fn) in training_step"
        with _as_written(module):
            self._session = session.attach()

    def _go_last(self, trainer: Any) -> None:
        """Move behind all callbacks but those that write checkpoints: others put averages into the network when training ends,
        and into a checkpoint."""
        before = list(trainer.callbacks)
        others = [other for other in before if other is not self]
        end = next((place for place, other in enumerate(others) if _is_a(other, "Checkpoint")), len(others))
        trainer.callbacks = [*others[:end], self, *others[end:]]
        self._undo.append(functools.partial(setattr, trainer, "callbacks", before))

    def _hook(self, trainer: Any, module: Any) -> None:
        """Come in where the module's own hooks see a checkpoint: behind all callbacks when it is written, before its weights are
        loaded when it is read. Functions, not methods: a copy of the module does not copy us."""
        save, load = module.on_save_checkpoint, module.on_load_checkpoint

        @functools.wraps(save)
        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            save(checkpoint)
            self._put_aside(checkpoint)

        @functools.wraps(load)
        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            self._put_back(trainer, module, checkpoint)
            load(checkpoint)

        for hook in (on_save_checkpoint, on_load_checkpoint):
            setattr(module, hook.__name__, hook)
            self._undo.append(functools.partial(vars(module).pop, hook.__name__, None))

    def _put_aside(self, checkpoint: dict[str, Any]) -> None:
        """Where the network is the plain one let the checkpoint's weights be its own, with ours beside them."""
        session = self._session
        if session is not None and session.state in ("attached", "running") and session.is_plain:
            checkpoint["tost"] = {
                key: {name: weights.pop(name) for name in list(weights) if buffers.of_a_session(name)}
                for key in _KEPT
                if (weights := checkpoint.get(key)) is not None
            }

    def _put_back(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        ours, weights = checkpoint.pop("tost", {}), checkpoint["state_dict"]
        saved = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("session")
        fits = trainer.state.fn == "fit"
        if fits and self.session.state == "finished" and saved is not None and saved["state"] != "finished":
            self._attach(trainer, module)  # go back to before the end, from which on there are other parameters
        session = self._session
        if session is None or session.model is not module or session.state == "finished":
            if any(map(buffers.of_a_session, weights)):
                raise TostError(
                    f"ckpt_path: expected a checkpoint from after the ghosts and soft activations have ended, got one of step "
                    f"{checkpoint.get('global_step')} for a network without them; take a later one, or fit(ckpt_path=...) on"
                )
            return
        for key, tensors in ours.items():
            checkpoint[key].update(tensors)
        if fits and saved is None:
            raise TostError(
                "ckpt_path: expected a checkpoint of a run with TostLightning, got one without; load its weights into the module "
                "and start a new run"
            )
        if saved is not None:
            session.load_state_dict(saved)

    def _clock(self, trainer: Any, module: Any) -> Clock:
        """Lightning's time in optimizer steps; in manual optimization it counts each optimizer's steps."""
        total, per_epoch = _lengths(trainer, module.automatic_optimization)
        step = trainer.global_step
        if step and not module.automatic_optimization:
            step = max(self.session.saved_step(), 0)
        return Clock(step, total if self._total is None else self._total, per_epoch)

    def _counted(self, step: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Lightning counts a step that a loss scaler skips: so does the session, and a move of the mask is left out."""
        session, before = self.session, self.session.clock.step
        step(*args, **kwargs)
        if session.state == "running" and session.clock.step == before:
            session.before_step(check_finite=False)
            session.after_step(before + 1)

    def _replace(self, module: Any, name: str, call: Callable[..., Any]) -> None:
        """Have `call(method, ...)` stand in for a method of the module while it trains; a function, since a copy of the module is
        to leave us alone."""
        method, own = getattr(module, name), vars(module).get(name)

        @functools.wraps(method)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return call(method, *args, **kwargs)

        setattr(module, name, stand_in)
        back = functools.partial(setattr, module, name, own)
        self._unfollow.append(functools.partial(vars(module).pop, name, None) if own is None else back)

    def _averages(self, trainer: Any) -> bool:
        return any(_is_a(other, *_AVERAGES) for other in trainer.callbacks)

    def _stop(self) -> None:
        while self._unfollow:
            self._unfollow.pop()()

    def _let_go(self) -> None:
        while self._undo:
            self._undo.pop()()


class _Batches:
    """The training batches as the module gets them: its hooks and the precision may change them on their way."""

    def __init__(self, trainer: Any) -> None:
        loader, module = trainer.fit_loop._combined_loader, trainer.lightning_module
        self.loader = type(loader)(loader.iterables, loader._mode)  # the Trainer goes through its own already
        self.loader.limits = loader.limits

        def place(batch: Any) -> Any:
            batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
            return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

        self.place = place

    def __iter__(self) -> Iterator[Any]:
        for batch, *_ in self.loader:
            yield self.place(batch)


@contextlib.contextmanager
def _as_written(module: Any) -> Iterator[None]:
    """Within: a compiled module's own forward, which can be followed."""
    compiled = vars(module).pop("forward", None) if getattr(module, "_compiler_ctx", None) else None
    try:
        yield
    finally:
        if compiled is not None:
            module.forward = compiled


def _is_a(thing: Any, *names: str) -> bool:
    """Whether it is one of these classes of Lightning's, of either name that Lightning is imported by."""
    return any(base.__name__ in names for base in type(thing).__mro__)


def _lengths(trainer: Any, automatic: bool) -> tuple[int | None, int | None]:
    """How many optimizer steps the whole run and one epoch have, as far as they are known."""
    batches, loop = trainer.num_training_batches, trainer.fit_loop
    per_epoch = None if batches == math.inf else math.ceil(batches / trainer.accumulate_grad_batches)
    longest = loop.max_epochs
    for each in trainer.callbacks:
        if _is_a(each, "StochasticWeightAveraging") and each._model_contains_batch_norm and each._max_epochs != -1:
            loop.max_epochs = each._max_epochs  # and one more, in which no step is taken
    try:
        total = trainer.estimated_stepping_batches
    finally:
        loop.max_epochs = longest
    if not automatic and trainer.max_steps != -1:
        total = min(total, math.ceil(trainer.max_steps / len(trainer.optimizers)))
    return None if total in (-1, math.inf) else int(total), per_epoch


def _forget_best(trainer: Any) -> None:
    """What has been the best until now was not the plain network: let whatever comes be better."""
    for each in trainer.checkpoint_callbacks:
        if getattr(each, "best_k_models", None):
            worst = next(iter(each.best_k_models.values())).new_tensor(math.inf if each.mode == "min" else -math.inf)
            each.best_k_models = dict.fromkeys(each.best_k_models, worst)
            each.best_model_score = each.kth_value = worst


def _check_strategy(strategy: Any) -> None:
    """Raise TostError where Lightning keeps weights in parts, replaces norms late, or starts processes that have copies of us."""
    plain = _is_a(strategy, "SingleDeviceStrategy", "DDPStrategy")
    if not plain or _is_a(strategy, "DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy"):
        raise TostError(
            f"TostLightning: expected one device or DDP, got {type(strategy).__name__}, which keeps weights where no mask "
            f"reaches them; use strategy='ddp', or FSDP2 in a loop of your own (TostHook, or session.drive)"
        )
    if _is_a(strategy.launcher, "_MultiProcessingLauncher"):
        raise TostError(
            f"TostLightning: expected strategy='ddp', got processes made by {strategy._start_method!r}, whose networks do not "
            f"come back with their session; start the script with strategy='ddp'"
        )
    if getattr(strategy, "_layer_sync", None) is not None:
        raise TostError(
            "TostLightning: expected sync_batchnorm=False, got True, which replaces norms when the ghosts are there; convert the "
            "module before fit: torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)"
        )
