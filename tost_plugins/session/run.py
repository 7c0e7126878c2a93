"""A run from its start to its end: its clock, its masked weights, and whoever watches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tost_plugins.errors import TostError
from tost_plugins.masks.base import Alternating, Averaging, Moving, Scored
from tost_plugins.masks.card import told
from tost_plugins.masks.mask import Mask
from tost_plugins.session import buffers, checks, kinds
from tost_plugins.session.active_tweaks import ActiveTweaks
from tost_plugins.session.around import AroundSteps
from tost_plugins.session.compaction import Compaction
from tost_plugins.session.masked_weights import MaskedWeights
from tost_plugins.session.moving import MovingWeights
from tost_plugins.session.norms_alone import NormsAlone
from tost_plugins.session.optimizers import Optimizers
from tost_plugins.session.places import Places
from tost_plugins.session.saved_clock import SavedClock
from tost_plugins.session.scored import ScoredWeights
from tost_plugins.session.start import begin, impose, say_begun, say_resumed
from tost_plugins.session.whole_tensors import say_what_counts
from tost_plugins.session.wiring import Wiring
from tost_plugins.training import sharding
from tost_plugins.training.clock import LENGTHS, Clock
from tost_plugins.training.log import say
from tost_plugins.training.params import prunable
from tost_plugins.training.task import Task
from tost_plugins.tweaks import Tweak


class Run:
    """What a session leads: a model's weights under a mask, step after step, from a recipe or from a loaded checkpoint."""

    def __init__(self, model: nn.Module, recipe: Any, given_mask: Mask | None, tweaks: ActiveTweaks) -> None:
        self.model, self.recipe, self.given_mask, self.tweaks = model, recipe, given_mask, tweaks
        self.clock, self.saved = Clock(), SavedClock(model)
        self._asked = Clock()  # the lengths that the loop at hand has given
        self.norms = NormsAlone(model, recipe.train)
        self.weights: MaskedWeights | None = None
        self.wiring = Wiring()
        self.compaction = Compaction(model, recipe.compact, recipe.mask, self.wiring)
        self.layers: tuple[str, ...] | None = None  # what has masks, from attach on
        self._places: Places | None = None
        self._around = AroundSteps(tweaks)
        self._most = 0  # backward passes of a step
        self._version = 0  # of the weights, behind the last step
        self._watcher: Any = None  # what the recipe's `watch` makes

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The weights that the recipe's mask is for."""
        sharding.reshard(self.model)
        return prunable(self.model, self.recipe.mask.ignore, self.layers)

    def begin(self, task: Task, clock: Clock, optimizers: Optimizers | None) -> None:
        """Find the mask and begin, or go on from the checkpoint that was loaded."""
        resumes, self._asked = self.saved.step >= 0, clock
        self.norms.check(optimizers)
        self._set(self.saved.load(clock) if resumes else clock)
        self._watcher = None if self.recipe.watch is None else self.recipe.watch.begin(task, self.clock)
        self.compaction.check(self.params, self.tweaks.left_out)
        self.tweaks.meet(optimizers, self.params)
        if resumes:
            self._say_resumed(clock)
            fresh = impose(self.model, self.recipe.mask, self.given_mask, self.params)
            with sharding.unsharded(self.model), self.tweaks.quiet():
                self.wiring.follow(replace(task, params=self.params))
            self._take_saved()
        else:
            fresh = True
            with sharding.unsharded(self.model):
                whole = replace(task, params=self.params)
                begin(whole, self.recipe, self.given_mask, self.tweaks, clock, self.wiring, self.compaction)
        weights = self.take_mask(optimizers, fresh)
        if not resumes:
            say_begun(self.recipe, self.given_mask, weights, self.tweaks, self.wiring.known)
            checks.still(self.recipe.mask, self.clock)
        if optimizers is not None and (not weights.wants_dense() or getattr(self.recipe.mask, "freeze", None)):
            kept = {weight: sharding.local(weights.reached(name)) for name, weight in weights.weights.items()}
            grows = isinstance(self.recipe.mask, (Averaging, Alternating)) or getattr(
                self.recipe.mask, "takes_step", False
            )
            say_what_counts(optimizers, kept, grows)
        self._look()

    def go_on(self, task: Task, clock: Clock, optimizers: Optimizers | None) -> None:
        """Another loop takes up a run that has begun: one after an error, say, with other lengths. Tweaks at work stay so."""
        self.notice_loading()
        late = self._take_lengths(clock)
        if late:
            self.tweaks.meet(optimizers, self.params)
        if late and not self.clock.step:
            with sharding.unsharded(self.model), self.tweaks.quiet():
                self.tweaks.catch_up(late, replace(task, params=self.params), self._saved_mask())
        self._asked = clock
        self.take_mask()

    def _take_lengths(self, clock: Clock) -> list[Tweak]:
        """Those given now, where they are others than before, and no checkpoint's stand above them; the tweaks that no
        longer rest."""
        given = {key: value for key in LENGTHS if (value := getattr(clock, key)) is not None}
        new = {key: value for key, value in given.items() if value != getattr(self._asked, key)}
        if not new:
            return []
        if self.saved.has_lengths:
            self._say_resumed(clock)
            return []
        longer = replace(self.clock, **new)
        checks.times((self.recipe.mask, *self.tweaks), longer)
        self.clock = longer
        self.saved.write(self.clock, lengths=True)
        return self.tweaks.wake(longer)

    def look(self, where: str) -> None:
        """Before a step, and at the end: what was loaded, and whether the layers are still those that have masks."""
        self.notice_loading()
        if self._places is not None:
            self._places.check(where)

    def notice_loading(self) -> None:
        """A clock buffer that somebody else wrote means that a checkpoint was loaded: go on from there."""
        if self.saved.was_loaded and self.saved.step < 0:
            self._take_weights_alone()
        elif self.saved.was_loaded:
            if self.saved.step or self.clock.step:  # before the first step a trainer may have written its own time
                self._say_resumed(self.clock)
            self._set(self.saved.load(self.clock))
            impose(self.model, self.recipe.mask, self.given_mask, self.params)
            self._take_saved()
            self.take_mask()

    def _take_weights_alone(self) -> None:
        """A state dict from before the start has no mask yet: the run goes on with its own."""
        if isinstance(self.recipe.mask, Moving):
            raise TostError(
                f"checkpoint: expected one from after the start, got one from before it, when mask {self.recipe.mask.kind} was "
                f"not there yet; load the plain network's weights alone"
            )
        assert self.weights is not None
        for name, buffer in buffers.beside(self.model, self.params).items():
            buffer.copy_(self.weights.mask[name])
        self.saved.write(self.clock, lengths=True)
        text = f"weights from before the start were loaded; mask and step {self.clock.step} stay"
        say(f"recipe {self.recipe.name}: {text}", logging.WARNING)
        self.take_mask()

    def before_step(self, optimizers: Optimizers | None, check_finite: bool = True) -> None:
        """With gradients final and masked: what tweaks make of them, unless the step at hand is not to be taken."""
        assert self.weights is not None
        self._around.before(self.model, self.weights, self.clock, optimizers, check_finite)
        if optimizers is not None and not self.saved.stepped:
            self.tweaks.touch(optimizers)

    def step(self, step: int | None, optimizers: Optimizers | None) -> None:
        """When an optimizer step is done: removed weights are 0, the mask moves, schedules advance."""
        assert self.weights is not None
        self.weights.stepped(optimizers)
        self._around.after(self.weights, self.clock)
        self.clock = self.clock.at(self.clock.step + 1 if step is None else step)
        self.weights.after_step(self.clock, optimizers)
        self._most, self.weights.passes = max(self._most, self.weights.passes), 0
        self.weights.came.clear()
        self._version = self.weights.version
        self.saved.stepped, self.saved.gone_back = True, False
        self._tick()
        self._look()

    @property
    def goes_on_elsewhere(self) -> bool:
        """Whether weights were trained since the last step by somebody else: more passes than any step had, and written into."""
        assert self.weights is not None
        return self.weights.passes > self._most and self.weights.version != self._version

    def exchange(self, swap: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """While an optimizer puts other weights into the network."""
        return swap(*args, **kwargs) if self.weights is None else self.weights.exchange(swap, *args, **kwargs)

    def end(self, optimizers: Optimizers | None) -> tuple[Mask, dict[str, float]]:
        """The last look: the mask, and what it had to say of its moves; its buffers may go now."""
        checks.over(self.recipe.mask, self.tweaks.at_work(), self.clock, self.saved.gone_back)
        assert self.weights is not None
        checks.fewer(self.recipe.mask, self.weights, self.clock)
        mask = self.weights.mask
        self.wiring.look(mask)
        if isinstance(self.weights, MovingWeights) and self.weights.hides:  # what trained out of sight is gone
            self.weights.forget(optimizers)
        if self._watcher is not None:
            self._watcher.finish(mask, self.clock)
        sharding.reshard(self.model)
        return mask, self.weights.metrics()

    def take_mask(self, optimizers: Optimizers | None = None, fresh: bool = False) -> MaskedWeights:
        """Take the mask from the model's buffers, and bring all else in line with it."""
        params, method = self.params, self.recipe.mask
        with self.tweaks.quiet():
            self.compaction.plan(buffers.beside(self.model, params), self.tweaks.left_out)
        if isinstance(method, Scored):
            weights = self._keep(ScoredWeights(self.model, params, method, self.recipe.seed, self.wiring))
        elif isinstance(method, Moving):
            weights = self._keep(MovingWeights(self.model, params, method, self.recipe.seed, self.wiring))
        else:
            weights = self._keep(MaskedWeights(params, buffers.beside(self.model, params)))
        weights.begin(self.clock, optimizers, fresh)
        self._tick()
        return weights

    def keep(self, mask: Mapping[str, Tensor]) -> None:
        """Keep the weights of a finished network in line with its mask."""
        self._keep(MaskedWeights(self.params, mask)).zero()

    def _keep(self, weights: MaskedWeights) -> MaskedWeights:
        """Take over: loading may have put other parameters in place of those before."""
        before, self.weights = self.weights, weights
        given, recipe = self.given_mask, self.recipe
        weights.about = told(recipe.mask, recipe.seed) if given is None else given.about
        self._places = Places(self.model, weights.weights)
        if before is not None and before.release():
            weights.follow()
        self.tweaks.count()
        return weights

    def _take_saved(self) -> None:
        """See that the mask of a checkpoint connects, or the given one that replaces it."""
        given = self.given_mask is not None and not isinstance(self.recipe.mask, Moving)
        self.wiring.take(self._saved_mask(), "the given mask" if given else "the checkpoint's mask", loaded=True)

    def _say_resumed(self, asked: Clock) -> None:
        kind = kinds.read(getattr(self.model, kinds.KIND))
        kinds.check_moving(self.recipe.mask, kind)
        say_resumed(self.recipe, self.given_mask, buffers.read_clock(self.model), asked, self._saved_mask(), kind)

    def _saved_mask(self) -> Mask:
        return Mask(buffers.beside(self.model, self.params))

    def _set(self, clock: Clock) -> None:
        self.clock = clock
        self.tweaks.rest(clock)
        checks.times((self.recipe.mask, *self.tweaks), clock)

    def _tick(self) -> None:
        self.tweaks.advance(self.clock)
        self.saved.write(self.clock)

    def _look(self) -> None:
        if self._watcher is not None and self._watcher.due(self.clock):
            assert self.weights is not None
            self._watcher.look(self.weights.mask, self.clock)
