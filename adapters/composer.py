"""MosaicML Composer: `Trainer(model=model, algorithms=[TostAlgorithm()], ...)`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from composer import Trainer, algorithms
from composer.algorithms import EMA, SAM, SWA, GradientClipping, LabelSmoothing
from composer.core import Algorithm, DataSpec, Event, Precision, State, TimeUnit
from composer.loggers import Logger
from composer.utils import ensure_tuple
from torch import Tensor, nn
from torch.optim import Optimizer

from tost_plugins.errors import TostError
from tost_plugins.masks.base import Moving
from tost_plugins.masks.mask import Mask
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.session.active_tweaks import ActiveTweaks
from tost_plugins.session.session import Session, session_of
from tost_plugins.training.clock import Clock, times_of
from tost_plugins.training.params import unwrap
from tost_plugins.tweaks.label_smoothing import check_hard


def apply_tost(
    model: nn.Module,
    recipe: Recipe | dict | str | None = None,
    optimizers: Optimizer | tuple[Optimizer, ...] | None = None,
    **overrides: Any,
) -> Session:
    """Put ghosts, soft activations and mask buffers into a model, in place, before it is wrapped or compiled.

    `recipe` and the overrides are those of `TostAlgorithm`, which drives the session inside a Trainer. Ghosts join the
    optimizer's group of the convolution they stand beside. A model that has a session keeps it: twice is once. Raises
    TostError, with the model unchanged, when a part of the recipe has nothing to act on, and for a model that is attached
    with another recipe.

    Example:
        >>> session = apply_tost(model, {"mask": {"kind": "snip", "sparsity": 0.9}})  # doctest: +SKIP
    """
    asked, session = recipe is not None or bool(overrides), session_of(model)
    optimizer: Any = list(ensure_tuple(optimizers)) or None
    mask = overrides.pop("mask") if isinstance(overrides.get("mask"), Mask) else None
    wanted = Recipe.of(recipe, **overrides)
    if session is None or session.state == "finished":
        return Session(model, wanted, mask).attach(optimizer)
    if asked and (wanted, mask) != (session.recipe, session.given_mask):
        raise TostError(
            f"apply_tost: expected the recipe and mask that the model is attached with, {session.recipe.name!r}, got "
            f"others, {wanted.name!r}; give the same ones or none, or finish() that session first"
        )
    if optimizer is not None:
        session.adopt(optimizer)
    return session


#: Composer's algorithms that put other modules in the place of convolutions, linear layers and norms.
_REPLACE = ["BlurPool", "Factorize", "GatedLinearUnits", "GhostBatchNorm", "SqueezeExcite", "WeightStandardization"]


class TostAlgorithm(Algorithm):
    """ToST as a Composer algorithm: attaches at INIT, finds the mask before the first batch, finishes at FIT_END.

    `recipe` is a Recipe, a dict, a path or a shipped name (None: "tost_any_mask"); overrides are `mask` (a kind, a
    path, a dict or a Mask), `sparsity`, `tweaks`, `seed`, `compact`, `watch`. Put it behind what replaces layers (BlurPool,
    say) and in front of EMA and SWA in the list; GradientClipping may stand where it likes unless a tweak acts around steps.
    Raises TostError on a bad recipe at once, and when the Trainer is made if a part cannot act or labels are smoothed twice.

    Example:
        >>> TostAlgorithm(sparsity=0.9).recipe.mask.sparsity
        0.9
    """

    def __init__(self, recipe: Recipe | dict | str | None = None, **overrides: Any) -> None:
        self._asked = {"recipe": recipe, **overrides}
        self._take(Recipe.of(recipe, **{k: v for k, v in overrides.items() if not isinstance(v, Mask)}))
        self._session: Session | None = None
        self._unfollow: list[Callable[[], None]] = []  # what ends the smoothing of the model's loss
        self._added = True  # whether Composer added us for a checkpoint's sake

    @property
    def session(self) -> Session:
        """The Session of the Trainer's model; raises TostError before the Trainer is made."""
        if self._session is None:
            raise TostError("TostAlgorithm.session: expected a Trainer, got none; write Trainer(algorithms=[...], ...)")
        return self._session

    def __repr__(self) -> str:
        return self._repr

    @staticmethod
    def required_on_load() -> bool:
        """A checkpoint from the middle of a run needs the ghosts: Composer adds the algorithm where it is missing."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """The repr that Composer rebuilds us from, and the session's primitives."""
        return {**super().state_dict(), "session": self.session.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Composer calls this after the model's weights are loaded and before the optimizer's state is."""
        if "session" in state:
            self.session.load_state_dict(state["session"])

    def match(self, event: Event, state: State) -> bool:
        """Whether we act on this event."""
        return event in _TABLE

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """What the table at the end of this file says."""
        _TABLE[event](self, state, logger)

    def _take(self, recipe: Recipe) -> None:
        self.recipe, self._repr = recipe, f"TostAlgorithm({recipe.to_dict()!r})"  # Composer reads it at every event

    def _attach(self, state: State, logger: Logger) -> None:
        others = [type(other) for other in state.algorithms if other is not self]
        if sum(isinstance(each, TostAlgorithm) for each in state.algorithms) > 1:
            raise TostError("TostAlgorithm: expected one in a Trainer, got several; merge their recipes")
        sam = [each for each in state.optimizers if hasattr(each, "base_optimizer")]
        if isinstance(self.recipe.mask, Moving) and (sam or any(issubclass(other, SAM) for other in others)):
            raise TostError(
                f"TostAlgorithm: mask {self.recipe.mask.kind}: expected one gradient for each step, got SAM, which takes "
                f"two; leave SAM out, or use a mask that does not move"
            )
        if state.fsdp_config is not None or state.tp_config is not None:
            raise TostError(
                "TostAlgorithm: expected one process or DDP, got a parallelism_config, which keeps weights in parts; leave it "
                "out (DDP), or use FSDP2 (fully_shard) in a loop of your own (session.drive)"
            )
        self._check_places(state)
        sure = [tweak for tweak in self.recipe.tweaks if not tweak.least_steps]  # the others may rest in this run
        self._check_clipping(state, ActiveTweaks(state.model, sure))
        smooths = [tweak for tweak in sure if tweak.kind == "label_smoothing"]
        twice = self._smoothed_twice(state) if smooths else None
        if twice is not None and not smooths[0].optional:
            raise twice
        self._session, self._added = apply_tost(unwrap(state.model), optimizers=state.optimizers, **self._asked), True
        self._take(self._session.recipe)
        if twice is not None and self._session.smoothing.tweak is not None:
            self._session.smoothing.leave_out(twice, "something else smooths labels")

    def _check_places(self, state: State) -> None:
        """Raise TostError where what replaces layers would come too late, or what averages weights too early."""
        here = state.algorithms.index(self)
        averages = [type(other).__name__ for other in state.algorithms[:here] if isinstance(other, (EMA, SWA))]
        if averages and isinstance(self.recipe.mask, Moving) and self.recipe.mask.hides:
            raise TostError(
                f"TostAlgorithm: mask {self.recipe.mask.kind}: expected to be in front of what averages the weights, got "
                f"{averages[0]} in front, which would average hidden weights too; write [TostAlgorithm(...), {averages[0]}(...)]"
            )
        late = [name for other in state.algorithms[here:] if (name := type(other).__name__) in _REPLACE]
        if late:
            raise TostError(
                f"TostAlgorithm: expected to be behind what replaces layers, got it in front of {late[0]}; put it behind: "
                f"write [{late[0]}(...), TostAlgorithm(...)]"
            )

    def _check_clipping(self, state: State, tweaks: ActiveTweaks) -> None:
        if tweaks.around_steps and GradientClipping in map(type, state.algorithms[: state.algorithms.index(self)]):
            raise TostError(
                "TostAlgorithm: expected to be in front of GradientClipping where a tweak acts on gradients, got it behind; "
                "write [TostAlgorithm(...), GradientClipping(...)]"
            )

    def _smoothed_twice(self, state: State) -> TostError | None:
        if LabelSmoothing in map(type, state.algorithms):
            return TostError(
                "TostAlgorithm: label_smoothing: expected to be the only one, got Composer's LabelSmoothing as "
                "well; remove it, or leave label_smoothing out of the tweaks"
            )
        try:
            check_hard("TostAlgorithm: label_smoothing", getattr(unwrap(state.model), "_loss_fn", None))
        except TostError as error:
            return error
        return None

    def _loaded(self, state: State, logger: Logger) -> None:
        """Start at once where the run is known or goes on; finish what is over already."""
        session, known = self.session, state.dataloader is not None and state.max_duration is not None
        if session.state == "attached" and self._added and session.saved_step() < 0:
            session.finish()  # added for the weights of a finished run, which need nothing
        elif known or (session.state == "attached" and session.saved_step() >= 0):
            self._start(state, logger, _clock(state, session) if known else None)
            if session.state == "running" and session.clock.step >= (session.clock.total_steps or float("inf")):
                session.finish()
        if session.state == "finished":
            session.release()  # until FIT_START: who only evaluates it has a network that trains like any other

    def _start(self, state: State, logger: Logger, clock: Clock | None) -> None:
        model: Any = unwrap(state.model)
        if self.session.state == "attached":
            logger.log_hyperparameters({"tost": self.recipe.to_dict()})
        self.session.start(
            state.optimizers,
            _batches(state),
            clock=clock,
            forward=lambda call, batch: call(batch),
            criterion=lambda outputs, batch: _total(type(model).loss(model, outputs, batch)),  # with hard labels
        )

    def _fit(self, state: State, logger: Logger) -> None:
        self._start(state, logger, _clock(state, self.session))
        if self.session.state == "running":  # now it is known what rests
            self._check_clipping(state, self.session.tweaks)
            if self.session.smoothing.tweak is not None and (twice := self._smoothed_twice(state)) is not None:
                self.session.smoothing.leave_out(twice, "something else smooths labels")
        smoothing, model = self.session.smoothing, unwrap(state.model)
        if self.session.state == "running" and not self._unfollow:
            self._unfollow = [
                state.model.register_forward_pre_hook(smoothing.before_forward).remove,
                state.model.register_forward_hook(smoothing.after_forward, always_call=True).remove,
                functools.partial(vars(model).pop, "loss", None),
            ]
            model.loss = functools.partial(smoothing.around, model.loss)  # type: ignore[operator, assignment]

    def _count(self, state: State, logger: Logger) -> None:
        self.session.after_step(int(state.timestamp.batch))
        logger.log_metrics(self.session.metrics())

    def _finish(self, state: State, logger: Logger) -> None:
        if self.session.state == "running":
            self.session.after_step(int(state.timestamp.batch))  # EMA may have put an averaged clock into the model
            self.session.finish()
        self.session.release()
        while self._unfollow:
            self._unfollow.pop()()
        for optimizer in state.optimizers:  # SAM keeps a state beside the inner optimizer's, also of ghosts now gone
            live = {param for group in optimizer.param_groups for param in group["params"]}
            for param in optimizer.state.keys() - live:
                del optimizer.state[param]


_TABLE = {
    Event.INIT: TostAlgorithm._attach,
    Event.BEFORE_LOAD: lambda self, state, logger: setattr(self, "_added", False),  # who is added sees no such event
    Event.AFTER_LOAD: TostAlgorithm._loaded,
    Event.FIT_START: TostAlgorithm._fit,
    Event.AFTER_TRAIN_BATCH: lambda self, state, logger: self.session.before_step(
        check_finite=state.precision != Precision.AMP_FP16  # there Composer's loss scaler skips such steps
    ),
    Event.BATCH_END: TostAlgorithm._count,
    Event.FIT_END: TostAlgorithm._finish,
}


class _Batches:
    """The batches as the network gets them: a DataSpec may change them on their way."""

    def __init__(self, spec: DataSpec, device: Any) -> None:
        self.spec, self.device = spec, device

    def __iter__(self) -> Iterator[Any]:
        spec, place = self.spec, self.device.batch_to_device
        return map(lambda batch: spec.microbatch_transforms(place(spec.batch_transforms(batch))), spec.dataloader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.spec.dataloader, name)  # its generators, which are put back after a look


def _batches(state: State) -> Any:
    """An algorithm is given no reference to the Trainer, which alone knows the DataSpec; but it has called us."""
    frame: Any = sys._getframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), Trainer):
        frame = frame.f_back
    spec = frame and frame.f_locals["self"]._train_data_spec
    plain = spec is None or spec._default_transforms == spec.batch_transforms == spec.microbatch_transforms
    return state.dataloader if plain else _Batches(spec, state.device)


def _total(loss: Any) -> Tensor:
    """What Composer makes of the one or more losses that a model returns."""
    if isinstance(loss, dict) and "total" in loss:
        return loss["total"]
    return sum(part.mean() for part in ensure_tuple(loss))  # type: ignore[return-value]


def _clock(state: State, session: Session) -> Clock:
    """Composer's time in optimizer steps; how many there will be is unknown where it counts samples or tokens."""
    per_epoch, duration = state.dataloader_len and int(state.dataloader_len), state.max_duration
    assert duration is not None, "a duration is set whenever Composer starts"
    scales = {TimeUnit.BATCH: 1, TimeUnit.EPOCH: per_epoch}
    parts = (session.recipe.mask, *session.tweaks)
    shares = [str(time) for part in parts for time in times_of(part).values() if time.unit == "dur"]
    if duration.unit not in scales and shares and session.state != "finished":
        raise TostError(
            f"TostAlgorithm: expected max_duration in epochs or batches, since the recipe says {shares[0]!r}, got "
            f"{duration.to_timestring()!r}; write '90ep' or '5000ba', or the recipe's times in 'ba'"
        )
    return Clock(int(state.timestamp.batch), (scale := scales.get(duration.unit)) and duration.value * scale, per_epoch)


# Composer finds required algorithms by name in its own package, and has no other way to register one
algorithms.TostAlgorithm = TostAlgorithm  # type: ignore[attr-defined]
if "TostAlgorithm" not in algorithms.__all__:
    algorithms.__all__.append("TostAlgorithm")
