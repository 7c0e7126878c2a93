"""One network and one loss in every usual form of forward, batch and outputs: the same mask and the same initialisation, or one
line that names the argument which says more."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tost_plugins import Mask, Session, TostError, masks
from tost_plugins.training.task import Task
from tost_plugins.tweaks.rescaled_init import rescale


class Core(nn.Module):
    """Class scores of an image and a table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(2, 4, 3), nn.Linear(7, 3)

    def scores(self, image: Tensor, table: Tensor) -> Tensor:
        return self.fc(torch.cat([F.relu(self.conv(image)).mean((2, 3)), table], 1))


def network(forward: Callable[..., Any]) -> nn.Module:
    return type("Net", (Core,), {"forward": forward})()


torch.manual_seed(1)
IMAGE, TABLE, LABEL = torch.rand(12, 2, 6, 6), torch.rand(12, 3), torch.arange(12) % 3


def plain(self, image, table):
    return self.scores(image, table)


def with_labels(self, image, table, labels=None):
    scores = self.scores(image, table)
    return scores if labels is None else {"loss": F.cross_entropy(scores, labels)}


def scores_and_loss(self, image, table, targets=None):
    scores = self.scores(image, table)
    return scores, None if targets is None else F.cross_entropy(scores, targets)


def losses(self, image, table, targets):
    each = F.cross_entropy(self.scores(image, table), targets, reduction="none").view(2, 6).mean(1) / 2
    return {"loss_of_the_first": each[0], "loss_of_the_last": each[1]}


def detector(self, images, targets=None):
    if self.training and targets is None:
        raise ValueError("In training mode, targets should be passed")
    scores = self.scores(torch.stack(list(images)), TABLE)
    return {"classification": F.cross_entropy(scores, torch.stack([target["class"] for target in targets]))}


class Case(NamedTuple):
    forward: Callable[..., Any]
    batch: Any
    given: Any = MappingProxyType({})


CASES = {
    "three entries": Case(plain, (IMAGE, TABLE, LABEL)),
    "side by side": Case(plain, ((IMAGE, TABLE), LABEL)),
    "side by side, in lists": Case(plain, [[IMAGE, TABLE], LABEL]),
    "inputs by name": Case(plain, ({"image": IMAGE, "table": TABLE}, LABEL)),
    "all in one": Case(lambda self, pair: self.scores(*pair), ((IMAGE, TABLE), LABEL)),
    **{f"a dict with {key}": Case(plain, {"image": IMAGE, "table": TABLE, key: LABEL})
       for key in ("label", "labels", "target", "y", "fine_label", "digit")},
    "a dict with more": Case(plain, {"image": IMAGE, "table": TABLE, "label": LABEL, "path": ["a"] * 12}),
    "a dict under another name": Case(lambda self, x: self.scores(x, TABLE), {"img": IMAGE, "label": LABEL}),
    "a dict of two tensors": Case(lambda self, x: self.scores(x, TABLE), {"img": IMAGE, "digit": LABEL}),
    "the dict itself": Case(lambda self, batch: self.scores(batch["image"], batch["table"]),
                            {"image": IMAGE, "table": TABLE, "y": LABEL}),
    "optional labels": Case(with_labels, (IMAGE, TABLE, LABEL)),
    "labels by name": Case(with_labels, {"image": IMAGE, "table": TABLE, "labels": LABEL}),
    "scores and loss": Case(scores_and_loss, (IMAGE, TABLE, LABEL)),
    "several losses": Case(losses, (IMAGE, TABLE, LABEL)),
    "a detector": Case(detector, (tuple(IMAGE), tuple({"class": label} for label in LABEL))),
    "out": Case(lambda self, image, table: {"out": self.scores(image, table)}, (IMAGE, TABLE, LABEL)),
    "names of its own, and any": Case(lambda self, x=None, **rest: self.scores(x, TABLE), {"img": IMAGE, "label": LABEL}),
    "one-hot labels": Case(plain, (IMAGE, TABLE, F.one_hot(LABEL, 3).float())),
    "one output": Case(lambda self, image, table: {"prediction": self.scores(image, table)}, (IMAGE, TABLE, LABEL)),
    "loss of outputs": Case(lambda self, image, table: (self.scores(image, table), image), (IMAGE, TABLE, LABEL),
                            {"loss_fn": lambda outputs, labels: F.cross_entropy(outputs[0], labels)}),
    "loss of scores": Case(lambda self, image, table: {"out": self.scores(image, table)}, (IMAGE, TABLE, LABEL),
                           {"loss_fn": F.cross_entropy}),
    "forward and criterion": Case(plain, {"a": [IMAGE], "b": {"c": TABLE}, "d": LABEL, "e": LABEL},
                                  {"forward": lambda model, batch: model(batch["a"][0], batch["b"]["c"]),
                                   "criterion": lambda outputs, batch: F.cross_entropy(outputs, batch["d"])}),
    "a method": Case(lambda self: None, (IMAGE, TABLE, LABEL),
                     {"forward": lambda model, batch: model.scores(*batch[:2]),
                      "criterion": lambda outputs, batch: F.cross_entropy(outputs, batch[2])}),
    "in-place work on the batch": Case(lambda self, image, table: self.scores(image.mul_(2).div_(2), table),
                                       (IMAGE, TABLE, LABEL)),
}  # fmt: skip


@pytest.fixture(scope="module")
def expected() -> dict[str, Mask]:
    """Found with a forward and a loss that leave no question."""

    def fixed(image: Tensor, table: Tensor) -> Callable[[Any, Any], Any]:
        return lambda model, batch: model.scores(image.to(model.fc.weight.dtype), table.to(model.fc.weight.dtype))

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, LABEL)

    ones = fixed(torch.ones(1, 2, 6, 6), torch.ones(1, 3))
    batches = [(IMAGE, LABEL)]
    return {
        "snip": masks.find(network(plain), "snip", 0.5, batches, forward=fixed(IMAGE, TABLE), criterion=loss),
        "synflow": masks.find(network(plain), "synflow", 0.5, batches, forward=ones, rounds=3),
    }


@pytest.mark.parametrize("name", CASES)
def test_snip_finds_one_mask_for_all_forms(name: str, expected: dict[str, Mask]) -> None:
    case = CASES[name]
    net = network(case.forward)
    assert masks.find(net, "snip", 0.5, [case.batch], **case.given) == expected["snip"]
    if "forward" not in case.given:  # and in a run of one's own
        session = Session(net, {"mask": {"kind": "snip", "sparsity": 0.5}, "tweaks": []})
        with session.drive(torch.optim.SGD(net.parameters(), lr=0.1), [case.batch], total_steps=1, **case.given):
            assert session.mask == expected["snip"]


@pytest.mark.parametrize(
    "name",
    [
        "three entries",
        "side by side",
        "side by side, in lists",
        "inputs by name",
        "a dict with fine_label",
        "optional labels",
        "out",
    ],
)
def test_synflow_finds_one_mask_for_all_forms(name: str, expected: dict[str, Mask]) -> None:
    case = CASES[name]
    assert (
        masks.find(network(case.forward), "synflow", 0.5, [case.batch], rounds=3, **case.given) == expected["synflow"]
    )


@pytest.mark.parametrize("name", ["side by side", "a dict with label", "optional labels", "out", "loss of scores"])
def test_grasp_and_rescaled_init_come_to_the_same(name: str) -> None:
    case, usual = CASES[name], CASES["three entries"]
    for find in (
        lambda net, case: masks.find(net, "grasp", 0.5, [case.batch], per_class=3, **case.given),
        lambda net, case: rescale(Task.of(net, batches=[case.batch], **case.given), {}, iterations=3),
    ):
        assert find(network(case.forward), case) == find(network(usual.forward), usual)


REFUSED = {
    "labels of two kinds": (
        plain,
        {"image": IMAGE, "table": TABLE, "fine_label": LABEL, "coarse_label": LABEL},
        "criterion=",
    ),
    "a third entry": (
        lambda self, x: self.scores(x, TABLE),
        (IMAGE, LABEL, torch.arange(12)),
        "got 2 entries that may be labels in a tuple; pass batches with labels, or say what the loss is: criterion=",
    ),
    "an option in its place": (
        lambda self, x, mask=None: self.scores(x, TABLE),
        (IMAGE, LABEL, torch.arange(12)),
        "forward=",
    ),
    "inputs under other names": (plain, {"a": IMAGE, "b": TABLE, "label": LABEL}, "forward="),
    "one input too few": (lambda self, a, b, c: a, (IMAGE, LABEL), "forward="),
    "a network that fails": (lambda self, x: x.no_such_thing, (IMAGE, LABEL), "forward="),
    "labels that do not fit": (plain, (IMAGE, TABLE, LABEL + 99), "criterion="),
    "two outputs": (lambda self, image, table: (self.scores(image, table), image), (IMAGE, TABLE, LABEL), "criterion="),
    "a loss beside others": (
        lambda self, image, table: {"aux_loss": self.scores(image, table).mean(), "map": image},
        (IMAGE, TABLE, LABEL),
        "criterion=",
    ),
    "numbers to be learned": (plain, (IMAGE, TABLE, torch.rand(12, 3)), "loss_fn="),
    "labels of many classes": (plain, (IMAGE, TABLE, torch.ones(12, 3)), "loss_fn="),
    "one score": (lambda self, image, table: self.scores(image, table)[:, :1], (IMAGE, TABLE, LABEL * 0), "loss_fn="),
    "no labels": (plain, {"image": IMAGE, "table": TABLE}, "criterion="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_more_than_one_reading_is_possible_an_argument_is_named(name: str) -> None:
    forward, batch, argument = REFUSED[name]
    with pytest.raises(TostError) as error:
        masks.find(network(forward), "snip", 0.5, [batch])
    assert argument in str(error.value) and "\n" not in str(error.value)


def test_what_is_optional_is_left_out_where_a_batch_cannot_be_read() -> None:
    forward, batch, _ = REFUSED["two outputs"]
    net, tweak = network(forward), {"kind": "rescaled_init", "iterations": 2, "optional": True}
    session = Session(net, {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": [tweak]}).attach()
    session.start(torch.optim.SGD(net.parameters(), lr=0.1), [batch], total_steps=1)
    assert "rescaled_init" in " ".join(session.report().left_out)


def test_a_sample_in_no_batch_and_a_batch_of_one() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.rand(4), torch.tensor(2)
    for kind in ("snip", "synflow"):
        one = masks.find(net, kind, 0.5, [(x[None], y[None])], on_collapse="keep_one")
        assert masks.find(net, kind, 0.5, [(x, y)], on_collapse="keep_one") == one
    norm = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    short = [(torch.rand(5, 4), torch.arange(5) % 3), (x[None], y[None])]
    assert len(rescale(Task.of(norm, batches=short), {}, iterations=4)) == 6


# ---- what is given and cannot be called, or is another thing than its name says


@pytest.mark.parametrize("given, said", [
    ({"forward": "net"}, "forward: expected a function, got 'net'; say how the network is called: forward="),
    ({"criterion": 3}, "criterion: expected a function, got 3; say what the loss is: criterion="),
    ({"loss_fn": "mse"}, "loss_fn: expected a function, got 'mse'; pass one, such as loss_fn="),
    ({"loss_fn": nn.CrossEntropyLoss}, "loss_fn: expected a function, got the class CrossEntropyLoss; make one: CrossEntr"),
    ({"criterion": nn.CrossEntropyLoss()}, "a function of the outputs and the batch, got CrossEntropyLoss, which does not"),
    ({"criterion": F.cross_entropy}, "expected a function of the outputs and the batch, got cross_entropy, which does not"),
])  # fmt: skip
def test_what_cannot_be_called_is_named(given: dict[str, Any], said: str) -> None:
    net = network(plain)
    with pytest.raises(TostError) as error:
        masks.find(net, "snip", 0.5, [(IMAGE, TABLE, LABEL)], **given)
    assert said in str(error.value)
    session = Session(net, {"mask": {"kind": "snip", "sparsity": 0.5}, "tweaks": []}).attach()
    with pytest.raises(TostError) as error:
        session.start(torch.optim.SGD(net.parameters(), lr=0.1), [(IMAGE, TABLE, LABEL)], total_steps=1, **given)
    assert said in str(error.value)


def test_a_callers_own_error_in_its_criterion_is_its_own() -> None:
    with pytest.raises(KeyError, match="no such key"):
        masks.find(
            network(plain), "snip", 0.5, [(IMAGE, TABLE, LABEL)], criterion=lambda outputs, batch: {}["no such key"]
        )


def test_no_forward_is_the_usual_one() -> None:
    given: Any = {"forward": None}
    batches = [(IMAGE, TABLE, LABEL)]
    assert masks.find(network(plain), "snip", 0.5, batches, **given) == masks.find(network(plain), "snip", 0.5, batches)


@pytest.mark.parametrize("loss_fn", ["mse", nn.MSELoss, None])
def test_a_criterion_that_cannot_be_called_is_named(loss_fn: Any) -> None:
    session = Session(network(plain), {"mask": {"kind": "random", "sparsity": 0.5}, "tweaks": []})
    with pytest.raises(TostError, match="loss_fn: expected a function, got "):
        session.criterion(loss_fn)


# ---- outputs that are objects, and losses of them


class Scores:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@dataclass(frozen=True)
class Frozen:
    logits: Tensor
    more: tuple[Tensor, ...]


WEIGHTS = torch.tensor([100.0, 1.0, 0.01])


@pytest.mark.parametrize("made", [Scores, lambda scores: Frozen(scores, (IMAGE,))], ids=["an object", "a dataclass"])
def test_grasp_takes_the_loss_of_outputs_that_it_is_given(made: Any) -> None:
    def forward(self, image, table):
        return made(self.scores(image, table))

    def found(forward: Any, **given: Any) -> Mask:
        return masks.find(network(forward), "grasp", 0.5, [(IMAGE, TABLE, LABEL)], per_class=3, **given)

    of_logits = found(forward, criterion=lambda out, batch: F.cross_entropy(out.logits, batch[2], weight=WEIGHTS))
    assert of_logits == found(plain, criterion=lambda out, batch: F.cross_entropy(out, batch[2], weight=WEIGHTS))
    assert of_logits != found(forward)


@pytest.mark.parametrize("kind", ["synflow", "grasp"])
def test_who_looks_at_class_scores_says_how_to_return_them(kind: str) -> None:
    def forward(self, image, table):
        return image, self.scores(image, table)

    given: Any = {"criterion": lambda outputs, batch: F.cross_entropy(outputs[1], batch[2])}
    with pytest.raises(
        TostError, match=f"{kind}: expected a network that returns class scores, got tuple; .* forward=lambda"
    ):
        masks.find(network(forward), kind, 0.5, [(IMAGE, TABLE, LABEL)], **given)
    alone = masks.find(
        network(forward), kind, 0.5, [(IMAGE, TABLE, LABEL)], forward=lambda model, batch: model(*batch[:2])[1]
    )
    assert alone == masks.find(network(plain), kind, 0.5, [(IMAGE, TABLE, LABEL)])


# ---- the loss that is looked at where nobody has said which


def looked(
    caplog: pytest.LogCaptureFixture, criterion: Any = None, forward: Any = plain, **given: Any
) -> tuple[Mask, str]:
    caplog.clear()
    net = network(forward)
    session = Session(net, {"mask": {"kind": "snip", "sparsity": 0.5}, "tweaks": []})
    if criterion is not None:
        session.criterion(criterion)
    with caplog.at_level("INFO", logger="tost_plugins"):
        session.attach().start(
            torch.optim.SGD(net.parameters(), lr=0.1), [(IMAGE, TABLE, LABEL)], total_steps=1, **given
        )
    return session.mask, next((line for line in caplog.messages if "has looked at" in line), "")


def test_a_guessed_loss_is_said(caplog: pytest.LogCaptureFixture) -> None:
    usual, said = looked(caplog)
    assert said == (
        "recipe unnamed: the loss that snip has looked at is cross entropy; where another one trains, say what the loss is: "
        "criterion=lambda outputs, batch: ..."
    )
    assert looked(caplog, loss_fn=F.cross_entropy) == (usual, "")
    assert looked(caplog, forward=with_labels)[1] == ""
    own = looked(caplog, criterion=nn.MSELoss())  # which may be called in another way than with outputs and labels
    assert own == (usual, said)


def test_the_line_names_only_what_looks(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    tweaks = ["multiplicative", "soft_activation", {"kind": "rescaled_init", "iterations": 1}]
    session = Session(net, {"mask": {"kind": "snip", "sparsity": 0.5}, "tweaks": tweaks}).attach()
    batches = [(torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]))]
    with caplog.at_level("INFO", logger="tost_plugins"):
        session.start(torch.optim.SGD(net.parameters(), lr=0.1), batches, total_steps=10)
    assert "the loss that snip or rescaled_init has looked at is cross entropy" in caplog.text


def test_cross_entropy_that_a_session_was_given_is_the_loss_that_is_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    weighted = nn.CrossEntropyLoss(weight=WEIGHTS)
    found, said = looked(caplog, weighted)
    assert not said and found == looked(caplog, loss_fn=weighted)[0] != looked(caplog)[0]
    assert looked(caplog, F.cross_entropy) == (looked(caplog)[0], "")


class Tokens(nn.Module):
    """Scores of 5 words for each token; what a loss of rows or of columns makes of them is for it to say."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body = nn.Embedding(5, 8), nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self.table(tokens))


@pytest.mark.parametrize("given", [True, False], ids=["a loss of the session's", "none"])
def test_scores_of_as_many_tokens_as_words_may_be_read_in_two_ways(given: bool) -> None:
    tokens = torch.randint(5, (4, 5), generator=torch.Generator().manual_seed(0))

    def run(**more: Any) -> Mask:
        net = Tokens()
        session = Session(net, {"mask": {"kind": "snip", "sparsity": 0.5}, "tweaks": []})
        if given:
            session.criterion(nn.CrossEntropyLoss())  # the loop may hand it tokens by words, or words by tokens
        session.attach().start(torch.optim.SGD(net.parameters(), lr=0.1), [(tokens, tokens)], total_steps=1, **more)
        return session.mask

    with pytest.raises(TostError, match=r"classes along one axis, .* shape \(4, 5\) for .* \(4, 5, 5\); .*criterion="):
        run()
    of_rows = run(criterion=lambda outputs, batch: F.cross_entropy(outputs.flatten(0, 1), batch[1].flatten()))
    assert of_rows != run(loss_fn=F.cross_entropy)  # which takes the second axis
