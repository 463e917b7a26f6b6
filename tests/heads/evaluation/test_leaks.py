"""Training videos among the tested ones are found, named and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from featstore import Store, UserError
from heads import HeadConfig, TestSet, TrainConfig, train_head
from heads.evaluation.leaks import require_disjoint, require_no_leak, trained_videos
from heads.evaluation.protocols.choose import PROTOCOLS, build_test_sets
from heads.files.run_files import KEYS_FILE, read_training_keys, write_training_keys
from heads.training.train_head import training_rows
from tests.support.stores.action_store import action_store


def train(store: Store, run: Path, kind: str = "mote") -> None:
    train_head(
        *(store, run, HeadConfig(kind=kind, dim=16, layers=1, experts=2)),  # type: ignore[arg-type]
        TrainConfig(epochs=1, batch_size=16, frames=4),
        rows=training_rows(store, "train" if store.split_names else None),
        prompt_set="mote28",
        device="cpu",
    )


def everything(store: Store) -> list[TestSet]:
    return [TestSet("all", store.rows)]


def test_training_videos_are_recorded_and_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = action_store(tmp_path / "toy.zarr", failed=(2, 3))
    run = tmp_path / "run"
    train(store, run)
    assert read_training_keys(run) == {
        "toy": frozenset(f"clip{i:03d}" for i in range(0, 40, 2) if i != 2)
    }
    with pytest.raises(UserError) as refused:
        require_no_leak(store, everything(store), run)
    assert str(refused.value).startswith(
        "19 of 40 tested videos are in the training of run (clip000, clip004, clip006 and 16 more)"
    )
    assert "--allow-overlap" in str(refused.value)
    assert require_no_leak(store, everything(store), run, allow=True) == 19
    assert "19 of 40 tested videos" in caplog.text
    assert require_no_leak(store, [TestSet("val", store.split("val"))], run) == 0


def test_no_split_is_asked_for_where_there_is_none(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr", split_names=())
    train(store, tmp_path / "run")
    with pytest.raises(UserError) as refused:
        require_no_leak(store, everything(store), tmp_path / "run")
    assert "--split" not in str(refused.value)
    assert "test others, or pass --allow-overlap" in str(refused.value)
    with pytest.raises(UserError) as refused:
        build_test_sets(PROTOCOLS["closeset"], store)
    assert "sort them into train/ and val/" in str(refused.value)


def test_the_same_key_of_another_data_set_is_another_video(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr")
    write_training_keys(tmp_path, "other", store.keys)
    assert require_no_leak(store, everything(store), tmp_path) == 0


def test_keys_of_another_system_are_the_same_videos(tmp_path: Path) -> None:
    """macOS gives file names back with their accents apart, and keys are made of them."""
    store = action_store(tmp_path / "toy.zarr")
    keys = list(store.keys)
    keys[5:8] = ["caf%C3%A9%2Fa", "caf%C3%A9%2Fb", "cafe%2Fa"]
    vars(store)["keys"] = keys
    write_training_keys(tmp_path, "toy", ["cafe%CC%81%2Fa", "caf%C3%A9%2Fb"])
    assert require_no_leak(store, everything(store), tmp_path, allow=True) == 2


def test_clips_of_kinetics_are_the_same_in_every_data_set(tmp_path: Path) -> None:
    """Kinetics-400's validation videos are training videos of Kinetics-700."""
    store = action_store(tmp_path / "toy.zarr")
    keys = list(store.keys)
    keys[5:7] = ["val/running/-aB_cdefghi_000010_000020", "x/ABCDEFGHIJK_000001_000011"]
    vars(store)["keys"] = keys
    write_training_keys(tmp_path, "k700", ["train/jogging/-aB_cdefghi_000010_000019"])
    with pytest.raises(UserError, match="1 of 40 tested videos is in the training of"):
        require_no_leak(store, everything(store), tmp_path)


def test_a_run_without_keys_is_told_by_its_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = action_store(tmp_path / "toy.zarr")
    run = tmp_path / "run"
    train(store, run)
    (run / KEYS_FILE).unlink()
    found = trained_videos(store, store.rows, run)
    assert found is not None
    assert found.tolist() == store.split("train").tolist()
    other = action_store(tmp_path / "b.zarr", dataset_fingerprint="other")
    assert require_no_leak(other, everything(other), run) is None
    assert "is not known" in caplog.text


def test_a_mean_has_seen_nothing(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr")
    train(store, tmp_path / "run", "mean")
    assert require_no_leak(store, everything(store), tmp_path / "run") == 0


def test_videos_trained_on_and_tested_are_told_by_their_keys(tmp_path: Path) -> None:
    store = action_store(tmp_path / "toy.zarr", samples=48, failed=(0,))
    other = action_store(tmp_path / "other.zarr", samples=10, split_names=("test",), failed=())
    assert require_disjoint(store, store.rows[20:30], other, other.rows) == 0
    with pytest.raises(UserError, match=r"3 videos are trained on and tested \('clip007'"):
        require_disjoint(store, store.rows[7:30], other, other.rows)
    assert require_disjoint(store, store.rows[7:9], other, other.rows, allow=True) == 2
