"""The default mask: the model's own zeros, else SynFlow, else SNIP, and one line that says which."""

import logging

import mask_nets
import pytest
import torch
from torch import Tensor, nn

from tost_plugins import TostError, masks


class Words(nn.Module):
    """Classifies rows of tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body = nn.Embedding(9, 8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.body(self.embed(input_ids).mean(1))


class Shy(nn.Module):
    """Does not run on ones: they have no spread."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        if bool((x == x[0, 0]).all()):
            raise ValueError("the input has no spread")
        return self.body(x / x.std())


def tokens(batch: int = 8) -> Tensor:
    return torch.randint(9, (batch, 5), generator=torch.Generator().manual_seed(1))


LABELS = torch.arange(8) % 3
FITS_NOT = {
    "tokens": (Words, [(tokens(), LABELS)]),
    "tokens by name": (Words, [{"input_ids": tokens(), "labels": LABELS}]),
    "no ones": (Shy, [(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)), LABELS)]),
}


@pytest.mark.parametrize("case", FITS_NOT)
def test_snip_where_synflow_does_not_fit(case: str, caplog: pytest.LogCaptureFixture) -> None:
    make, batches = FITS_NOT[case]
    with caplog.at_level(logging.INFO, "tost_plugins"):
        found = masks.find(make(), "auto", 0.5, batches=batches)
    assert found == masks.find(make(), "snip", 0.5, batches=batches, on_collapse="keep_one")
    (line,) = [message for message in caplog.messages if message.startswith("mask auto")]
    assert line.startswith("mask auto: SNIP at sparsity 0.5, since SynFlow does not fit: synflow: expected ")


def test_without_batches_there_is_no_other_and_a_fault_of_the_network_stays_one() -> None:
    with pytest.raises(TostError, match="expected a network that runs on an input of ones"):
        masks.find(Words(), "auto", 0.5)
    net = Words()
    with torch.no_grad():
        net.body[0].weight[0, 0] = float("nan")
    with pytest.raises(TostError, match="snip: expected finite numbers"):
        masks.find(net, "auto", 0.5, batches=[(tokens(), LABELS)])


def test_synflow_where_it_fits(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tost_plugins"):
        found = masks.find(mask_nets.net(), "auto", 0.5, batches=mask_nets.batches())
    assert found == masks.find(mask_nets.net(), "synflow", 0.5, batches=mask_nets.batches(), on_collapse="keep_one")
    assert "mask auto: SynFlow at sparsity 0.5" in caplog.messages
