"""The training keys of a run are kept when it goes on, and damage to them is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from featstore import Store, WorkError
from heads import HeadConfig, TrainConfig, train_head
from heads.files.run_files import KEYS_FILE, read_training_keys, write_training_keys
from tests.support.stores.action_store import action_store


def train(store: Store, run: Path) -> None:
    train_head(
        *(store, run, HeadConfig(dim=16, layers=1, experts=2)),
        TrainConfig(epochs=1, batch_size=16, frames=4),
        rows=store.split("train"),
        prompt_set="mote28",
        device="cpu",
    )


def test_keys_of_an_earlier_training_stay(tmp_path: Path) -> None:
    write_training_keys(tmp_path, "a", ["x", "y"])
    write_training_keys(tmp_path, "b", ["x"])
    write_training_keys(tmp_path, "a", ["z", "x"])
    known = read_training_keys(tmp_path)
    assert known == {"a": frozenset("xyz"), "b": frozenset("x")}


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}'])
def test_damaged_keys_are_said(tmp_path: Path, text: str) -> None:
    (tmp_path / KEYS_FILE).write_text(text)
    with pytest.raises(WorkError, match=r"training-keys\.json (is|holds) .*train again"):
        read_training_keys(tmp_path)


def test_resuming_keeps_the_same_keys(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr")
    train(store, tmp_path / "run")
    before = json.loads((tmp_path / "run" / KEYS_FILE).read_text())
    (tmp_path / "run" / "head.safetensors").unlink()
    train_head(
        *(store, tmp_path / "run", HeadConfig(dim=16, layers=1, experts=2)),
        TrainConfig(epochs=1, batch_size=16, frames=4),
        rows=np.flip(store.split("train")),
        prompt_set="mote28",
        resume=True,
        device="cpu",
    )
    assert json.loads((tmp_path / "run" / KEYS_FILE).read_text()) == before
