"""Session: one model trained with one recipe. It leads from attach to finish; what it leads stands beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

import tost_plugins  # the front door knows where recipes live; importing them here would be a circle
from tost_plugins.errors import TostError
from tost_plugins.masks.mask import Mask
from tost_plugins.session import averages, buffers, checks
from tost_plugins.session.active_tweaks import ActiveTweaks
from tost_plugins.session.drive import Loops, check_stepped
from tost_plugins.session.link import Link, loaded, session_of
from tost_plugins.session.optimizers import Optimizers
from tost_plugins.session.report import Report
from tost_plugins.session.run import Run
from tost_plugins.session.smoothing import Smoothing
from tost_plugins.session.start import say_looked
from tost_plugins.session.told import Told
from tost_plugins.training import sharding
from tost_plugins.training.calling import call
from tost_plugins.training.clock import Clock, count
from tost_plugins.training.params import device_of, left_out
from tost_plugins.training.reading import reading
from tost_plugins.training.task import Task

__all__ = ["Report", "Session", "session_of"]

#: In which states a call may come: attach, start and finish lead to the next one.
_MAY = {
    "attach": ("new",),
    "start": ("attached", "running", "finished"),
    "before_step": ("running", "finished"),
    "after_step": ("running", "finished"),
    "finish": ("attached", "running"),
}


class Session(Loops, Told):
    """A sparse training run: `attach`, then `start`, `before_step` / `after_step` around every step, then `finish`.

    Its `state` is "new", then "attached", "running", "finished"; calls out of order raise TostError. Adapters, `drive` and
    `begin` make these calls. `recipe` is a Recipe, a dict, a path or the name of a shipped recipe; `mask` is a Mask to use
    instead of the recipe's, and of a loaded checkpoint's.

    Example:
        >>> import torch
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
        if mask is not None and not isinstance(mask, Mask):
            raise TostError(
                f"mask: expected a Mask, got {type(mask).__name__}; Mask.load(path) reads a file, Mask(dict) takes tensors"
            )
        self.model, self.recipe, self.given_mask = model, tost_plugins.Recipe.of(recipe), mask
        self.state = "new"
        self.tweaks = ActiveTweaks(model, self.recipe.tweaks)
        self.smoothing = Smoothing(self)
        self.run = Run(model, self.recipe, mask, self.tweaks)
        self.optimizers: Optimizers | None = None
        self.looked: frozenset[str] = frozenset()  # at which losses that nobody has given the last start has looked
        self._added: Any = None  # our buffers in the model, while they are there

    # ---- lifecycle

    def attach(self, optimizer: Any = None) -> Session:
        """Put ghosts, soft activations and mask buffers into the model: before DDP, FSDP and torch.compile.

        An optimizer that exists already, or a list of them, may be given, so that the ghosts join it; `start` does the same.
        Raises TostError, with the model unchanged, when something in the recipe has nothing to act on.
        """
        self._expect("attach")
        checks.bare(self.model)
        self.run.norms.look()
        params, known = self.run.params, buffers.known(self.model)
        buffers.check_free(self.model, params)
        averages.check_late(self.model)
        if optimizer is not None:
            self.optimizers = Optimizers(optimizer, params)
        with self.run.compaction.attaching(self.tweaks.left_out):
            self.tweaks.attach(self.recipe)
        self.run.layers = tuple(params)  # whatever is frozen or freed later
        self.tweaks.left_out += left_out(self.model, self.recipe.mask.ignore)
        self._added = buffers.Added(self.model, self.recipe.mask, known, loaded)
        self.run.norms.freeze()
        self.state = "attached"
        self.model.tost_session = Link(self)  # type: ignore[assignment]
        if self.optimizers is not None:
            self.optimizers.join(self.tweaks.companions(), self.model)
        return self

    def start(
        self,
        optimizer: Any,
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

        `optimizer` is one or a list of several. `batches` is something that can be read again and again, for masks and
        initialisations that look at data, and so are `loss_fn(outputs, labels)`, `forward(model, batch)`, which calls the model,
        and `criterion(outputs, batch)`, its loss; `total_steps` and `steps_per_epoch` count optimizer steps. A `clock` is the
        trainer's own time; it counts before the first step, and where a checkpoint is from another step, since its weights
        begin another run then. A run that has begun goes on, with the lengths given now unless a checkpoint's stand above them.
        Raises TostError with the weights unchanged.
        """
        self._expect("start")
        sharding.check_kind("start", self.model)
        checks.in_whole(self.run.params, self.recipe.mask, self.recipe.watch)
        if self.state != "finished":
            checks.still_ours(self.model, self._added.names, self.tweaks)
        self.adopt(optimizer)
        if clock is not None and self.state != "finished" and self.saved_step() not in (-1, clock.step or None):
            buffers.write_clock(self.model, clock, lengths=True)
        if self.state != "finished":
            total, per_epoch = count("total_steps", total_steps), count("steps_per_epoch", steps_per_epoch)
            clock = clock or Clock(0, total, per_epoch)
            loss_fn = loss_fn or (self.smoothing.known if criterion is None else None)
            with reading(batches, device_of(self.model)) as found:  # once, for all that look at it
                task = Task(self.model, self.run.params, found, loss_fn, forward, criterion, clock.total_steps)
                take = self.run.begin if self.state == "attached" else self.run.go_on
                take(task, clock, self.optimizers)
            self.looked = frozenset(task.looked)
            if "cross entropy" in self.looked:
                say_looked(self.recipe, self.tweaks)
            self.state = "running"
        else:  # before it ever ran, what was loaded since is the result
            self.run.keep(self.mask if self.run.saved.was_written else Mask.from_zeros(self.run.params))
        self.weights.follow()

    def adopt(self, optimizer: Any) -> None:
        """Train with this optimizer; ghosts that it lacks join their convolutions' groups. `start` does the same."""
        if self.optimizers is not None:
            self.optimizers.let_be()
        self.optimizers = Optimizers(optimizer, self.run.params)
        checks.one_gradient(self.recipe.mask, self.optimizers)
        self.optimizers.join(self.tweaks.companions(), self.model)
        self.optimizers.exchange(self.run.exchange)

    def before_step(self, check_finite: bool = True) -> None:
        """With gradients final and unscaled: mask them, or move the mask in place of the step. Raises TostError on NaN
        or Inf, before any weight changes; `check_finite=False` is for loss scalers, which skip such a step themselves."""
        self._expect("before_step")
        if self.optimizers is not None:
            self.optimizers.come_back()
        if self.state == "running":
            self.run.look(f"step {self.clock.step}")
            self.smoothing.check()
        if check_finite and self.optimizers is not None:
            checks.gradients(self.model, self.optimizers, self.clock)
        self.weights.before_step(self.optimizers, check_finite)
        if self.state == "running":
            self.run.before_step(self.optimizers, check_finite)

    def after_step(self, step: int | None = None) -> None:
        """After the optimizer's step: set removed weights to exactly 0, count the step and advance the schedules.

        `step` is the number of finished optimizer steps as the trainer counts them; None counts one more.
        """
        self._expect("after_step")
        if self.optimizers is not None:
            self.optimizers.come_back()
        if self.state == "running":
            self.smoothing.check()  # with a closure there is no moment before the step
            self.run.step(step, self.optimizers)
        else:
            self.weights.zero()

    def conceal(self) -> None:
        """Take hidden weights out of the network again: part of `after_step`, to be called alone where a step was skipped."""
        if self.run.weights is not None:
            self.run.weights.conceal()

    def release(self) -> None:
        """Let gradients be: a loop is over. Part of `finish`; to be called where a finished session has trained on."""
        if self.run.weights is not None:
            self.run.weights.release()

    def finish(self) -> Report:
        """Take ghosts and buffers away: the model has its own modules, keys and forward pass again, and is sparse.

        Warns where ghosts or soft activations are still at work. Raises TostError, with the model unchanged, where the
        run has gone back to a checkpoint at which they were, the best one say: the plain network is another than that.
        """
        if self.end_loop():
            if self.state == "finished":  # it was trained on
                return self.report()
            check_stepped(self)
        self._expect("finish")
        ran, mask, moved = self.state == "running", None, {}
        sharding.reshard(
            self.model
        )  # after an evaluation FSDP2's layers hold gathered weights in the place of their own
        if ran:
            self.run.look("finish")
            mask, moved = self.run.end(self.optimizers)
        if self.optimizers is not None:
            self.optimizers.let_be()
            self.optimizers.leave(param for param, _ in self.tweaks.companions())
        self.tweaks.detach()
        self.run.compaction.detach()
        self._added.remove()
        self.run.norms.thaw()
        del self.model.tost_session
        self.release()
        self.state = "finished"
        self.run.keep(mask or Mask.from_zeros(self.run.params))  # what is there now is the result
        self.weights.moved = moved
        if ran:
            checks.diverged(self.weights)
        return self.report()

    def criterion(self, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
        """The training loss: `loss_fn`, any callable that returns a loss, as a module that smooths labels while the model trains;
        itself if the recipe smooths none. Raises TostError for one that smooths already, unless that is optional."""
        self._expect_own("criterion")
        return self.smoothing.criterion(loss_fn)

    def plain(self, average: nn.Module | Mapping[str, Tensor]) -> nn.Module:
        """Once finished: the plain sparse network with the weights and statistics of `average`, a copy of the attached model as
        AveragedModel or an EMA keeps, or its state dict; a mask that has moved is the last one. Raises TostError for one from
        before attach, and for one of another network, a part of this one say."""
        if self.state != "finished":
            raise TostError(f"plain: expected a finished session, got one that is {self.state}; call finish() first")
        return averages.plain(self.model, self.mask, average)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that a checkpoint belongs to this recipe, and take over what the model has loaded."""
        checks.same_recipe(tost_plugins.Recipe.from_dict(state["recipe"]).to_dict(), self.recipe.to_dict())
        if state["state"] == "finished" and self.state == "attached":
            self.finish()
        if self.state == "running":
            self.run.notice_loading()

    def __reduce__(self) -> tuple:
        return _copied, (type(self), self.model, self.recipe, self.given_mask)

    def _expect_own(self, call_name: str) -> None:
        if self.smoothing.session is not self:
            raise TostError(
                f"{call_name}: expected a session that was made for this model, got a copy of one, which follows nothing; "
                f"a copy of the model is trained with a session of its own: Session(copy, recipe)"
            )

    def _expect(self, call_name: str) -> None:
        self._expect_own(call_name)
        if self.state not in _MAY[call_name]:
            raise TostError(
                f"{call_name}: expected a session that is {' or '.join(_MAY[call_name])}, got one that is {self.state}; "
                f"the order is attach, start, before_step / after_step, finish"
            )


def _copied(kind: type[Session], model: nn.Module, recipe: Any, mask: Mask | None) -> Session:
    """What a copy or a pickle of a session is: none that leads anything."""
    session = kind(model, recipe, mask)
    session.smoothing = Smoothing()
    return session
