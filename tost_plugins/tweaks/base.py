"""What a tweak is: a change of the training that ends, and leaves the network as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor, nn

from tost_plugins.training.clock import Clock
from tost_plugins.training.numbers import NUMBER
from tost_plugins.training.task import Task

#: How every tweak is declared: `@pydantic.dataclasses.dataclass(frozen=True, config=STRICT, kw_only=True)`.
STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Step:
    """What a tweak may act on around an optimizer's step. By name: the masked weights; each mask as numbers of the weight's own
    dtype and place (1 kept, 0 removed); the final gradients, of those weights that have one: before the step those themselves,
    and only those that tweaks have not seen yet, after it as they were then, unscaled, on each rank its part. Then the learning
    rate of a weight's group in this step, 0 without one, the steps finished before it, and a place for what is made of the
    masks, which is empty again when one moves."""

    weights: Mapping[str, nn.Parameter]
    kept: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    rate: Callable[[nn.Parameter], float]
    clock: Clock
    made: dict[str, Any]


@pydantic_dataclass(frozen=True, config=STRICT, kw_only=True)
class Tweak:
    """Settings, and functions of the model. Each step does nothing unless a tweak says otherwise.

    Whatever a tweak changes lives in the model, so that a copy or a checkpoint of it is complete, and any instance
    with the same settings can go on with it. `kind` is its name in recipes and in the registry.

    Fields: `optional`, whether "nothing to act on" is a log line in place of an error; `least_steps`, in a run of fewer
    optimizer steps it rests, which a log line says: 0 is never; where the length of a run is not known it acts.
    """

    changes_weights = (
        False  # whether `after_step` writes into the network: optimizers with weights of their own lose that
    )

    kind: Any
    optional: bool = False
    least_steps: Annotated[int, Field(ge=0), NUMBER] = 0

    def attach(self, model: nn.Module, seed: int, ignore: Sequence[str] = ()) -> None:
        """Change the structure, but not yet the forward pass; raises Inapplicable, with the model unchanged, if there is
        nothing to act on. Layers that `ignore` names (globs, as the mask's) or that do not train are left alone, and said.
        On a copy of an attached model, which brings its parts along, nothing happens."""

    def check(self, model: nn.Module) -> None:
        """Raise TostError if other code has replaced modules since `attach`, so that the tweak lost its hold."""

    def look(self, task: Task) -> None:
        """Once, before the mask is looked for, which may take long: raise what `start` would raise on these batches and this
        loss. The model is quiet, and stays as it is."""

    def start(self, task: Task, mask: Mapping[str, Tensor]) -> None:
        """Once, when the mask is found and applied, before the first step; the model is quiet then."""

    def advance(self, model: nn.Module, clock: Clock) -> None:
        """Set the strength for the step that comes next. Before the first call, and after weights of a plain network were
        loaded, the forward pass is the plain network's."""

    def before_step(self, model: nn.Module, step: Step) -> None:
        """Once in every step, with gradients final, masked and, but for fused optimizers that do it themselves, unscaled: the
        last word before the optimizer's. A closure may compute several, each of which comes by. Not called where the mask moves
        in place of the step, or a loss scaler skips it. Where removed weights train out of sight (dnw) they are in the network,
        and their gradients with them."""

    def after_step(self, model: nn.Module, step: Step) -> None:
        """When the optimizer has stepped: before removed weights become 0 and the step is counted. Not called where
        `before_step` was not. Who changes weights here is only met by optimizers that leave them so."""

    def detach(self, model: nn.Module) -> None:
        """Give the model back its own modules, state-dict keys and forward pass."""

    @contextlib.contextmanager
    def quiet(self, model: nn.Module) -> Iterator[None]:
        """Within: the forward pass of the untouched network, for scores and for reports."""
        yield

    def companions(self, model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Pairs (added parameter, parameter beside it), so that the first joins the second's optimizer group."""
        return []

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """What to log, by full name."""
        return {}
