"""Where the masked weights stand in the network, looked at in every step: others in their place would train unmasked."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from tost_plugins.errors import TostError
from tost_plugins.training.log import say
from tost_plugins.training.params import (
    clean_name,
    is_layer,
    key_of,
    layer_of,
    owners,
    plain_modules,
    some,
    weight_keys,
)


class Places:
    """Where the masked weights stand in the network; made anew whenever a session takes up its weights.

    A head that is swapped or enlarged in mid-run would train without its mask, or break the run at its end.
    """

    def __init__(self, model: nn.Module, params: Mapping[str, nn.Parameter]) -> None:
        self.model, self.params = model, dict(params)
        self._look()
        ours = set(self.params.values())
        weights = (
            (clean_name(f"{path}.{key}"), module._parameters.get(key))
            for path, module in plain_modules(model)
            if is_layer(module)
            for key in weight_keys(module)
        )
        self._frozen = {
            layer_of(name): weight
            for name, weight in weights
            if weight is not None and not weight.requires_grad and weight not in ours
        }

    def _look(self) -> None:
        """Remember each weight's place in its layer, and each place of that layer and those around it in the network."""
        layers = owners(self.model, self.params)
        found = set(layers.values())
        above = {parent for parent in self.model.modules() if not found.isdisjoint(parent.modules())}
        self._places: list[tuple[dict, str, object]] = [
            (parent._modules, key, child)
            for parent in above
            for key, child in parent._modules.items()
            if child in above
        ]
        self._weights = [(layer._parameters, key_of(name), name) for name, layer in layers.items()]
        self._places += [(table, key, self.params[name]) for table, key, name in self._weights]

    def check(self, where: str) -> None:
        """Raise TostError, naming the layers, where others stand in the place of masked ones, or hide their weights. What only
        wraps layers, as torch.compile does, may come and go. A line names layers without a mask that begin to train. It costs
        one look into a dict for each place."""
        if freed := [name for name, param in self._frozen.items() if param.requires_grad]:
            say(
                f"{where}: layers train that did not at the start, and have no masks: {some(freed)}; free them before attach"
            )
            self._frozen = {name: param for name, param in self._frozen.items() if name not in freed}
        if all(table.get(key) is child for table, key, child in self._places):
            return
        there = set(self.model.parameters())
        lost = [layer_of(name) for name, param in self.params.items() if param not in there]
        if lost:
            raise TostError(
                f"{where}: expected the layers that were there at the start, got others in the place of {some(lost)}; "
                f"finish() the session before layers are replaced, then begin another one"
            )
        if hidden := [layer_of(name) for table, key, name in self._weights if table.get(key) is not self.params[name]]:
            raise TostError(
                f"{where}: expected weights as they were stored at the start, got others computed from them in {some(hidden)} "
                f"(torch.nn.utils.prune, a parametrization); leave that out, or finish() the session first"
            )
        self._look()
