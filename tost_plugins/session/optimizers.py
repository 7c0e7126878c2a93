"""The optimizers that train a network, each with what is wrapped around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from tost_plugins.errors import TostError
from tost_plugins.session.optimizer_state import numbers, start_values
from tost_plugins.session.steps import Steps, around, leaves, wrappers
from tost_plugins.training.finite import all_finite, not_finite
from tost_plugins.training.log import say
from tost_plugins.training.params import some
from tost_plugins.training.sharding import any_rank, local

_STEPS = ("step", "first_step", "second_step")  # of wrappers: the last two are those of SAM in its usual form
_SWAPS = ("train", "eval")
_MOMENTUM = ("momentum_buffer", "exp_avg")  # as torch calls it

Parameters = Mapping[str, nn.Parameter]


class Optimizers:
    """One optimizer or several for one network (Muon for matrices, AdamW for the rest), as they were given: `outer`, and
    `inner`, those that take the steps, without what is wrapped around them (Accelerate's, Lookahead, SAM).

    Raises TostError unless together they train all of `weights` that require grad.
    """

    def __init__(self, given: Any, weights: Parameters) -> None:
        self.outer: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
        found = [leaf for each in self.outer for leaf in leaves(each)]
        self.inner: list[Any] = list({id(leaf): leaf for leaf in found}.values())
        if other := [each for each in self.inner if isinstance(each, type) or not hasattr(each, "param_groups")]:
            got = f"the class {other[0].__name__}" if isinstance(other[0], type) else type(other[0]).__name__
            raise TostError(
                f"optimizer: expected one of torch's kind, or a list of several, got {got}; pass the one that steps"
            )
        self._starts: dict[tuple[int, int], dict[str, float]] = {}  # of their state, as far as they were looked for
        self._unknown: set[str] = set()  # those that cannot be told, already said
        self._sits_out = False  # whether the step at hand is not to be taken
        self._idle: list[Callable[[], None]] = []  # where nobody follows the steps: what makes them steps again
        self._followed = False
        self._exchanges: list[Callable[[], None]] = []  # what ends the care for them
        held = {id(param) for group in self.groups() for param in group["params"]}
        missing = [name for name, param in weights.items() if param.requires_grad and id(param) not in held]
        if missing:
            raise TostError(
                f"optimizer: expected one that trains every prunable weight of the model, got one without {some(missing)}; "
                f"make it from model.parameters() of this very model, give a list where several optimizers train it, or "
                f"`ignore` what none of them trains"
            )

    @property
    def climb(self) -> list[str]:
        """Which of them move the weights uphill between two gradients of a step, as SAM's `first_step` does: names of classes."""
        holders = [*self.inner, *(wrapper for outer in self.outer for wrapper in (outer, *wrappers(outer)))]
        return [type(each).__name__ for each in holders if callable(getattr(each, "first_step", None))]

    def groups(self) -> Iterator[dict[str, Any]]:
        """The parameter groups of them all, wrappers' own too: ZeroRedundancyOptimizer's inner one has one rank's parameters."""
        holders = [*self.inner, *(wrapper for outer in self.outer for wrapper in wrappers(outer))]
        found = {id(group): group for each in holders for group in getattr(each, "param_groups", ())}
        return iter(found.values())

    def rates(self) -> dict[int, float]:
        """The learning rate of each parameter's group as it is now, by the parameter's id: none where the group has no number.
        Optimizers that find it by themselves (Prodigy, D-Adaptation) multiply it by their `d`."""
        found: dict[int, float] = {}
        for group in self.groups():
            if group.get("lr") is not None:
                found.update(dict.fromkeys(map(id, group["params"]), float(group["lr"]) * float(group.get("d", 1.0))))
        return found

    @property
    def scaled(self) -> bool:
        """Whether a step is under way whose optimizer itself takes a loss scaler's factor out of the gradients: a fused one."""
        return any(getattr(each, "grad_scale", None) is not None for each in self.inner)

    @property
    def scale(self) -> float:
        """What the gradients at hand are multiplied by, where a fused optimizer divides by it in its step."""
        return float(
            next((each.grad_scale for each in self.inner if getattr(each, "grad_scale", None) is not None), 1.0)
        )

    @property
    def sits_out(self) -> bool:
        """Whether the step at hand is not taken: the mask moves in its place."""
        return self._sits_out

    def join(self, companions: Iterable[tuple[nn.Parameter, nn.Parameter]], model: nn.Module) -> None:
        """Put each added parameter into the group of the parameter beside it, where none of them has it, and its name where
        an optimizer was made from named parameters. Raises TostError where ranks have shared the parameters among them."""
        companions = list(companions)
        group_of = {id(param): group for each in self.inner for group in each.param_groups for param in group["params"]}
        shared = {id(param) for group in self.groups() for param in group["params"]}
        if not shared <= group_of.keys() and (late := [param for param, _ in companions if id(param) not in shared]):
            raise TostError(
                f"optimizer: expected one that is made after attach, since its ranks share the parameters among them, got one "
                f"without the {len(late)} that attach has added; attach first, then make it"
            )
        names = {id(param): name for name, param in model.named_parameters()}
        for param, beside in companions:
            if id(param) not in shared and id(beside) in group_of:
                group_of[id(beside)]["params"].append(param)
                if "param_names" in group_of[id(beside)]:
                    group_of[id(beside)]["param_names"].append(names[id(param)])

    def leave(self, params: Iterable[nn.Parameter]) -> None:
        """Take parameters out of their groups, and their state with them."""
        gone = {id(param) for param in params}
        for optimizer in self.inner:
            for group in optimizer.param_groups:
                stay = [id(param) not in gone for param in group["params"]]
                for param in compress(group["params"], [not here for here in stay]):
                    optimizer.state.pop(param, None)
                for key in {"params", "param_names"} & group.keys():
                    group[key] = list(compress(group[key], stay))

    def not_finite(self, model: nn.Module) -> list[str]:
        """The names of parameters whose gradients hold NaN or Inf; where ranks hold parts, a rank that has none itself
        names the others."""
        grads = [p.grad for group in self.groups() for p in group["params"] if p.grad is not None]
        if not grads or not any_rank(not all_finite(grads), grads[0]):
            return []
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return not_finite(named) or ["the parts of other ranks"]

    def sit_out(self) -> None:
        """Make the step that follows change nothing: it is not taken; one that a loss scaler takes in a way of its own finds
        no gradients, and optimizers pass over parameters without."""
        for group in self.groups():
            for param in group["params"]:
                param.grad = None
        if not self._sits_out and not self._followed:
            self._idle = [around(each, "step", lambda step, *args, **kwargs: None) for each in self.inner]
        self._sits_out = True

    def come_back(self) -> None:
        """The step that was to change nothing is over."""
        for remove in self._idle:
            remove()
        self._idle, self._sits_out = [], False

    def exchange(self, call: Callable[..., Any]) -> None:
        """Have `call(swap)` stand in for what puts other weights into the network: `train` and `eval` of schedule-free ones."""
        swap = [each for each in self.inner if all(callable(getattr(each, name, None)) for name in _SWAPS)]
        self._exchanges += [around(each, name, call) for each in swap for name in _SWAPS]

    def let_be(self) -> None:
        """The session is over, or has other optimizers."""
        for remove in self._exchanges:
            remove()
        self._exchanges = []
        self.come_back()

    # ---- state

    def remember(self, weight: nn.Parameter) -> bool:
        """Whether any of them keeps numbers of this weight."""
        return any(weight in optimizer.state for optimizer in self.inner)

    @torch.no_grad()
    def renew(self, weight: nn.Parameter, changed: Tensor, idle: Tensor) -> None:
        """Give the entries `changed` of a weight the state that a new weight has; `idle` are entries that stay
        removed; both as bools over the part of the weight that this rank holds.

        Where a start value cannot be found out (or changes with time, as VSGD's sums of nothing do), all idle entries hold
        the same number, and that is it; else what the optimizer remembers is left, which is said once.
        """
        for optimizer in self.inner:
            if isinstance(optimizer, torch.optim.LBFGS) and bool(changed.any()):
                optimizer.state.clear()  # differences of gradients of a network that is another now
            for key, value in numbers(weight, optimizer.state.get(weight)):
                starts = self._starts.setdefault((id(optimizer), weight.ndim), {})
                if not starts:
                    starts.update(start_values(optimizer, weight))
                seen = local(value)[idle]
                if key in starts or (seen.numel() and bool((seen == seen[0]).all())):
                    local(value).masked_fill_(changed, starts[key] if key in starts else seen[0].item())
                elif key not in self._unknown:
                    self._unknown.add(key)
                    say(
                        f"{type(optimizer).__name__}: what {key!r} holds for a single weight cannot be told and is left "
                        f"as it is; weights that come back start with what it remembers"
                    )

    def lose_momentum(self) -> None:
        """Set what is called momentum to 0, of all parameters."""
        for optimizer in self.inner:
            for param, state in optimizer.state.items():
                for key, value in numbers(param, state):
                    if key in _MOMENTUM:
                        local(value).zero_()

    # ---- steps

    def follow(
        self, before: Callable[[bool], None], after: Callable[[], None], skipped: Callable[[], None]
    ) -> Callable[[], None]:
        """Make every step one of the session's; returns what takes the hooks away.

        `before(check_finite)` comes with the gradients of a step, after its closure if there is one (each time that the
        optimizer calls it); `after()` when the outermost call that a step was part of is over: wrappers write weights after
        the inner step. Several optimizers make one step together. `skipped()` comes after a step that a fused optimizer has
        skipped by itself; those that gradient accumulation or a loss scaler leaves out need no care.
        """
        steps = Steps(self.inner, before, after, skipped, lambda: self._sits_out)
        self._followed = True
        removers = [remove for leaf in self.inner for remove in steps.watch(leaf)]
        removers += [
            around(wrapper, name, steps.within)
            for wrapper in dict.fromkeys(each for outer in self.outer for each in wrappers(outer))
            for name in _STEPS
            if callable(getattr(wrapper, name, None))
        ]

        def remove() -> None:
            self._followed = False
            for each in removers:
                each()

        return remove
