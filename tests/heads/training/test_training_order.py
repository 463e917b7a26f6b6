"""How the features are held never changes a run: the same bits, or the order it was begun with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from featstore import Store
from featstore.batches.loader import Holding, StreamedFeatures
from heads import HeadConfig, TrainConfig, train_head
from tests.support.stores.action_store import action_store

HEAD = HeadConfig(dim=16, layers=1, experts=2)
RECIPE = TrainConfig(epochs=2, warmup_epochs=1, lr=1e-3, batch_size=4, frames=4, seed=5)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return action_store(tmp_path / "toy.zarr", failed=(4,))


def train(
    store: Store, run: Path, holding: Holding, monkeypatch: pytest.MonkeyPatch, resume: bool = False
) -> bytes:
    monkeypatch.setattr(
        "heads.training.train_head.choose_holding", lambda nbytes, mappable: holding
    )
    monkeypatch.setattr(StreamedFeatures, "pool_rows", 7)  # 19 rows are one pool otherwise
    train_head(
        *(store, run, HEAD, RECIPE),
        rows=store.split("train"),
        prompt_set="mote28",
        device="cpu",
        resume=resume,
    )
    return (run / "head.safetensors").read_bytes()


def test_resident_and_mapped_give_the_same_bits_and_streamed_says_so(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = train(store, tmp_path / "resident", "resident", monkeypatch)
    assert train(store, tmp_path / "mapped", "mapped", monkeypatch) == resident
    streamed = train(store, tmp_path / "streamed", "streamed", monkeypatch)
    assert streamed != resident
    assert streamed == train(store, tmp_path / "again", "streamed", monkeypatch)
    config = json.loads((tmp_path / "streamed/config.json").read_text())
    assert config["data"]["order"] == "blocks"


@pytest.mark.parametrize(("begun", "later"), [("streamed", "resident"), ("resident", "streamed")])
def test_a_run_keeps_the_order_it_was_begun_with(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: Holding, later: Holding
) -> None:
    whole = train(store, tmp_path / "whole", begun, monkeypatch)
    run = tmp_path / "run"
    train(store, run, begun, monkeypatch)
    for file in ("head.safetensors", "state/last.safetensors", "metrics.jsonl"):
        (run / file).unlink()
    assert train(store, run, later, monkeypatch, resume=True) == whole
