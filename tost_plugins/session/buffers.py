"""What a session keeps in the model, so that every checkpoint of the model carries it: masks and the run's clock."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tost_plugins.errors import TostError
from tost_plugins.masks.base import Averaging, Exploring, MaskMethod, Moving, Scored
from tost_plugins.session import kinds
from tost_plugins.training.clock import Clock
from tost_plugins.training.log import say
from tost_plugins.training.params import (
    device_of,
    is_transposed,
    key_of,
    owners,
    plain_modules,
    prunable,
    some,
    weight_keys,
)  # fmt: skip

CLOCK, CHANGED = "tost_clock", "tost_changed"  # the run's, and how many entries the last move of a mask has changed
# Beside each weight, behind its name: `weight_mask` beside `weight`.
MASK = "_mask"
SEEN, HIDDEN = "_seen", "_hidden"  # of masks that move: what was ever kept, and what is out of sight
MOMENTUM = "_momentum"  # of those that move by averages of whole gradients
TRAINED = "_trained"  # of those under which some removed weights train and others do not
FIXED, SCORES, SPEEDS = "_fixed", "_scores", "_speeds"  # of scored ones: values, scores, their momenta
BESIDE = (MASK, SEEN, HIDDEN, MOMENTUM, TRAINED, FIXED, SCORES, SPEEDS)
_BESIDE = re.compile(rf"(?:^|\.)(?:weight|weight_(?:ih|hh|hr)_l\d+(?:_reverse)?)({'|'.join(BESIDE)})$")
_OURS = (CLOCK, CHANGED, kinds.KIND, "alpha", "alive", "tost_beta", "tost_perturbation")
_IGNORED = "_ddp_params_and_buffers_to_ignore"


def check_free(model: nn.Module, params: dict[str, nn.Parameter]) -> None:
    """Raise TostError where something else has the name of one of ours, which would be overwritten; in a copy of an
    attached model it is ours."""
    for name, module in owners(model, params).items() if not hasattr(model, CLOCK) else ():
        taken = [key for which in BESIDE if hasattr(module, key := _called(name, which))]
        if taken:
            layer = name.removesuffix(key_of(name)).removesuffix(".")
            parts = (path for path, part in model.named_modules() if path and hasattr(part, CLOCK))
            if part := next((path for path in parts if f"{layer}.".startswith(f"{path}.")), None):
                raise TostError(
                    f"attach: expected layers without a session, got those of {part}, which has one; finish() it first, or add "
                    f"'{part}.*' to `ignore`"
                )
            raise TostError(
                f"attach: expected a layer {layer} ({type(module).__name__}) without a {taken[0]}, where the session keeps its "
                f"mask, got one that has its own; rename that, use the plain layer, or add {layer!r} to `ignore`"
            )


class Added:
    """A dense mask beside every prunable weight, what a moving mask needs, and an unstarted clock at the root.

    `known` are the buffers that no session has put there; `names` are the others, which need not travel in every forward of
    DDP. A copy of an attached model has them already, and keeps their values, as those of a checkpoint. `loaded(model, keys)`
    is called when a state dict has been loaded into the model.
    """

    def __init__(self, model: nn.Module, method: MaskMethod, known: set[str], loaded: Callable[..., None]) -> None:
        def put(module: nn.Module, name: str, value: Tensor) -> None:
            if name not in module._buffers:
                module.register_buffer(name, value)

        params = prunable(model, method.ignore)
        self._layers = list(owners(model, params).items())
        for name, module in self._layers:
            put(module, _called(name, MASK), torch.ones_like(params[name], dtype=torch.bool))
            if isinstance(method, Moving):
                put(module, _called(name, SEEN), torch.zeros_like(params[name], dtype=torch.bool))
            if isinstance(method, Moving) and method.hides:
                put(module, _called(name, HIDDEN), torch.zeros_like(params[name]).detach())
            if isinstance(method, Exploring):
                put(module, _called(name, TRAINED), torch.zeros_like(params[name], dtype=torch.bool))
            if isinstance(method, Averaging):
                put(module, _called(name, MOMENTUM), torch.zeros_like(params[name]).detach())
            if isinstance(method, Scored):
                put(module, _called(name, FIXED), torch.zeros_like(params[name]).detach())
                for which in (SCORES, SPEEDS):
                    numbers = torch.zeros(params[name].shape, dtype=_wide(params[name]), device=params[name].device)
                    put(module, _called(name, which), numbers)
        put(model, CLOCK, torch.full((3,), -1, dtype=torch.int64, device=device_of(model)))
        put(model, kinds.KIND, kinds.written(method.kind).to(device_of(model)))
        if isinstance(method, Moving):
            put(model, CHANGED, torch.zeros((), dtype=torch.int64, device=device_of(model)))
        self.model, self.names = model, names(model) - known
        for hooks, ours in (
            (model._load_state_dict_pre_hooks, _accept_plain),
            (model._load_state_dict_post_hooks, loaded),
        ):
            for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is ours]:
                del hooks[key]  # a copy of an attached model brings its hooks along
        self._undo = [
            model.register_load_state_dict_pre_hook(_accept_plain).remove,
            model.register_load_state_dict_post_hook(loaded).remove,
            _exempt_from_ddp(model, self.names),
        ]

    def remove(self) -> None:
        """Take all of it away again."""
        for name, module in self._layers:
            for key in {_called(name, which) for which in BESIDE} & module._buffers.keys():
                delattr(module, key)
        for name in {CLOCK, CHANGED, kinds.KIND} & self.model._buffers.keys():
            delattr(self.model, name)
        for undo in self._undo:
            undo()


def _wide(weight: Tensor) -> torch.dtype:
    """What numbers beside a weight are computed in: real, and of 32 bits at least."""
    return torch.promote_types(weight.real.dtype, torch.float32)


def names(model: nn.Module) -> set[str]:
    """The names of all buffers."""
    return {name for name, _ in model.named_buffers()}


def known(model: nn.Module) -> set[str]:
    """The names of the buffers that no session has put there; a copy of an attached model has both kinds."""
    return {name for name in names(model) if not hasattr(model, CLOCK) or not of_a_session(name)}


def beside(model: nn.Module, params: dict[str, nn.Parameter], which: str = MASK) -> dict[str, Tensor]:
    """Name of a weight -> the buffer beside it: one of BESIDE."""
    return of(owners(model, params), which)


def of(owners: Mapping[str, nn.Module], which: str) -> dict[str, Tensor]:
    """Name of a weight -> the buffer of this kind beside it, for the modules that have the weights."""
    return {name: getattr(module, _called(name, which)) for name, module in owners.items()}


def is_beside(name: str) -> bool:
    """Whether an entry of a state dict is one of those that a session keeps beside a weight."""
    return _BESIDE.search(name) is not None


def is_mask(name: str) -> bool:
    """Whether an entry of a state dict is a mask that a session keeps beside a weight."""
    found = _BESIDE.search(name)
    return found is not None and found[1] == MASK


def _called(name: str, which: str) -> str:
    """What the buffer of this kind is called in the module that has the weight."""
    return f"{key_of(name)}{which}"


def read_clock(model: nn.Module) -> Clock | None:
    """The clock in the model; None if no run has started with it."""
    step, total, per_epoch = (int(value) for value in getattr(model, CLOCK).tolist())
    if step < 0:
        return None
    return Clock(step, None if total < 0 else total, None if per_epoch < 0 else per_epoch)


def write_clock(model: nn.Module, clock: Clock, lengths: bool) -> tuple[int, int]:
    """Write the step, and with `lengths` the run's too; returns the buffer's version (see `version`)."""
    buffer = getattr(model, CLOCK)
    if lengths:
        values = (-1 if value is None else value for value in (clock.total_steps, clock.steps_per_epoch))
        buffer[1:] = torch.tensor(list(values), device=buffer.device)
    buffer[0] = clock.step
    return version(model)


def version(model: nn.Module) -> tuple[int, int]:
    """Changes whenever somebody writes the clock buffer or puts another in its place, as loading a checkpoint does."""
    buffer = getattr(model, CLOCK)
    return id(buffer), buffer._version


def _exempt_from_ddp(model: nn.Module, added: set[str]) -> Callable[[], None]:
    """Keep DDP from sending our buffers in every forward; the ghosts' running statistics stay in its care."""
    ours = [name for name in sorted(added) if name.rsplit(".", 1)[-1] in _OURS or is_beside(name)]
    before = [name for name in getattr(model, _IGNORED, ()) if name not in ours] or None
    setattr(model, _IGNORED, [*(before or []), *ours])
    return lambda: delattr(model, _IGNORED) if before is None else setattr(model, _IGNORED, before)


def _accept_plain(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let weights of the plain network load into an attached one: what it does not have stays as it is, but alpha and beta,
    which tell ghosts and soft activations to be silent where they are missing. Of a checkpoint that masked other layers,
    frozen ones say, the masks without a place here are left out, and said."""
    if f"{prefix}{CLOCK}" in state_dict:
        kinds.check(module, state_dict, prefix, _BESIDE)
        _leave_out_masks(module, state_dict, prefix)
        _fill_in_masks(module, state_dict, prefix)
        _check_masks(module, state_dict, prefix)
        return
    for name, value in module.state_dict().items():
        if of_a_session(name) and name.rpartition(".")[2] not in ("alpha", "tost_beta", "tost_perturbation"):
            fixed = name.endswith(FIXED) and is_beside(
                name
            )  # the weights that are loaded are those of the rest of the run
            plain = state_dict.get(prefix + name.removesuffix(FIXED)) if fixed else None
            state_dict.setdefault(prefix + name, value if plain is None else plain)


def _leave_out_masks(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    own = module.state_dict().keys()
    foreign = [
        name
        for name in state_dict
        if name.startswith(prefix) and (found := _BESIDE.search(short := name.removeprefix(prefix)))
        and short not in own and short.removesuffix(found[1]) in own
    ]  # fmt: skip
    for name in foreign:
        del state_dict[name]
    masks = [name for name in foreign if is_mask(name)]
    if masks:
        say(f"checkpoint: {len(masks)} masks are of layers that have none here, and are left out: {some(masks, 3)}")


def _fill_in_masks(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """The Hub's Conv1D and recurrent layers had no masks once: a checkpoint of that time goes on with them dense, as it was."""
    dense: dict[str, dict[str, None]] = {"Conv1D": {}, "recurrent": {}}
    for path, layer in plain_modules(module):
        start = f"{prefix}{path}." if path else prefix
        for key in weight_keys(layer) if is_transposed(layer) or isinstance(layer, nn.RNNBase) else ():
            kept = {which: layer._buffers.get(f"{key}{which}") for which in BESIDE}
            if kept[MASK] is not None and f"{start}{key}" in state_dict and f"{start}{key}{MASK}" not in state_dict:
                dense["Conv1D" if is_transposed(layer) else "recurrent"][path] = None
                state_dict |= {
                    f"{start}{key}{k}": state_dict[f"{start}{key}"]
                    if k == FIXED
                    else torch.full_like(b, b.dtype == torch.bool)
                    for k, b in kept.items()
                    if b is not None
                }
    for kind, paths in dense.items():
        if paths:
            say(f"checkpoint: without masks for {len(paths)} {kind} layers, which stay dense: {some(list(paths), 3)}")


def _check_masks(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Raise TostError where a run's clock comes without its masks: weights under other names would stay what they are, too."""
    own = [name for name in module.state_dict() if is_mask(name)]
    missing = [name for name in own if f"{prefix}{name}" not in state_dict]
    if missing:
        raise TostError(
            f"checkpoint: expected masks under the model's own names, got a run's clock without {some(missing, 3)}; transformers "
            f"writes some models (ViT, Swin, SegFormer) under other names than it loads: begin a new run with "
            f"from_pretrained(folder), or keep model.state_dict() yourself"
        )


def of_a_session(name: str) -> bool:
    """Whether an entry of an attached model's state dict is one that the plain network does not have."""
    return is_beside(name) or any(part in f".{name}" for part in (".ghost_skip.", ".tost_"))
