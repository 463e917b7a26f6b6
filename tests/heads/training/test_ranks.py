"""The processes of one training or evaluation; what they exchange is in the tests of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cli.main import app
from featstore import UserError
from heads.training.ranks import Ranks, joined


def test_one_process_exchanges_with_itself() -> None:
    alone = joined("cpu")
    assert alone == Ranks() == Ranks.joined_before()
    assert alone.largest(0.1) == 0.1
    assert torch.equal(alone.greatest(torch.tensor([3, -1])), torch.tensor([3, -1]))


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_two_evaluating_processes_do_not_share_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    place = ("--device", device, "--root", str(tmp_path))
    result = CliRunner().invoke(app, ["eval", "--closeset", "clips", "--head", "mean", *place])
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == (
        "rank 1 is number 1 on this machine, which has 1 GPUs: start at most 1 processes here "
        "(--nproc-per-node 1)"
    )
