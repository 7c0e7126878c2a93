"""PyTorch Lightning: `Trainer(callbacks=[TostLightning()], ...)`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.masks.mask import Mask
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.session import averages
from tost_plugins.session.aside import put_aside, put_back
from tost_plugins.session.drive import check_stepped, follow
from tost_plugins.session.ends import plain_from
from tost_plugins.session.session import Session, session_of
from tost_plugins.session.steps import around
from tost_plugins.training.calling import call, check_callable
from tost_plugins.training.clock import Clock, count
from tost_plugins.training.log import say
from tost_plugins.training.params import some

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:  # the same under its older name
    from pytorch_lightning import Callback


class TostLightning(Callback):  # type: ignore[misc]
    """ToST as a Lightning callback: attaches in `setup`, finds the mask when training starts, finishes when it ends.

    `recipe` is a Recipe, a dict, a path or a shipped name (None: "tost_any_mask"); overrides are `mask` (a kind, a path,
    a dict or a Mask), `sparsity`, `tweaks`, `seed`, `compact`, `watch`. Masks and initialisations that look at data call the
    module on a batch and take cross entropy; `forward(module, batch)` and `criterion(outputs, batch)` say how else it is
    called, and what else its loss is. `total_steps` counts optimizer steps, where the Trainer cannot know how many there will
    be. Label smoothing acts on what `training_step` returns; in manual optimization on `callback.criterion(loss_fn)`.

    Put it in front of WeightAveraging and StochasticWeightAveraging. Layers must be there before `setup`: those that the
    module's `setup` or `configure_model` makes come too late. From the moment on when ghosts and soft activations have ended,
    checkpoints hold the plain network for `load_from_checkpoint`, beside it what a resumed run needs, and ModelCheckpoint
    chooses the best from there. A second `fit` keeps the mask, without tweaks if the first came to its end. Raises TostError
    for what cannot work, before a weight changes.

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
        check_callable(forward=forward, criterion=criterion)
        self._forward, self._criterion, self._total = forward, criterion, count("total_steps", total_steps)
        self._mask = overrides.pop("mask") if isinstance(overrides.get("mask"), Mask) else None
        self.recipe = Recipe.of(recipe, **overrides)
        self._session: Session | None = None
        self._there: set[str] = set()  # the names of all modules at attach
        self._plain_from = 0  # the step from which on the network is the plain one
        self._unfollow: list[Callable[[], None]] = []  # what ends the care for a loop's steps and its loss
        self._undo: list[Callable[[], None]] = []  # what undoes `setup`

    @property
    def session(self) -> Session:
        """The Session of the LightningModule; raises TostError before `fit`."""
        if self._session is None:
            raise TostError("TostLightning.session: expected a Trainer's fit, got none yet; write callbacks=[tost]")
        return self._session

    def criterion(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """The training loss for manual optimization: `loss_fn`, with smoothed labels if the recipe smooths them."""

        def compute(*args: Any, **kwargs: Any) -> Any:
            session = self._session
            return (loss_fn if session is None else session.criterion(loss_fn))(*args, **kwargs)

        return compute

    # ---- Lightning's events

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """What checkpoints hold of us: primitives; masks, alpha and beta travel with the weights. Of two callbacks with a
        `state_dict` Lightning says that their keys are the same, and not what to do."""
        if self._session is not None:
            checkpoint["callbacks"][self.state_key] = {"session": self._session.state_dict()}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if sum(isinstance(each, TostLightning) for each in trainer.callbacks) > 1:
            raise TostError("TostLightning: expected one in a Trainer, got several; merge their recipes")
        _run_all(self._undo)  # of a stage that an error has left
        self._undo.append(around(pl_module, "on_save_checkpoint", self._saving))
        self._undo.append(around(pl_module, "on_load_checkpoint", functools.partial(self._loading, trainer, pl_module)))
        if stage != "fit":
            return
        _check_strategy(trainer.strategy)
        if any(_is_a(each, "ModelPruning") for each in trainer.callbacks):
            raise TostError("TostLightning: expected to keep the only mask, got ModelPruning beside it; leave that out")
        if self._session is None or self._session.model is not pl_module:
            found = session_of(pl_module)  # of another callback with this recipe, whose run was interrupted
            same = found is not None and (found.recipe, found.given_mask) == (self.recipe, self._mask)
            self._session = found if same else None
        if self._session is None:
            self._attach(trainer, pl_module)
        self._go_last(trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        late = [name for name in averages.layers(pl_module) if name not in self._there]
        if late and self.session.state == "attached":
            remedy = "make them in the module's __init__, where setup and configure_model make them too late"
            raise TostError(f"TostLightning: expected all layers before setup, got {some(late)} later; {remedy}")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        session = self.session
        clock, forward, criterion = self._clock(trainer, pl_module), self._forward, self._criterion
        session.start(trainer.optimizers, _Batches(trainer), clock=clock, forward=forward, criterion=criterion)
        _run_all(self._unfollow)
        for each in filter(lambda each: _is_a(each, "WeightAveraging"), trainer.callbacks):
            averages.with_bools(each._average_model)
        self._unfollow.append(follow(session))  # behind Lightning's clipping; its own hook comes ahead of that
        if pl_module.automatic_optimization:
            self._unfollow.append(around(pl_module, "training_step", session.smoothing.around))
            if getattr(trainer.precision_plugin, "scaler", None) is not None:
                self._unfollow.append(around(pl_module, "optimizer_step", self._counted))
        self._plain_from = plain_from(session)
        if self._plain_from and any(getattr(each, "monitor", None) for each in trainer.checkpoint_callbacks):
            say(f"ModelCheckpoint: the best from step {self._plain_from} on, where the network is the plain one")

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if _averages(trainer.callbacks):  # an average that is in the network for its norms' statistics
            self.session.weights.zero()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        session = self.session
        if session.clock.step <= self._plain_from:
            _forget_best(trainer)
        if trainer.loggers:
            pl_module.log_dict(session.metrics(), on_step=True, on_epoch=False)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._unfollow and self.session.state == "running" and _averages(trainer.callbacks):
            self.session.run.saved.write(self.session.clock)  # an average was in the network and its buffers

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        session = self.session
        if session.state == "running":
            if _averages(trainer.callbacks):  # an average is in the network, of its masks and clock too
                session.after_step(session.clock.step)
            check_stepped(session)
            session.finish()
            for each in filter(lambda each: _is_a(each, "WeightAveraging"), trainer.callbacks):
                each._average_model = None  # it has ghosts; the module holds the average now
        _run_all(self._unfollow)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self._session is not None:
            self._session.conceal()
        _run_all(self._unfollow)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        session = self._session
        if stage == "fit" and session is not None and session.state == "attached":  # no step was left, or asked for
            if session.saved_step() >= 0:
                session.start(trainer.optimizers, clock=self._clock(trainer, pl_module))
            self._session = session if session.state == "running" else None
            session.finish()
        _run_all(self._undo)

    def _attach(self, trainer: Any, module: Any) -> None:
        if found := _averages(trainer.callbacks[: trainer.callbacks.index(self)]):
            raise TostError(
                f"TostLightning: expected to be in front of what averages the weights, got {found[0]} in front, which copies "
                f"the module before we attach to it; write callbacks=[TostLightning(...), {found[0]}(...)]"
            )
        session = Session(module, self.recipe, self._mask)
        session.smoothing.remedy = "make the training loss with callback.criterion(loss_fn) in training_step"
        names = ("_compiled_call_impl", *(("forward",) if getattr(module, "_compiler_ctx", None) else ()))
        compiled = {name: vars(module).pop(name) for name in names if name in vars(module)}
        try:
            self._session = session.attach()  # follows the forward pass as it was written
            self._there = {name for name, _ in module.named_modules()}
        finally:
            vars(module).update(compiled)

    def _go_last(self, trainer: Any) -> None:
        """Move behind all callbacks but those that write checkpoints: others put averages into the network when training ends,
        and into a checkpoint."""
        self._undo.append(functools.partial(setattr, trainer, "callbacks", trainer.callbacks))
        trainer.callbacks = sorted(trainer.callbacks, key=lambda other: (_is_a(other, "Checkpoint"), other is self))

    def _saving(self, save: Callable[..., None], checkpoint: dict[str, Any]) -> None:
        save(checkpoint)
        put_aside(self._session, checkpoint)

    def _loading(self, trainer: Any, module: Any, load: Callable[..., None], checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("session")
        fits = trainer.state.fn == "fit"
        if fits and self.session.state == "finished" and saved is not None and saved["state"] != "finished":
            self._attach(trainer, module)  # go back to before the end, from which on there are other parameters
        session = self._session
        plain = session is None or session.model is not module or session.state == "finished"
        put_back(checkpoint, plain)
        if fits and not plain and saved is None:
            remedy = "load its weights into the module and start a new run"
            raise TostError(f"ckpt_path: expected a checkpoint of a run with TostLightning, got one without; {remedy}")
        if saved is not None and session is not None and not plain:
            session.load_state_dict(saved)
        load(checkpoint)

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


class _Batches:
    """The training batches as the module gets them: its hooks and the precision may change them on their way."""

    def __init__(self, trainer: Any) -> None:
        loader, module = trainer.fit_loop._combined_loader, trainer.lightning_module
        self.loader = type(loader)(loader.iterables, loader._mode)  # the Trainer goes through its own already
        self.loader.limits = loader.limits
        convert, place = trainer.precision_plugin.convert_input, trainer.strategy.batch_to_device
        self.place = lambda batch: place(module._on_before_batch_transfer(convert(batch), dataloader_idx=0))

    def __iter__(self) -> Iterator[Any]:
        for batch, *_ in self.loader:
            yield self.place(batch)


def _is_a(thing: Any, *names: str) -> bool:
    """Whether it is one of these classes of Lightning's, of either name that Lightning is imported by."""
    return any(base.__name__ in names for base in type(thing).__mro__)


def _averages(callbacks: list[Any]) -> list[str]:
    return [type(each).__name__ for each in callbacks if _is_a(each, "WeightAveraging", "StochasticWeightAveraging")]


def _run_all(calls: list[Callable[[], None]]) -> None:
    while calls:
        calls.pop()()


def _lengths(trainer: Any, automatic: bool) -> tuple[int | None, int | None]:
    """How many optimizer steps the whole run and one epoch have, as far as they are known."""
    batches, total = trainer.num_training_batches, trainer.estimated_stepping_batches
    per_epoch = None if batches == math.inf else math.ceil(batches / trainer.accumulate_grad_batches)
    for each in trainer.callbacks if per_epoch is not None and trainer.max_epochs != -1 else ():
        if _is_a(each, "StochasticWeightAveraging"):
            total = min(total, per_epoch * each._max_epochs)  # it adds an epoch for the statistics of norms
        if _is_a(each, "GradientAccumulationScheduler"):
            parts = map(each.get_accumulate_grad_batches, range(trainer.max_epochs))
            total, per_epoch = min(total, sum(math.ceil(batches / part) for part in parts)), None
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
    """Raise TostError where weights are in parts, norms are replaced behind us, or other processes have copies of us."""
    ours = _is_a(strategy, "SingleDeviceStrategy", "DDPStrategy")
    apart = not ours or _is_a(strategy, "DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy")
    copies = _is_a(strategy.launcher, "_MultiProcessingLauncher")
    kind = getattr(strategy, "_start_method", None) if copies else type(strategy).__name__
    for unfit, got, remedy in (
        (apart, f"{kind}, which keeps weights where no mask reaches them", "use 'ddp', or FSDP2 with TostHook or session.drive"),
        (copies, f"processes by {kind!r}, whose networks come back without a session", "run the script with strategy='ddp'"),
        (getattr(strategy, "_layer_sync", None), "sync_batchnorm=True, which replaces norms behind us",
         "convert the module before fit: torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)"),
    ):  # fmt: skip
        if unfit:
            raise TostError(f"TostLightning: expected one device or DDP, got {got}; {remedy}")
