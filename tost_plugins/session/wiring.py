"""What the mask of a run connects: looked at when it is taken and before it moves, never in between."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tost_plugins.errors import TostError
from tost_plugins.masks import connected
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.paths.connectivity import Connectivity, Paths
from tost_plugins.masks.scoring import wide
from tost_plugins.masks.topk import count_true, empty, top_k
from tost_plugins.training.log import say
from tost_plugins.training.task import Task

#: How much of a mask has to lie on a path where there is another one to try. AC/DC at 98 % in a ResNet-20, 3,756 steps,
#: validation: 17.4 % if all that connects is taken, 45.4 from a half on, 47.6 from here on, 50.6 if all go by layers (erk).
_NEARLY_ALL = 0.9


class Wiring:
    """The paths of a run's network, followed once, and what the mask at hand connects (`known`, None where that is not known,
    or not now).

    A mask that moves after every step is looked at whole only when a witness fails: a few of its largest weights that connect
    inputs and outputs by themselves. As long as they all stay, so does a path.
    """

    def __init__(self) -> None:
        self.paths: Paths | None = None
        self.known: Connectivity | None = None
        self._witness: dict[str, Tensor] | None = None  # name -> indices of weights in a row
        self._told: tuple[str, ...] = ()  # the empty layers that were last said
        self._refused = False  # whether the last move was
        self._thin = False  # whether it was said that little of a mask lies on a path
        self._possible: float | None = None  # the share of all weights that lies on a path

    def follow(self, task: Task) -> None:
        """Follow the network of a run that begins or goes on."""
        self.paths, self._possible = connected.followed(task), None

    def take(self, mask: Mapping[str, Tensor], where: str, loaded: bool = False) -> None:
        """The mask of a run that begins, or goes on with a `loaded` one; raises TostError where it connects nothing."""
        try:
            self.known = connected.check(mask, self.paths, loaded)
        except TostError as error:
            raise error.at(where) from None
        self._witness, self._told = None, () if self.known is None else self.known.empty

    def look(self, mask: Mapping[str, Tensor]) -> Connectivity | None:
        """What the mask at hand connects, looked at now where that is not known."""
        if self.known is None:
            self.known = connected.connects(mask, self.paths)
        return self.known

    def moved(self, mask: Mapping[str, Tensor]) -> None:
        """The mask at hand is this one now."""
        self.known = connected.connects(mask, self.paths)

    def allows(
        self,
        old: Mapping[str, Tensor],
        new: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        often: bool,
        last: bool = True,
    ) -> bool:
        """Whether the mask may become `new`: whether that connects the inputs with the outputs or, where that cannot be known,
        empties no layer; one line where it may not, and the `old` one stays. `often`: it moves at every step; not `last`: there
        is another one to try, so that nearly all of the new one has to lie on a path, and nothing is said."""
        self.known = None
        if self.paths is None:
            return self._may(not set(empty(new)) - set(empty(old)), last, "a layer without any weight")
        if often and self._holds(new):
            return True
        found = connected.connects(new, self.paths)
        if found is not None and not found.connected:
            return self._may(False, last, f"no path from the inputs to the outputs: the last one ends at {found.ends}")
        if found is not None and not often:
            share = self._share(found)
            if share < _NEARLY_ALL and not last:
                return False
            if share < 0.5:
                self._say_thin(found)
        if found is not None and often:
            self._witness = self._found(new, weights)
        self.known = None if often else found
        if found is not None and set(found.empty) - set(self._told):
            connected.tell_empty(list(found.empty))
            self._told = found.empty
        return self._may(True, last)

    def _say_thin(self, found: Connectivity) -> None:
        if not self._thin:
            say(
                f"mask: after a move {found.live_count:,} of {found.kept_count:,} kept weights lie on a path; a lower sparsity, "
                f"or an allocation that leaves each layer its share (erk), lets more of them do",
                logging.WARNING,
            )
        self._thin = True

    def _share(self, found: Connectivity) -> float:
        """What part of the kept weights is live; 1 is as large a part as without a mask, since those over padding never are."""
        assert self.paths is not None
        if self._possible is None:
            dense = self.paths.connectivity(Mask.dense(found.live))
            self._possible = dense.live_count / max(1, dense.kept_count)
        return found.live_count / max(1, found.kept_count) / (self._possible or 1.0)

    def _may(self, may: bool, last: bool, why: str = "") -> bool:
        if not may and not last:
            return False
        if not may and not self._refused:
            say(
                f"mask: a move is left out, and the mask before it stays, since the new one would leave {why}",
                logging.WARNING,
            )
        self._refused = not may
        return may

    def _holds(self, mask: Mapping[str, Tensor]) -> bool:
        if self._witness is None:
            return False
        parts = [mask[name].reshape(-1)[places].all() for name, places in self._witness.items()]
        return not parts or bool(torch.stack(parts).all())

    def _found(self, mask: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The largest weights of each layer, as small a share of them as still connects."""
        assert self.paths is not None
        sizes = {
            name: wide(weights[name].detach()).abs().masked_fill(~kept, -1).flatten() for name, kept in mask.items()
        }
        counts = {name: int(count_true(kept)) for name, kept in mask.items()}
        best, share = mask, 0.25
        while share * max(counts.values()) >= 0.25:
            tried = {
                name: top_k(size, math.ceil(share * counts[name])).view(mask[name].shape)
                for name, size in sizes.items()
            }
            found = self.paths.connectivity(tried)
            if not found.connected:
                break
            best, share = found.live, share / 4
        return {
            name: places.to(mask[name].device)
            for name, part in best.items()
            if len(places := part.flatten().nonzero().flatten())
        }
