"""The processes of one training or evaluation; what they exchange is in the tests of both."""

from __future__ import annotations

import torch

from heads.training.ranks import Ranks, joined


def test_one_process_exchanges_with_itself() -> None:
    alone = joined("cpu")
    assert alone == Ranks() == Ranks.joined_before()
    assert alone.largest(0.1) == 0.1
    assert torch.equal(alone.greatest(torch.tensor([3, -1])), torch.tensor([3, -1]))
