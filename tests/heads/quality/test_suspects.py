"""Labels that the other videos contradict come first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from heads.quality.part import Part
from heads.quality.suspects import find_suspects
from tests.support.stores.action_store import ACTIONS, action_store


@pytest.mark.parametrize("noise", [0.2, 0.5])
def test_swapped_labels_come_first(tmp_path: Path, noise: float) -> None:
    swapped = (5, 77, 150, 203, 311, 390)
    store = action_store(tmp_path / "s.zarr", samples=400, swapped=swapped, noise=noise)
    found = find_suspects(Part.of(store, "", tmp_path))
    first = [suspect.key for suspect in found.ranked[: len(swapped)]]
    assert sorted(first) == [f"clip{row:03d}" for row in swapped]
    assert len(found.ranked) == 399  # one video failed
    assert found.part.n_failed == 1
    true = store.class_names[5 % 8]
    assert next(s for s in found.ranked if s.key == "clip005").looks_like == true
    excluded = {s.key for s in found.ranked if s.exclude}
    assert excluded <= set(first)
    assert len(excluded) >= 5


def test_one_split_only(tmp_path: Path) -> None:
    splits = ("train", "val", "test")
    swapped = (9, 10, 12)
    store = action_store(
        tmp_path / "s.zarr", samples=240, swapped=swapped, noise=0.3, split_names=splits
    )
    found = find_suspects(Part.of(store, "train", tmp_path))
    assert {s.key for s in found.ranked[:2]} == {"clip009", "clip012"}
    assert {s.splits for s in found.ranked} == {("train",)}


def test_classes_of_one_video_are_not_judged(tmp_path: Path) -> None:
    store = action_store(tmp_path / "s.zarr", samples=17, failed=())
    found = find_suspects(Part.of(store, "", tmp_path))
    assert found.unjudged == 14  # seven classes have two videos, one has three
    assert all(s.score == 0 or s.class_name == store.class_names[0] for s in found.ranked)


def test_the_same_store_gives_the_same_ranking(tmp_path: Path) -> None:
    store = action_store(tmp_path / "s.zarr", samples=120, noise=3.0)
    part = Part.of(store, "", tmp_path)
    one, two = (find_suspects(part).save(tmp_path / name)["list"] for name in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_videos_of_several_classes_are_named_by_all_and_not_judged(tmp_path: Path) -> None:
    shown = np.random.default_rng(1).random((40, 5)) < 0.4
    store = action_store(tmp_path / "several.zarr", classes=5, several=shown, failed=())
    part = Part.of(store, "", tmp_path)
    assert part.class_names == [
        "; ".join(ACTIONS[label] for label in np.flatnonzero(row)) for row in shown
    ]
    found = find_suspects(part)
    assert "40 labels not judged (a video may show several classes)" in found.words
    assert not any(suspect.exclude for suspect in found.ranked)
    one = Part.of(action_store(tmp_path / "one.zarr", classes=5, failed=()), "", tmp_path)
    assert one.class_names == [ACTIONS[at % 5] for at in range(40)]
