"""Which videos a training is judged on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from featstore import Store, UserError
from featstore.workspace import Workspace
from heads.training.training_set import usable_rows
from heads.training.validation import CROSS, HELD_OUT, check_balance, choose_validation, dealt
from tests.support.stores.action_store import action_store

LARGE = 600


def toy(path: Path, **changes: object) -> Store:
    arguments = {"samples": 30, "classes": 5, "failed": (1, 2)} | changes
    return action_store(path, **arguments)  # type: ignore[arg-type]


def test_the_split_of_the_same_store_with_its_failures_counted(tmp_path: Path) -> None:
    store = toy(tmp_path / "toy.zarr")
    rows, found = choose_validation(store, store.split("train"), split="train")
    assert rows.tolist() == store.split("train").tolist()
    assert found is not None
    assert found.source == "val"
    assert (found.n_listed, found.n_failed, len(found.rows)) == (15, 1, 14)
    assert found.words == "14 videos of split val, 1 failed"
    _, base = choose_validation(store, store.split("train"), [0, 3], split="train")
    assert base is not None
    assert set(store.labels[store.positions(base.rows)]) == {0, 3}


def test_the_store_of_that_split_that_was_made_in_the_same_way(tmp_path: Path) -> None:
    features = Workspace(tmp_path).features_dir("toy")
    features.mkdir(parents=True)
    store = toy(features / "train.zarr", split_names=("train",), samples=LARGE)
    stores = Workspace(tmp_path).opened("toy")
    other = toy(features / "other.zarr", split_names=("val",), encoder_fingerprint="ffff")
    _, found = choose_validation(store, store.split("train"), split="train", stores=stores)
    assert found is not None
    assert found.source == HELD_OUT  # features of another encoder are none
    val = toy(features / "val.zarr", split_names=("val",), seed=3)
    stores = Workspace(tmp_path).opened("toy")
    rows, found = choose_validation(store, store.split("train"), split="train", stores=stores)
    assert found is not None
    # Both stores number their videos alike: those of the same key are trained on already.
    assert found.source == HELD_OUT
    rows, found = choose_validation(store, rows[:0], split="train", stores=stores)
    assert found is not None
    assert found.store.path == val.path != other.path


def test_a_test_split_is_never_touched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = toy(tmp_path / "toy.zarr", split_names=("train", "test"), samples=LARGE)
    trained = store.split("train")
    with caplog.at_level("INFO"):
        rows, found = choose_validation(store, trained, split="train", seed=1)
    assert found is not None
    assert (found.source, len(found.rows)) == (HELD_OUT, 60 - 0)
    assert "held out to choose the epoch" in caplog.text
    assert not set(found.rows) & set(store.split("test"))
    assert sorted([*found.rows, *rows]) == trained.tolist()
    counts = np.bincount(store.labels[store.positions(found.rows)])
    assert counts.max() - counts.min() <= 1
    again = choose_validation(store, trained[::-1], split="train", seed=1)[1]
    other = choose_validation(store, trained, split="train", seed=2)[1]
    assert again is not None
    assert other is not None
    assert again.rows.tolist() == found.rows.tolist() != other.rows.tolist()
    assert choose_validation(store, trained, split="train", hold_out=False)[1] is None


def test_failed_validation_videos_are_told_and_training_videos_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = toy(tmp_path / "toy.zarr", failed=range(1, 30, 2))
    _, found = choose_validation(store, store.split("train"), split="train")
    assert found is not None
    assert found.source == CROSS
    assert "split val has no videos to validate on: 15 of 15 failed in extraction" in caplog.text
    with pytest.raises(UserError, match="15 of 15 failed in extraction: name another split, or"):
        choose_validation(store, store.split("train"), split="train", asked="val")


def test_classes_without_validation_videos_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = toy(tmp_path / "toy.zarr", samples=16, classes=8, failed=())
    choose_validation(store, store.split("train"), [0, 1, 2], split="train")
    assert "2 of 3 classes without validation videos" in caplog.text
    assert "'jump', 'sit'" in caplog.text


def test_what_was_asked_for(tmp_path: Path) -> None:
    store = toy(tmp_path / "toy.zarr", split_names=("train", "val", "dev"))
    rows = store.split("train")
    stores = Workspace(tmp_path).opened("toy")
    assert choose_validation(store, rows, split="train", asked="none")[1] is None
    found = choose_validation(store, rows, split="train", asked="dev")[1]
    assert found is not None
    assert found.source == "dev"
    held = choose_validation(store, rows, split="train", asked=HELD_OUT, hold_out=False)[1]
    assert held is not None
    assert held.source == CROSS
    with pytest.raises(UserError, match="--validation train is the split that is trained on"):
        choose_validation(store, rows, split="train", asked="train")
    with pytest.raises(UserError, match="no features of data set 'toy'"):
        choose_validation(store, rows, split="train", asked="odd", stores=stores)


def test_few_videos_are_dealt_out_so_that_every_part_can_be_judged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = toy(tmp_path / "two.zarr", samples=11, classes=5, split_names=("train",), failed=())
    rows = store.split("train")  # three videos of the first class, two of each other
    parts = dealt(store, rows, 4, 0)
    labels = store.labels[store.positions(rows)]
    for label in range(5):
        assert len(set(parts[labels == label])) == (labels == label).sum()
    assert np.bincount(parts).tolist() == [3, 3, 3, 2]
    left = dealt(store, rows[1:6], 4, 0)
    assert (left >= 0).sum() == 0
    kept, found = choose_validation(store, rows[1:6], split="train")
    assert (kept.tolist(), found) == (rows[1:6].tolist(), None)
    assert "no class has a second video" in caplog.text
    assert len(usable_rows(store, rows)) == 11


def test_one_class_is_refused_and_an_outstanding_one_told(caplog: pytest.LogCaptureFixture) -> None:
    names = ("run", "sit", "wave")
    with pytest.raises(UserError, match=r"one class, 'sit' \(4 videos\).*add .* a second"):
        check_balance(names, np.array([1, 1, 1, 1]))
    check_balance(names, np.array([0, 1, 1, 2]))
    assert not caplog.text
    check_balance(names, np.array([0] * 200 + [1, 1, 2, 2]))
    assert "class 'run' has 200 training videos, the others about 2" in caplog.text
    assert "--class-sampling balanced" in caplog.text
    caplog.clear()
    check_balance(names, np.array([0] * 200 + [1, 1, 2, 2]), balanced=True)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
