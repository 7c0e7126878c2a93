"""`tost lottery`: the rounds of a lottery ticket, each a run of the recipe, under any of the five trainers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tost_plugins.errors import TostError
from tost_plugins.files.atomic import copy_folder
from tost_plugins.files.tensors import by_clean_name, read_tensors
from tost_plugins.lab.progress import Listener, silent
from tost_plugins.lab.train import check_out, prepare, train
from tost_plugins.lottery.rounds import each, first_step
from tost_plugins.masks.mask import Mask
from tost_plugins.masks.methods.lottery_ticket import LotteryTicket
from tost_plugins.recipe.recipe import Recipe
from tost_plugins.training import seeds
from tost_plugins.training.clock import Clock
from tost_plugins.training.log import say
from tost_plugins.training.params import prunable

_FOR_INITIAL_WEIGHTS = ("rescaled_init", "sparse_init")


def lottery(recipe: Recipe, out: str | Path, resume: bool = False, listen: Listener = silent) -> list[dict[str, Any]]:
    """Train a recipe whose mask is a lottery_ticket, round after round in `out`/round-00 and so on, tweaks included.

    The dense round keeps the trainer's own checkpoint of the moment `rewind`; each later round resumes from a copy of
    it, masked: weights, buffers, optimizer, learning-rate schedule, place in the data and random states. With the
    default, 0ba, each round begins as any run of the recipe does, from the same initial weights, or from what the ticket's
    `weights` makes of them; with "learning_rate" too, but from the weights that the round before has left, and without
    rescaled_init and sparse_init, which are for initial ones. Returns a row per
    round: sparsity, kept weights, test accuracy and, where the data holds some out, validation accuracy, in percent;
    they are in `out`/lottery.csv as soon as a round is done (then `listen("round", row)` is called).

    With `resume` finished rounds are not run again, and the one that was stopped goes on from its last checkpoint.
    Raises TostError for a recipe with another mask, and for a `rewind` beyond the run; Stopped after Ctrl-C.
    """
    ticket, out = recipe.mask, Path(out)
    if not isinstance(ticket, LotteryTicket):
        raise TostError(
            f"tost lottery: expected a recipe whose mask is a lottery_ticket, got {ticket.kind!r}; "
            f"write mask: {{kind: lottery_ticket, sparsity: 0.9}}, or use tost train"
        )
    if ticket.removed != "zero":
        raise TostError(
            "mask.removed: expected zero, got 'initial'; under a trainer removed weights are 0: use LotteryTicket(...).run(...) "
            "with a loop over round.steps"
        )
    check_out(out, recipe, resume)
    job = prepare(recipe, out)
    first = first_step(ticket, Clock(0, job.total_steps, job.steps_per_epoch))
    initial = {name: param.detach().cpu() for name, param in prunable(job.model, ticket.ignore).items()}
    out.mkdir(parents=True, exist_ok=True)
    recipe.to_yaml(out / "recipe.yaml")
    del job
    last, later = len(ticket.sparsities()) - 1, _later(recipe)

    def one(number: int, folder: Path, mask: Mask) -> tuple[Mapping[str, Tensor], dict[str, float]]:
        def named(event: str, values: dict[str, Any]) -> None:
            title = f"{recipe.name}, round {number} of {last}, sparsity {mask.sparsity:.4f}"
            listen(event, {**values, "name": title} if event == "run" else values)

        if number and first:
            copy_folder(out / "round-00" / "early", folder / "checkpoints")
        start = partial(_restart, ticket, out, number, recipe.seed) if number else None
        result = train(later if number else recipe, folder, True, mask, named, 0 if number else first, start)
        return by_clean_name(read_tensors(folder / "model.safetensors")[0]), _scores(recipe, result)

    rows = []
    for row in each(ticket, Mask.dense(initial), out, one, initial):
        rows.append(row)
        listen("round", row)
    return rows


def _later(recipe: Recipe) -> Recipe:
    """The recipe of the rounds after the dense one."""
    over = [tweak for tweak in recipe.tweaks if recipe.mask.keeps_weights and tweak.kind in _FOR_INITIAL_WEIGHTS]
    for tweak in over:
        say(f"lottery: {tweak.kind} is for the dense round alone, since the others go on with its weights")
    return recipe.model_copy(update={"tweaks": tuple(tweak for tweak in recipe.tweaks if tweak not in over)})


def _restart(ticket: LotteryTicket, out: Path, number: int, seed: int, model: nn.Module, mask: Mask | None) -> None:
    """What a round starts from, in place of the initial weights."""
    if ticket.keeps_weights:
        model.load_state_dict(read_tensors(out / f"round-{number - 1:02d}" / "model.safetensors")[0])
    elif mask is not None:
        ticket.restart(prunable(model, ticket.ignore), mask, seeds.generator(seed, number))


def _scores(recipe: Recipe, result: Mapping[str, Any]) -> dict[str, float]:
    held_out = {"validation_accuracy": result["history"][-1]["accuracy"]} if recipe.data.validation else {}
    return {"test_accuracy": result["test_accuracy"], **held_out}
