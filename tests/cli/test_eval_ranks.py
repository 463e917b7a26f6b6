"""`mote-cli eval` in several processes of one machine."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from cli.main import app
from featstore.errors import UserError
from tests.support.worlds.tiny_world import World


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_two_evaluating_processes_do_not_share_a_gpu(
    monkeypatch: pytest.MonkeyPatch, world: World, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    place = ("--device", device, "--root", str(world.root))
    result = CliRunner().invoke(app, ["eval", "--closeset", "clips", "--head", "mean", *place])
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == (
        "rank 1 is number 1 on this machine, which has 1 GPUs: start at most 1 processes here "
        "(--nproc-per-node 1)"
    )
