"""Recurrent layers on packed sequences: they train under a mask as on padded ones; what cannot look at them says why."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from tost_plugins import Session, TostError, masks
from tost_plugins.training.batches import pick, size_of

LENGTHS = (5, 4, 3, 2, 2)
STEPS = 4


class Packed(nn.Module):
    """The last state of an LSTM over sequences that come packed, or are packed here."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.lstm, self.head = nn.LSTM(3, 8), nn.Linear(8, 2)

    def forward(self, x: Any) -> Tensor:
        if isinstance(x, Tensor):
            x = pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True)
        return self.head(self.lstm(x)[1][0][-1])


def batches(packed: bool) -> list[tuple[Any, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randn(5, 5, 3, generator=generator) for _ in range(STEPS)]
    inputs = [pack_sequence([row[:n] for row, n in zip(x, LENGTHS, strict=True)]) if packed else x for x in whole]
    return [(x, torch.tensor([0, 1, 0, 1, 1])) for x in inputs]


def trained(packed: bool, kind: str, tweaks: list[Any]) -> tuple[nn.Module, Session]:
    net, data = Packed(), batches(packed)
    session = Session(net, {"mask": {"kind": kind, "sparsity": 0.5}, "tweaks": tweaks})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with session.drive(optimizer, data, total_steps=STEPS):
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net, session


@pytest.mark.parametrize("kind", ["random", "snip"])
def test_packed_where_they_come_from_or_in_the_network_is_the_same_run(kind: str) -> None:
    (net, session), (other, late) = trained(True, kind, []), trained(False, kind, [])
    assert session.mask == late.mask and session.mask.sparsity == 0.5
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("packed", [True, False])
def test_rescaled_init_says_what_is_in_its_way(packed: bool) -> None:
    with pytest.raises(
        TostError, match=r"rescaled_init, iteration 1: expected layers whose gradient torch.func can"
    ) as it:
        trained(packed, "random", ["rescaled_init"])
    assert str(it.value).endswith("; give them padded tensors, or leave rescaled_init out")
    _, session = trained(packed, "random", [{"kind": "rescaled_init", "optional": True}])
    assert len(session.left_out) == 1 and session.left_out[0].startswith(
        "rescaled_init (expected layers whose gradient"
    )


def test_samples_are_counted_and_not_taken_singly() -> None:
    batch = batches(packed=True)[0]
    assert isinstance(batch[0], PackedSequence) and size_of(batch) == size_of(batch[:1]) == 5
    with pytest.raises(TostError, match="expected samples that can be taken singly, got a PackedSequence; pass padded"):
        pick(batch, [0, 1])
    with pytest.raises(TostError, match=r"masks.find\(grasp\): batch: expected samples that can be taken singly"):
        masks.find(Packed(), "grasp", 0.5, batches=[batch])
