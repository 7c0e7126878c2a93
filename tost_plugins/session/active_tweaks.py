"""The tweaks of one session: those that have something to act on, and what was left out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tost_plugins.errors import Inapplicable, TostError
from tost_plugins.masks.base import Scored
from tost_plugins.session.lasting import why_not
from tost_plugins.session.optimizers import Optimizers
from tost_plugins.training.clock import Clock
from tost_plugins.training.task import Task
from tost_plugins.tweaks import Tweak
from tost_plugins.tweaks.base import Step

_RESTS = "are fewer than its least_steps"


class ActiveTweaks:
    """A recipe's tweaks on a model. One that is `optional` and finds nothing to act on is left out; others raise."""

    def __init__(self, model: nn.Module, tweaks: Sequence[Tweak]) -> None:
        self.model, self.active = model, list(tweaks)
        self.resting: list[Tweak] = []  # what they have put into the model is silent
        self.left_out: list[str] = []
        self._order = list(tweaks)
        self.sizes = (0, 0)  # parameters of the model, and those of ghosts among them

    def __iter__(self) -> Iterator[Tweak]:
        return iter(self.active)

    def attach(self, recipe: Any) -> None:
        """Change the model's structure; after an error it is what it was."""
        wanted, done = self.active, []
        try:
            for tweak in list(wanted):
                try:
                    _check_that_weights_train(tweak, recipe)
                    tweak.attach(self.model, recipe.seed, recipe.mask.ignore)
                    done.append(tweak)
                except Inapplicable as reason:
                    self._leave_out(tweak, reason)
        except TostError:
            for tweak in reversed(done):
                tweak.detach(self.model)
            self.active = wanted
            raise

    def rest(self, clock: Clock) -> None:
        """Let those rest for which the run is too short; a run that turns out to be longer has them back."""
        self.wake(clock)
        steps = clock.total_steps
        for tweak in list(self.active):
            if steps is not None and steps < tweak.least_steps:
                self.leave_out(tweak, f"{steps:,} steps {_RESTS}, {tweak.least_steps:,}")
                self.resting.append(tweak)

    def wake(self, clock: Clock) -> list[Tweak]:
        """Have those back for which the run is long enough, and return them."""
        steps = clock.total_steps
        woken = [tweak for tweak in self.resting if steps is None or steps >= tweak.least_steps]
        for tweak in woken:
            self.resting.remove(tweak)
            self.left_out[:] = [
                why for why in self.left_out if not why.startswith(f"{tweak.kind} (") or _RESTS not in why
            ]
            self.active = [each for each in self._order if each is tweak or any(each is other for other in self.active)]
        return woken

    def catch_up(self, tweaks: Sequence[Tweak], task: Task, mask: Mapping[str, Tensor]) -> None:
        """Before the first step: begin with these, which rested when the others began; after an error they rest again."""
        try:
            for begin in (lambda tweak: tweak.look(task), lambda tweak: tweak.start(task, mask)):
                self._each(begin, [tweak for tweak in self.active if any(tweak is each for each in tweaks)])
        except BaseException:
            self.active = [tweak for tweak in self.active if not any(tweak is each for each in tweaks)]
            self.resting += tweaks
            raise

    def touch(self, optimizers: Optimizers) -> None:
        """In a first step, have optimizers make their numbers for what rests too: who loads a checkpoint may ask for those of all
        that a freshly attached model has."""
        for param, _ in _companions(self.model, self.resting):
            if param.requires_grad and param.grad is None and not optimizers.remember(param):
                param.grad = torch.zeros_like(param)

    def look(self, task: Task) -> None:
        """Once, before the mask is looked for."""
        self._each(lambda tweak: tweak.look(task))

    def start(self, task: Task, mask: Mapping[str, Tensor]) -> None:
        """Once, when the mask is found and applied."""
        self._each(lambda tweak: tweak.start(task, mask))

    def leave_out(self, tweak: Tweak, why: str) -> None:
        """Go on without a tweak."""
        self.left_out.append(f"{tweak.kind} ({why})")
        self.active = [other for other in self.active if other is not tweak]

    def meet(self, optimizers: Optimizers | None, weights: Mapping[str, nn.Parameter]) -> None:
        """Before the run: who changes weights after a step is left out, or raises, where the optimizer does not let them be."""
        after = [tweak for tweak in self.active if tweak.changes_weights]
        why = why_not(optimizers, weights) if after and optimizers is not None else None
        for tweak in after if why else ():
            self._leave_out(tweak, Inapplicable(f"{tweak.kind}: expected an optimizer that goes on from the weights as they "
                                                f"are, got {why}; use another one, or leave {tweak.kind} out"))  # fmt: skip
            tweak.detach(self.model)

    @property
    def looking(self) -> list[str]:
        """The kinds of those that look at the task before the mask is there."""
        return [tweak.kind for tweak in self.active if _acts(tweak, "look")]

    @property
    def around_steps(self) -> bool:
        """Whether one of them acts on gradients or after the step."""
        return self.after_steps or any(_acts(tweak, "before_step") for tweak in self.active)

    @property
    def after_steps(self) -> bool:
        """Whether one of them acts after the step."""
        return any(_acts(tweak, "after_step") for tweak in self.active)

    def before_step(self, step: Step) -> None:
        """With final gradients, before the optimizer's step."""
        for tweak in self.active:
            tweak.before_step(self.model, step)

    def after_step(self, step: Step) -> None:
        """When the optimizer has stepped."""
        for tweak in self.active:
            tweak.after_step(self.model, step)

    def advance(self, clock: Clock) -> None:
        """Set the strengths for the step that comes next."""
        for tweak in self.active:
            tweak.advance(self.model, clock)

    def detach(self) -> None:
        """Give the model its own forward pass back."""
        for tweak in reversed([*self.active, *self.resting]):
            tweak.detach(self.model)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Within: the forward pass of the untouched network."""
        with contextlib.ExitStack() as quiet:
            for tweak in self.active:
                quiet.enter_context(tweak.quiet(self.model))
            yield

    def companions(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Pairs (added parameter, the parameter beside it)."""
        return _companions(self.model, [*self.active, *self.resting])

    def count(self) -> None:
        """Count the parameters: once, since trainers log them in every step."""
        ghosts, silent = (
            sum(param.numel() for param, _ in _companions(self.model, tweaks)) for tweaks in (self.active, self.resting)
        )
        self.sizes = sum(param.numel() for param in self.model.parameters()) - silent, ghosts

    def metrics(self) -> dict[str, float]:
        """What to log, by full name."""
        return {key: value for tweak in self.active for key, value in tweak.metrics(self.model).items()}

    def at_work(self) -> dict[str, float]:
        """What makes the network another than the finished one: names and strengths as in `metrics`."""
        return {key: value for key, value in self.metrics().items() if key.endswith(("alpha", "active")) and value}

    def _each(self, call: Callable[[Tweak], None], tweaks: Sequence[Tweak] | None = None) -> None:
        for tweak in list(self.active if tweaks is None else tweaks):
            try:
                call(tweak)
            except Inapplicable as reason:
                self._leave_out(tweak, reason)
                tweak.detach(self.model)

    def _leave_out(self, tweak: Tweak, reason: Inapplicable) -> None:
        if not tweak.optional:
            raise reason
        self.leave_out(tweak, str(reason).split(": ", 1)[-1].split(";")[0])


def _companions(model: nn.Module, tweaks: Sequence[Tweak]) -> list[tuple[nn.Parameter, nn.Parameter]]:
    return [pair for tweak in tweaks for pair in tweak.companions(model)]


def _check_that_weights_train(tweak: Tweak, recipe: Any) -> None:
    """Raise Inapplicable for what acts on the steps of masked weights where these take none."""
    scored = isinstance(recipe.mask, Scored)
    if (scored or recipe.train == "norms") and (_acts(tweak, "before_step") or _acts(tweak, "after_step")):
        why = f"mask {recipe.mask.kind}, under which they never do" if scored else "train: norms"
        raise Inapplicable(
            f"{tweak.kind}: expected masked weights that train, got {why}; leave {tweak.kind} out, or mark it `optional: true`"
        )


def _acts(tweak: Tweak, moment: str) -> bool:
    return getattr(type(tweak), moment) is not getattr(Tweak, moment)
