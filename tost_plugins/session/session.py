"""Session: one model trained with one recipe. Owns the mask, the tweaks and the clock, from attach to finish."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import tost_plugins  # the front door knows where recipes live; importing them here would be a circle
from tost_plugins import masks
from tost_plugins.errors import Inapplicable, TostError
from tost_plugins.masks.base import Moving
from tost_plugins.masks.mask import Mask, density
from tost_plugins.masks.topk import revive
from tost_plugins.session import averages, buffers, gradients, optimizing
from tost_plugins.session.moving import Movement
from tost_plugins.session.optimizer_hooks import drive
from tost_plugins.session.zeros import Zeros
from tost_plugins.training import sharding
from tost_plugins.training.clock import Clock, times_of
from tost_plugins.training.log import say
from tost_plugins.training.params import clean_name, prunable, some, unwrap
from tost_plugins.training.task import Task, call
from tost_plugins.tweaks import LabelSmoothing, Tweak
from tost_plugins.tweaks.label_smoothing import SmoothedLoss


class _Link:
    """Leads from a model to its session; in a copy or a pickle of the model it leads nowhere."""

    def __init__(self, session: Session | None = None) -> None:
        self.session = session

    def __reduce__(self) -> tuple:
        return _Link, ()


def session_of(model: nn.Module) -> Session | None:
    """The session that is attached to this very model object, if any: adapters find theirs again by it."""
    return getattr(getattr(model, "tost_session", None), "session", None)


@dataclass(frozen=True)
class Report:
    """What a sparse network is made of. `active_parameters` counts the weights that the mask keeps, everything that is
    not masked, and the ghosts while they are there; `rows` has one entry per masked layer."""

    sparsity: float
    layers: int
    active_parameters: int
    ghost_parameters: int
    total_parameters: int
    left_out: tuple[str, ...] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        ghosts = f" ({self.ghost_parameters:,} of them ghosts)" if self.ghost_parameters else ""
        return (
            f"sparsity {self.sparsity:.4f} over {self.layers} layers, "
            f"{self.active_parameters:,} active parameters{ghosts} of {self.total_parameters:,}"
        )


class Session:
    """A sparse training run: `attach`, then `start`, `before_step` / `after_step` around every step, then `finish`.

    Adapters and `drive` make these calls. `recipe` is a Recipe, a dict, a path or the name of a shipped recipe; `mask`
    is a Mask to use instead of the recipe's, and of a loaded checkpoint's. Calls out of order raise TostError.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
        >>> session = Session(net, {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": []})
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> session.attach().start(optimizer, total_steps=1)
        >>> round(session.mask.sparsity, 2), str(session.finish())[:15]
        (0.5, 'sparsity 0.5000')
    """

    def __init__(
        self, model: nn.Module, recipe: tost_plugins.Recipe | dict | str | None = None, mask: Mask | None = None
    ) -> None:
        self.model, self.recipe, self.given_mask = model, tost_plugins.Recipe.of(recipe), mask
        self.state = "new"
        self.moving = self.recipe.mask if isinstance(self.recipe.mask, Moving) else None
        self.tweaks: list[Tweak] = list(self.recipe.tweaks)
        self.left_out: list[str] = []
        self.clock = Clock()
        self.optimizer: Optimizer | None = None
        self.smoothed = False  # whether the training loss has been smoothed since start
        self.smoothing_remedy = "make the training loss with session.criterion(loss_fn)"
        self._mask: Mask | None = None
        self._masked: list[tuple[nn.Parameter, Tensor]] = []  # weights, and their masks in the weights' own dtype
        self._gradients: gradients.Following | None = None  # masks them as they come, while a loop goes on
        self._zeros = Zeros(())  # watches over them
        self._movement: Movement | None = None  # of a mask that moves, while it runs
        self._moved: dict[str, float] = {}  # what it had to say at the end
        self._watcher: Any = None  # what the recipe's `watch` makes, while the run goes on
        self._stepped = False  # whether this very session has seen a step: a resumed run has to smooth its loss again
        self._gone_back = False  # whether the last that happened to the run was the loading of an older checkpoint
        self._seen: tuple[int, int] | None = None  # identity and version of the clock buffer when last written

    # ---- lifecycle

    def attach(self, optimizer: Optimizer | None = None) -> Session:
        """Put ghosts, soft activations and mask buffers into the model: before DDP, FSDP and torch.compile.

        An optimizer that exists already may be given, so that the ghosts join it; `start` does the same.
        Raises TostError, with the model unchanged, when something in the recipe has nothing to act on.
        """
        self._expect("attach", "new")
        if unwrap(self.model) is not self.model:
            raise TostError(
                f"attach: expected the bare model, got it inside {type(self.model).__name__}; "
                f"attach first, then wrap or compile"
            )
        sharding.check_bare("attach", self.model)
        if session_of(self.model) is not None:  # a copy, whose session is another model's, is taken over as it is
            raise TostError(
                "attach: expected a model without a session, got one that is attached already; "
                "use that session, or finish() it first"
            )
        params, known = self._params(), buffers.known(self.model)
        if optimizer is not None:
            self.optimizer = optimizing.innermost(optimizer, params)
        self._attach_tweaks()
        remove = buffers.add(self.model, self.recipe.mask, known)
        self._undo = [remove, self.model.register_load_state_dict_post_hook(_loaded).remove]
        self._added = buffers.names(self.model) - known
        if self.optimizer is not None:
            optimizing.join(self.optimizer, self._companions())
        self.state = "attached"
        self.model.tost_session = _Link(self)  # type: ignore[assignment]
        return self

    def start(
        self,
        optimizer: Optimizer,
        batches: Any = None,
        *,
        loss_fn: Callable[..., Tensor] | None = None,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        clock: Clock | None = None,
        forward: Callable[..., Any] = call,
        criterion: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        """Find the mask and apply it (or, where a checkpoint was loaded, take both from it) before the first step.

        `batches` is something that can be read again and again, for masks and initialisations that look at data;
        `total_steps` and `steps_per_epoch` count optimizer steps. A `clock` is the trainer's own time; it counts before
        the first step, and where a checkpoint is from another step, since its weights begin another run then. Raises
        TostError with the weights unchanged.
        """
        self._expect("start", "attached", "running", "finished")
        self._check_sharding()
        self._check_modules()
        self.adopt(optimizer)
        if clock is not None and self.state != "finished" and self.saved_step() not in (-1, clock.step or None):
            buffers.write_clock(self.model, clock, lengths=True)
        if self.state != "attached":
            if self._seen is None:  # finished before it started: what was loaded since is the result
                self._mask = Mask.from_zeros(self._params())
            self._notice_loading()
            self._refresh()
            self._follow_gradients()
            return
        clock = clock or Clock(0, total_steps, steps_per_epoch)

        def task() -> Task:
            return Task(self.model, self._params(), batches, loss_fn, forward, criterion)

        if self.saved_step() >= 0:
            self._resume(clock)
            self._watch(task(), self.clock)
        else:
            self._check_times(clock)
            self._watch(task(), clock)
            with sharding.unsharded(self.model):
                mask = self._prepare(task(), clock)
            self._begin(mask, clock)
        self.state = "running"
        self._follow_gradients()
        self._look()

    def adopt(self, optimizer: Optimizer) -> None:
        """Train with this optimizer; ghosts that it lacks join their convolutions' groups. `start` does the same."""
        self.optimizer = optimizing.innermost(optimizer, self._params())
        optimizing.join(self.optimizer, self._companions())

    def before_step(self, check_finite: bool = True) -> None:
        """With gradients final and unscaled: mask them, or move the mask in place of the step. Raises TostError on NaN
        or Inf, before any weight changes; `check_finite=False` is for loss scalers, which skip such a step themselves."""
        self._expect("before_step", "running", "finished")
        self._notice_loading()
        if self.state == "running":
            self._check_smoothing()
        bad = optimizing.not_finite(self.model, self.optimizer) if check_finite and self.optimizer else []
        if bad:
            raise TostError(
                f"step {self.clock.step}: expected finite gradients, got NaN or Inf in {some(bad)}; "
                f"lower the learning rate, clip gradients, or check the data"
            )
        movement = self._movement
        if movement is None or not movement.before(self.clock, self.optimizer, check_finite):
            self._gradients.mask() if self._gradients is not None else optimizing.mask_gradients(self._masked)

    def after_step(self, step: int | None = None) -> None:
        """After the optimizer's step: see that weights and optimizer state are 0 outside the mask (`Zeros` says how), then
        count the step and advance the schedules.

        `step` is the number of finished optimizer steps as the trainer counts them; None counts one more.
        """
        self._expect("after_step", "running", "finished")
        if self.state == "running":
            before, self.clock = self.clock.step, self.clock.at(self.clock.step + 1 if step is None else step)
            if self._movement is not None and self.clock.step != before:  # a step told twice moves no mask twice
                self._movement.after(self.clock)
        self.conceal()
        keeper = self._state_keeper()
        if self._movement is not None and self._movement.moved and keeper is not None:
            self.enforce()
        else:
            self._zeros.watch(keeper)
        if self.state == "running":
            self._check_smoothing()  # with a closure there is no moment before the step
            self._stepped, self._gone_back = True, False
            self._tick(self.clock.step)
            self._look()

    def conceal(self) -> None:
        """Take removed weights that train out of sight out of the network again: part of `after_step`, and to be called
        in its place where an optimizer has skipped the step by itself, or was interrupted."""
        if self._movement is not None:
            self._movement.conceal(self.clock)

    def enforce(self) -> None:
        """Set weights and optimizer state outside the mask to exactly 0; hidden weights keep their state."""
        optimizing.mask_weights(self._masked, self._state_keeper())
        if self._movement is not None:
            self._movement.moved = False

    def _state_keeper(self) -> Optimizer | None:
        """The optimizer, if it is to have no state of removed weights."""
        hides = self._movement is not None and self._movement.hides(self.clock)
        return None if hides else self.optimizer

    def release(self) -> None:
        """Let gradients be: a loop is over. Part of `finish`, and to be called where a finished session has trained on;
        `start` takes them up again."""
        if self._gradients is not None:
            self._gradients.end()
        self._gradients = None

    def finish(self) -> Report:
        """Take ghosts and buffers away: the model has its own modules, keys and forward pass again, and is sparse.

        Warns where ghosts or soft activations are still at work. Raises TostError, with the model unchanged, where the
        run has gone back to a checkpoint at which they were, the best one say: the plain network is another than that.
        """
        self._expect("finish", "attached", "running")
        if self.state == "running":
            self._notice_loading()
            self._moved = self._movement.metrics() if self._movement is not None else {}  # its buffers go
            self._warn_if_live()
            if self._watcher is not None:
                self._watcher.finish(self.mask, self.clock)
        sharding.reshard(self.model)
        if self.optimizer is not None:
            optimizing.leave(self.optimizer, (param for param, _ in self._companions()))
        for tweak in reversed(self.tweaks):
            tweak.detach(self.model)
        for undo in self._undo:
            undo()
        del self.model.tost_session
        started, self.state = self.state == "running", "finished"
        self._keep(self.mask if started else Mask.from_zeros(self._params()))  # what is there now is the result
        self.release()
        if started:
            self.enforce()
            self._warn_if_diverged()
        return self.report()

    def plain(self, average: nn.Module) -> nn.Module:
        """Once finished: the plain sparse network with the weights and statistics of `average`, a copy of the attached model
        such as torch's AveragedModel or an EMA keeps. A mask that has moved is the last one. Raises TostError for a copy
        from before attach."""
        if self.state != "finished":
            raise TostError(f"plain: expected a finished session, got one that is {self.state}; call finish() first")
        return averages.plain(self.model, self.mask, average)

    def drive(
        self,
        optimizer: Optimizer,
        batches: Any = None,
        loss_fn: Callable[..., Tensor] | None = None,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> contextlib.AbstractContextManager[Session]:
        """`with session.drive(optimizer, train_loader, total_steps=...)`: a plain loop inside trains sparse; on leaving
        without an error the session finishes."""
        return drive(self, optimizer, batches, loss_fn, total_steps, steps_per_epoch)

    def criterion(self, loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The training loss: `loss_fn(logits, labels)` with smoothed labels if the recipe smooths them and the model
        is in training mode, else `loss_fn` as it is."""
        tweak = self.smoothing
        if tweak is None:
            return loss_fn
        return SmoothedLoss(loss_fn, tweak.alpha, self.smooths_now)

    def smooths_now(self) -> bool:
        """Whether the loss of the batch at hand is to be smoothed; asking marks the recipe's smoothing as in use."""
        active = self.state == "running" and self.model.training
        self.smoothed = self.smoothed or active
        return active

    # ---- what it is

    @property
    def smoothing(self) -> LabelSmoothing | None:
        """The recipe's label smoothing, if it has any."""
        return next((tweak for tweak in self.tweaks if isinstance(tweak, LabelSmoothing)), None)

    @property
    def is_plain(self) -> bool:
        """Whether the network computes what it will when finished: no ghost and no soft activation is at work. The best
        checkpoint, and any other that the network is to be taken from, should be one of such a moment."""
        return not self._live()

    @property
    def mask(self) -> Mask:
        """The mask that the run trains with; raises TostError before `start`."""
        if self._movement is not None and self._movement.mask is not self._mask:
            self._count(self._movement.mask)
        if self._mask is None:
            raise TostError(f"session.mask: expected a started session, got state {self.state!r}; call start() first")
        return self._mask

    def metrics(self) -> dict[str, float]:
        """What every adapter logs: sparsity, alpha, beta, and the number of active parameters, ghosts included."""
        report = self.report(rows=False)
        found = {
            "tost/sparsity": report.sparsity,
            "tost/active_parameters": float(report.active_parameters),
            "tost/ghost_parameters": float(report.ghost_parameters),
        }
        found |= self._moved if self._movement is None else self._movement.metrics()
        for tweak in self.tweaks:
            found |= tweak.metrics(self.model)
        return found

    def report(self, rows: bool = True) -> Report:
        """Sparsity and parameter counts, per layer with `rows`."""
        mask = self.mask
        ghosts, total = self._sizes
        table = [
            {"layer": name, "shape": list(m.shape), "kept": int(m.sum()), "density": density(m)}
            for name, m in (mask.items() if rows else ())
        ]
        return Report(self._sparsity, len(mask), total - self._removed, ghosts, total, tuple(self.left_out), table)

    def state_dict(self) -> dict[str, Any]:
        """Primitives only: the recipe, the state and the clock. Masks, alpha and beta are buffers of the model."""
        clock = [self.clock.step, self.clock.total_steps, self.clock.steps_per_epoch]
        return {"recipe": self.recipe.to_dict(), "state": self.state, "clock": clock}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that a checkpoint belongs to this recipe, and take over what the model has loaded."""
        own, saved = self.recipe.to_dict(), tost_plugins.Recipe.from_dict(state["recipe"]).to_dict()  # as they are now
        differ = [key for key in ("mask", "tweaks") if saved.get(key) != own.get(key)]
        if differ:
            raise TostError(
                f"load_state_dict: expected a checkpoint of the same {' and '.join(differ)}, got "
                f"{state['recipe'].get(differ[0])!r}; resume with the recipe that the run was started with"
            )
        if state["state"] == "finished" and self.state == "attached":
            self.finish()
        self._notice_loading()

    def saved_step(self) -> int:
        """The step that the model's own buffer holds: that of a loaded checkpoint; -1 before the first start."""
        clock = buffers.read_clock(self.model)
        return -1 if clock is None else clock.step

    # ---- inside

    def _expect(self, call_name: str, *states: str) -> None:
        if self.state not in states:
            raise TostError(
                f"{call_name}: expected a session that is {' or '.join(states)}, got one that is "
                f"{self.state}; the order is attach, start, before_step / after_step, finish"
            )

    def _check_modules(self) -> None:
        """Modules that others put in the place of ours would train without masks, ghosts and soft activations."""
        if self.state == "finished":
            return
        here = {clean_name(name) for name in buffers.names(self.model)}
        lost = {
            name.replace(".ghost_skip.", ".").rpartition(".")[0] for name in self._added if clean_name(name) not in here
        }
        if lost:
            raise TostError(
                f"start: expected the modules that were there at attach, got others at {some(sorted(lost))}; "
                f"replace modules before attach"
            )
        for tweak in self.tweaks:
            tweak.check(self.model)

    def _check_sharding(self) -> None:
        sharding.check_kind("start", self.model)
        if not any(map(sharding.is_part, self._params().values())):
            return
        if self.moving is not None and self.moving.hides:
            raise TostError(
                f"mask {self.recipe.mask.kind}: expected whole weights on every rank, got FSDP2's parts, of which no rank can "
                f"tell the largest after every step; use DDP, or a mask that moves now and then (rigl, set, gradual)"
            )
        if self.recipe.watch is not None:
            raise TostError(
                "watch: expected whole weights on every rank, got FSDP2's parts; use DDP, or leave watch out of the recipe"
            )

    def _attach_tweaks(self) -> None:
        done: list[Tweak] = []
        try:
            for tweak in self.recipe.tweaks:
                try:
                    tweak.attach(self.model, self.recipe.seed, self.recipe.mask.ignore)
                    done.append(tweak)
                except Inapplicable as reason:
                    self._leave_out(tweak, reason)
        except TostError:
            for tweak in reversed(done):
                tweak.detach(self.model)
            self.tweaks = list(self.recipe.tweaks)
            raise

    def _leave_out(self, tweak: Tweak, reason: Inapplicable) -> None:
        """Go on without an optional tweak that has nothing to act on; others raise."""
        if not tweak.optional:
            raise reason
        self.left_out.append(f"{tweak.kind} ({str(reason).split(': ', 1)[-1].split(';')[0]})")
        self.tweaks = [other for other in self.tweaks if other is not tweak]

    def _prepare(self, task: Task, clock: Clock) -> Mask:
        """Find the mask, apply it, and let the tweaks start; after an error the weights are what they were."""
        weights = {param: param.detach().clone() for param in self.model.parameters()}
        with contextlib.ExitStack() as quiet:
            for tweak in self.tweaks:
                quiet.enter_context(tweak.quiet(self.model))
            mask = self._find_mask(task)
            hides = self.moving is not None and self.moving.hides and not self.moving.settled(clock)
            try:
                if not hides:
                    mask.apply_(task.params)
                self._start_tweaks(task, mask)
            except BaseException:
                with torch.no_grad():
                    for param, value in weights.items():
                        param.copy_(value)
                raise
        return mask

    def _begin(self, mask: Mask, clock: Clock) -> None:
        """Train with this mask from here on."""
        params = self._params()
        for which in (buffers.MASK, buffers.SEEN) if self.moving is not None else (buffers.MASK,):
            for name, buffer in buffers.beside(self.model, params, which).items():
                buffer.copy_(mask[name])
        self.clock = clock
        self._keep(mask)
        if self._movement is not None:
            self._movement.begin(clock)
        self._refresh()
        kinds = ", ".join(tweak.kind for tweak in self.tweaks) or "no tweaks"
        left = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        source = "a given mask" if self.given_mask is not None else self.recipe.mask.kind
        say(f"recipe {self.recipe.name}: {source}, {self.report(rows=False)}; {kinds}{left}")

    def _start_tweaks(self, task: Task, mask: Mask) -> None:
        for tweak in list(self.tweaks):
            try:
                tweak.start(task, mask)
            except Inapplicable as reason:
                self._leave_out(tweak, reason)
                tweak.detach(self.model)

    def _find_mask(self, task: Task) -> Mask:
        if self.given_mask is not None:
            return self._given(task.params)
        try:
            return masks.run(self.recipe.mask, task, self.recipe.seed)
        except TostError as error:
            raise error.at(f"mask {self.recipe.mask.kind}") from None

    def _resume(self, clock: Clock) -> None:
        """Go on from what a checkpoint put into the buffers; the run's length stays what it was at its start."""
        saved = buffers.read_clock(self.model) or clock
        self._gone_back = self._stepped and saved.step < self.clock.step
        total, per_epoch = saved.total_steps, saved.steps_per_epoch
        self.clock = Clock(
            saved.step,
            clock.total_steps if total is None else total,
            clock.steps_per_epoch if per_epoch is None else per_epoch,
        )
        self._check_times(self.clock)
        self._impose()
        self._refresh()

    def _given(self, params: Mapping[str, nn.Parameter]) -> Mask:
        assert self.given_mask is not None
        return revive(self.given_mask.fit(params), params, getattr(self.recipe.mask, "on_collapse", "error"))

    def _impose(self) -> None:
        """A given mask that does not move stands above a checkpoint's: a lottery ticket goes on from an early, denser state."""
        if self.given_mask is None or self.moving is not None:
            return
        params = self._params()
        mask, saved = self._given(params), buffers.beside(self.model, params)
        if mask != (loaded := Mask(saved)):
            say(f"the given mask (sparsity {mask.sparsity:.4f}) replaces the checkpoint's ({loaded.sparsity:.4f})")
        for name, buffer in saved.items():
            buffer.copy_(mask[name])

    def _refresh(self) -> None:
        """Take the mask from the model's buffers (keep it, once finished), and bring all else in line."""
        finished = self.state == "finished"
        self._keep(self.mask if finished else Mask(buffers.beside(self.model, self._params())))
        self.enforce()
        if not finished:
            self._tick(self.clock.step)

    def _keep(self, mask: Mask) -> None:
        params = self._params()
        # laid out in memory as the weight is: multiplying two layouts takes many times as long
        kept = {
            name: torch.empty_like(p.detach()).copy_(sharding.like(mask[name].to(p.device), p))
            for name, p in params.items()
        }
        self._count(mask)
        # once, since Composer logs them in every step
        ghosts = sum(param.numel() for param, _ in self._companions())
        self._sizes = ghosts, sum(param.numel() for param in self.model.parameters())
        self._masked, self._movement = list(zip(params.values(), kept.values(), strict=True)), None
        self._zeros = Zeros(self._masked)
        if self.moving is not None and self.state != "finished":
            self._movement = Movement(self.moving, self.recipe.seed, self.model, params, kept)
        if self._gradients is not None:  # loading may have put other parameters and masks in place of those
            self._follow_gradients()

    def _follow_gradients(self) -> None:
        """From now on no gradient of a removed weight is seen by anybody, but where the mask is to see it."""
        self.release()
        session = weakref.ref(self)

        def dense() -> bool:
            found = session()
            return found is None or (found._movement is not None and found._movement.wants_dense(found.clock))

        self._gradients = gradients.Following(self._masked, dense)

    def _count(self, mask: Mask) -> None:
        self._mask, self._sparsity, self._removed = mask, mask.sparsity, mask.size - mask.kept

    def _tick(self, step: int) -> None:
        self.clock = self.clock.at(step)
        for tweak in self.tweaks:
            tweak.advance(self.model, self.clock)
        self._seen = buffers.write_clock(self.model, self.clock, lengths=self._seen is None)

    def _notice_loading(self) -> None:
        """A clock buffer that somebody else wrote means that a checkpoint was loaded: go on from there."""
        if self.state == "running" and self._seen != buffers.version(self.model):
            self._resume(self.clock)

    def _params(self) -> dict[str, nn.Parameter]:
        sharding.reshard(self.model)
        return prunable(self.model, self.recipe.mask.ignore)

    def _companions(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [pair for tweak in self.tweaks for pair in tweak.companions(self.model)]

    def _watch(self, task: Task, clock: Clock) -> None:
        self._watcher = None if self.recipe.watch is None else self.recipe.watch.begin(task, clock)

    def _look(self) -> None:
        if self._watcher is not None and self._watcher.due(self.clock):
            self._watcher.look(self.mask, self.clock)

    def _live(self) -> dict[str, Any]:
        """What makes the network another than the finished one: names and strengths as in `metrics`."""
        if self.state in ("new", "finished"):
            return {}
        found = {key: value for tweak in self.tweaks for key, value in tweak.metrics(self.model).items()}
        return {key: value for key, value in found.items() if key.endswith(("alpha", "active")) and value}

    def _warn_if_live(self) -> None:
        live = self._live()
        if live and self._gone_back:
            raise TostError(
                f"finish: expected a checkpoint from after the ghosts and soft activations have ended, got one of step "
                f"{self.clock.step} ({live}), which is another network without them; load a later one, or train on"
            )
        if self.moving is not None and hasattr(self.moving, "until") and not self.moving.settled(self.clock):
            live["mask"] = "moving"
        if live:
            say(
                f"finish at step {self.clock.step}, before the schedules ended ({live}): the network changes "
                f"abruptly and may lose accuracy",
                logging.WARNING,
            )

    def _warn_if_diverged(self) -> None:
        """The last step may have blown weights up, which no gradient tells any more; zeros outside the mask are kept."""
        bad = optimizing.diverged(self._params())
        if bad:
            optimizing.fill_weights(self._masked)
            say(
                f"finish: expected finite weights, got NaN or Inf in {some(bad)}; lower the learning rate, or take an "
                f"earlier checkpoint",
                logging.WARNING,
            )

    def _check_times(self, clock: Clock) -> None:
        for part in (self.recipe.mask, *self.tweaks):
            for name, time in times_of(part).items():
                try:
                    time.steps(clock)
                except TostError as error:
                    raise error.at(f"{part.kind}.{name}") from None

    def _check_smoothing(self) -> None:
        if not self._stepped and self.smoothing is not None and not self.smoothed:
            text = (
                f"label_smoothing: expected a training loss that it can act on, got one that never came by; "
                f"{self.smoothing_remedy}, or leave label_smoothing out of the tweaks"
            )
            if not self.smoothing.optional:
                raise TostError(text)
            say(text, logging.WARNING)
            self.left_out.append("label_smoothing (the loss never came by)")
            self.tweaks = [tweak for tweak in self.tweaks if tweak is not self.smoothing]


def _loaded(model: nn.Module, _: Any) -> None:
    """Let a run that loads a checkpoint go on from there at once: the next forward pass is already that step's."""
    session = session_of(model)
    if session is not None:
        session._notice_loading()
