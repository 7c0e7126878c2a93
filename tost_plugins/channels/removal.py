"""A network without the channels that its mask leaves unused: an ordinary, smaller one that computes the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tost_plugins.channels import sizes
from tost_plugins.channels.plan import NORMS, Part, Planner
from tost_plugins.channels.same import Constants, Outputs, by_path, duplicate
from tost_plugins.errors import TostError
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.paths.connectivity import Paths, refusal
from tost_plugins.masks.paths.follow import Tape
from tost_plugins.masks.paths.reach import Reach
from tost_plugins.training.log import say
from tost_plugins.training.params import device_of, some, unwrap
from tost_plugins.training.task import Task
from tost_plugins.tweaks.surgery.swap import original_class


class Cut(NamedTuple):
    """What becomes of a network: path -> the part that stays of a module, path -> what its bias gets from channels that go,
    and what keeps channels without a path, and how many."""

    parts: dict[str, Part]
    biases: dict[str, Tensor]
    stays: dict[str, int]


def compact(model: nn.Module, mask: Mapping[str, Tensor], example: Any) -> nn.Module:
    """An ordinary network of its own, in eval mode, without the channels that no path of kept weights runs through: smaller
    layers and norms, and the same outputs as `model` in eval mode with this mask. `example` is a batch that it runs on, with
    images of the size that the network is for: at another size other weights of a kernel may lie over the padding alone.

    A channel that nothing reaches is constant, and a layer that reads it takes the constant into its bias, unless zeros are
    padded around it: then the channel stays, as do all channels of what cannot be made smaller. The outputs are compared in
    float64, on the example and on random numbers in its shape, and the largest difference is logged; a layer that would change
    them stays whole and is named. Raises TostError for a mask that connects nothing.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> mask = Mask({"0.weight": torch.tensor([[1, 0], [1, 1], [0, 0]]), "2.weight": torch.tensor([[1, 0, 1]])})
        >>> compact(net, mask, torch.ones(1, 2))
        Sequential(
          (0): Linear(in_features=2, out_features=1, bias=True)
          (1): ReLU()
          (2): Linear(in_features=1, out_features=1, bias=True)
        )
    """
    model = unwrap(model)
    at_work = [path for path, module in model.named_modules() if original_class(module) is not type(module)]
    if at_work:
        raise TostError(
            f"compact: expected a plain network, got one with a session at work ({some(at_work, 3)}); call session.finish()"
        )
    known = Task.of(model).params
    fitted = Mask(mask).fit({name: known[name] for name in mask if name in known})
    plain = duplicate(model).eval()
    params = {name: Task.of(plain).params[name] for name in fitted}
    fitted.apply_(params)
    try:
        small, difference, cut, whole = _smaller(_Cuts(Task(plain, params, [example]), fitted, example))
    except TostError as error:
        raise error.at("compact") from None
    before, after = (sum(param.numel() for param in net.parameters()) for net in (model, small))
    more = f"; whole, since it would change outputs: {some(whole)}" if whole else ""
    if cut.stays:
        more += f"; {sum(cut.stays.values()):,} channels without a path stay for {some(cut.stays, 3)}"
    say(f"compact: {before:,} parameters, now {after:,}; largest difference of an output {difference:.1e}{more}")
    return small


def _smaller(cuts: _Cuts) -> tuple[nn.Module, float, Cut, list[str]]:
    """The network, the largest difference of its outputs, what was cut, and what stays whole since it would change them."""
    cut = cuts.cut(())
    small, difference = cuts.tried(cut)
    if difference is not None:
        return small, difference, cut, []
    whole = list(cut.parts)
    for path in cut.parts:  # one after another, those that change nothing
        if cuts.tried(cuts.cut([name for name in whole if name != path]))[1] is not None:
            whole.remove(path)
    cut = cuts.cut(whole)
    small, difference = cuts.tried(cut)
    if difference is None:
        raise TostError(
            "expected the same numbers in every forward pass in eval mode, got others; take chance out of it"
        )
    return small, difference, cut, whole


class _Cuts:
    """What can be cut out of one network under its mask."""

    def __init__(self, task: Task, mask: Mask, example: Any) -> None:
        paths = Paths(task)
        found = paths.connectivity(mask)
        if not found.connected:
            raise refusal(found)
        self.plain, self.tape, self.live = task.model, paths.tape, found.live
        self.read = _read(self.tape, mask, device_of(task.model))
        self.outputs = Outputs(self.plain, example)
        self.modules = by_path(self.outputs.exact)
        self.constants = self.outputs.constants()

    def tried(self, cut: Cut) -> tuple[nn.Module, float | None]:
        """The network with these parts only, and the largest difference of its outputs; None where that is too much."""
        small, exact = (built(net, cut) for net in (self.plain, self.outputs.exact))
        return small, self.outputs.difference(exact, small)

    def cut(self, whole: Iterable[str]) -> Cut:
        """The parts that stay, all of the modules in `whole`, and what biases get from constant channels that go."""
        planner = Planner(self.plain, self.tape, self.live)
        for path in whole:
            for channels in (channels for called in planner.called[path] for channels in called):
                if channels is not None:
                    planner.atoms.pin(channels.ids)
        stays = dict(planner.whole)
        while True:
            parts, biases, more = planner.plan().parts, {}, False
            for path, part in parts.items():
                held, bias = self._constant(path, part)
                if len(held):
                    inside = planner.called[path][0][0]
                    assert inside is not None
                    planner.atoms.pin(inside.ids[held])
                    reason = f"{path}, which pads zeros around constants"
                    stays[reason] = stays.get(reason, 0) + len(held)
                    more = True
                elif bias is not None:
                    biases[path] = bias
            if not more:
                return Cut(parts, biases, stays)

    def _constant(self, path: str, part: Part) -> tuple[np.ndarray, Tensor | None]:
        """Of a layer's inputs that would go: those that cannot go into its bias, and what goes there."""
        nothing, module = np.zeros(0, dtype=int), self.modules[path]
        weight = getattr(module, "weight", None)
        if part.inputs is None or isinstance(module, NORMS) or getattr(module, "groups", 1) > 1 or weight is None:
            return nothing, None
        gone = np.setdiff1d(np.arange(weight.shape[1]), part.inputs)
        if not len(gone):
            return nothing, None
        # channel, filter, place in the kernel
        weight = weight.detach()[:, gone].transpose(0, 1).reshape(len(gone), len(weight), -1)
        if path in self.read:
            weight = weight * self.read[path][None, :, None]
        reads = weight.flatten(1).any(1).numpy(force=True)
        if not reads.any():
            return nothing, None
        if path not in self.constants:
            return gone[reads], None
        constants: Constants = self.constants[path]
        values = constants.values[gone]
        held = reads & ~constants.same[gone]
        if _pads_zeros(module):
            held |= reads & (values != 0).numpy(force=True)
        added = weight.sum(2) * values[:, None]
        return gone[held], added[torch.from_numpy(reads & ~held).to(added.device)].sum(0)


def _read(tape: Tape, mask: Mask, device: torch.device) -> dict[str, Tensor]:
    """Path of a layer -> which of its channels lead to the outputs."""
    calls = [
        (name, call.outs[0])
        for name in mask
        for call in tape.calls
        if call.kind == "layer" and tape.weights[name] in call.ins
    ]
    _, ways = Reach(tape, {name: keep.to(device) for name, keep in mask.items()}).back([value for _, value in calls])
    found: dict[str, Tensor] = {}
    for (name, _), way in zip(calls, ways, strict=True):
        dim = -1 if mask[name].ndim == 2 else 1 - int(way.ndim < mask[name].ndim)
        leads = way.movedim(dim, 0).unsqueeze(-1).flatten(1).any(1)
        path = name.removesuffix("weight").removesuffix(".")
        found[path] = found[path] | leads if path in found else leads
    return found


@torch.no_grad()
def built(plain: nn.Module, cut: Cut) -> nn.Module:
    """A copy of a network with these parts of its modules only."""
    small, biases = duplicate(plain), cut.biases
    modules = by_path(small)
    for path, part in cut.parts.items():
        module: Any = modules[path]
        tensors = {**module._parameters, **module._buffers}
        old = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
        wanted, across = sizes.sizes(module), getattr(module, "groups", 1) == 1
        for key in wanted:
            places = part.inputs if key.startswith("in_") else part.outputs
            wanted[key] = part.groups if key == "groups" else wanted[key] if places is None else len(places)
        sizes.resize(module, wanted, path in biases)
        if path in biases:
            bias = old.get("bias", torch.zeros_like(biases[path])).to(biases[path]) + biases[path]
            old["bias"] = bias.to(module.weight.dtype)
        for name, tensor in old.items():
            tensor = _at(tensor, part.outputs, 0) if tensor.ndim else tensor
            tensor = _at(tensor, part.inputs, 1) if tensor.ndim > 1 and across else tensor
            getattr(module, name).copy_(tensor)
    return small


def _at(tensor: Tensor, places: np.ndarray | None, dim: int) -> Tensor:
    return tensor if places is None else tensor.index_select(dim, torch.from_numpy(places).to(tensor.device))


def _pads_zeros(module: Any) -> bool:
    padding = getattr(module, "padding", 0)
    padded = padding == "same" if isinstance(padding, str) else bool(np.any(padding))
    return padded and module.padding_mode == "zeros"
