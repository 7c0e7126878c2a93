"""Compact training: channels that no path of the mask runs through are not computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from tost_plugins.channels import slices
from tost_plugins.channels.plan import not_run, plan
from tost_plugins.channels.same import said
from tost_plugins.masks.base import MaskMethod, Moving
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.paths.connectivity import Connectivity
from tost_plugins.session.wiring import Wiring
from tost_plugins.training import sharding
from tost_plugins.training.log import say
from tost_plugins.training.params import device_of, some

#: Device type -> how many channels its units take at a time; 1 elsewhere.
TOGETHER = {"cuda": 8}


class Compaction:
    """The slices of one model, where its recipe asks for them: put in at attach, filled in when the mask is there.

    A run trains with the live part of its mask then: nothing that is left out can come back to life.
    """

    def __init__(self, model: nn.Module, asked: bool, method: MaskMethod, wiring: Wiring) -> None:
        self.model, self.asked, self.method, self.wiring = model, asked, method, wiring
        self._planned: Connectivity | None = None  # what was connected when it was last planned

    @contextlib.contextmanager
    def attaching(self, left_out: list[str]) -> Iterator[None]:
        """Around what gives modules another forward pass, which is to see what slices return; ghosts get slices too."""
        if self.asked and isinstance(self.method, Moving):
            self._give_up(left_out, f"a {self.method.kind} mask moves, and channels come back with it")
        if self.asked:
            slices.add(self.model)
        try:
            yield
        except BaseException:
            slices.remove(self.model)
            raise
        if self.asked:
            slices.add_to_ghosts(self.model)

    def check(self, params: Mapping[str, nn.Parameter], left_out: list[str]) -> None:
        """Before the mask is there: weights in parts cannot be sliced."""
        if self.asked and any(map(sharding.is_part, params.values())):
            self._give_up(left_out, "weights are kept in parts")

    def live(self, mask: Mask) -> Mask:
        """What of a mask the run trains with."""
        found = self.wiring.look(mask) if self.asked else None
        if found is None:
            return mask
        if found.live.kept < mask.kept:
            say(
                f"compact: {mask.kept - found.live.kept:,} of {mask.kept:,} kept weights lie on no path and are removed"
            )
            self.wiring.moved(found.live)
        return found.live

    def plan(self, mask: Mapping[str, Tensor], left_out: list[str]) -> None:
        """Leave out of the computation what this mask does not connect, and out of the mask, in place, what is not live."""
        if not self.asked:
            return
        found = self.wiring.look(mask)
        if self.wiring.paths is None or found is None:
            self._give_up(left_out, "what the mask connects is not known")
            return
        if unseen := not_run(self.model, self.wiring.paths.tape):
            self._give_up(
                left_out, f"the network in eval mode does not run {some(unseen, 3)}, whose channels nobody knows"
            )
            return
        if found is self._planned:
            return
        live = self.live(Mask(mask))
        for name, keep in mask.items():
            keep.copy_(live[name])
        made = plan(self.model, self.wiring.paths.tape, mask, TOGETHER.get(device_of(self.model).type, 1))
        slices.compute(self.model, {})
        whole = said(self.wiring.paths, mask)
        slices.compute(self.model, made.parts)
        if made.parts and whole is not None and said(self.wiring.paths, mask, whole) is None:
            self._give_up(left_out, "its outputs would be others: code counts channels, or draws numbers for each")
            return
        stay = "".join(f"; {count} channels without a path are computed for {why}" for why, count in made.whole.items())
        say(f"compact: {len(made.parts)} modules compute a part of their channels{stay}")
        self._planned = self.wiring.known

    def detach(self) -> None:
        """The model's own forward pass."""
        slices.remove(self.model)

    def _give_up(self, left_out: list[str], why: str) -> None:
        left_out.append(f"compact ({why})")
        self.asked = False
        slices.remove(self.model)
