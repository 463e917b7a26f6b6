"""A share of every class is held back to test on, the same one for the same videos."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import UserError
from pipeline.annotations.held_out import HELD_OUT, REST, held_out
from pipeline.annotations.listing import Listing, VideoRecord
from pipeline.tars.dataset import load_dataset
from tests.support.processes.command_line import done, refused
from tests.support.worlds.tiny_world import SHORT_TRAINING, make_clip, make_encoder


def listing(*sizes: int, first: int = 0) -> Listing:
    videos = [
        VideoRecord(f"{name}{n}", f"{name}/{n}.mp4", f"{name}/{n}.mp4", name, ())
        for name, size in zip("abcdef", sizes, strict=False)
        for n in range(first, first + size)
    ]
    return Listing(videos[1::2], list("abcdef"[: len(sizes)]), [], missing=videos[::2])


def splits(of: Listing) -> dict[str, tuple[str, ...]]:
    return {video.key: video.splits for video in (*of.records, *of.missing)}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.floats(0.01, 0.99))
def test_every_class_is_in_both_splits_by_its_share(sizes: list[int], share: float) -> None:
    found = splits(held_out(listing(*sizes), share))
    assert set(found.values()) <= {(HELD_OUT,), (REST,)}
    held = Counter(key[0] for key, where in found.items() if where == (HELD_OUT,))
    for name, size in zip("abcdef", sizes, strict=False):
        assert held[name] <= size - 1
        assert held[name] >= min(1, size - 1)
        assert abs(held[name] - share * size) <= 1
    turned = listing(*sizes)
    turned.records.reverse()
    assert splits(held_out(turned, share)) == found


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 9))
def test_what_was_packed_keeps_its_split(sizes: list[int], more: int) -> None:
    before = splits(held_out(listing(*sizes), 0.3))
    after = splits(held_out(listing(*(size + more for size in sizes)), 0.3, before))
    assert {key: after[key] for key in before} == before
    new = Counter(where for key, where in after.items() if key not in before)
    assert sum(new.values()) == more * len(sizes)
    assert (new[(HELD_OUT,)] > 0) == (more > 1)


@pytest.mark.parametrize("share", [0, 1, -0.2, 20, float("nan")])
def test_a_share_lies_between_none_and_all(share: float) -> None:
    with pytest.raises(UserError, match=r"is no share: give a number between 0 and 1"):
        held_out(listing(4), share)


def test_a_folder_of_classes_can_be_tested_on(tmp_path: Path) -> None:
    videos, root = tmp_path / "videos", tmp_path / "root"
    for number in range(12):
        make_clip(videos / "ab"[number % 2] / f"{number}.mp4", number)
    pack = ("pack", "--videos", videos, "--root", root, "--dataset")
    packed = done(*pack, "mine", "--hold-out", "0.2")
    assert "2 of 12 videos are held out as split test" in packed["notes"]
    place = ("--root", root)
    done("extract", "--dataset", "mine", "--encoder", make_encoder(tmp_path / "tiny"), *place)
    done("train-head", "--dataset", "mine", "--name", "h", *SHORT_TRAINING, *place)
    result = done("eval", "--closeset", "mine", "--head", "h", "--no-modulate", *place)
    assert [(r["split"], r["n_evaluated"]) for r in result["per_split"]] == [("test", 2)]
    # The same command again, and more videos later.
    assert done(*pack, "mine", "--hold-out", "0.2")["shards_written"] == 0
    held = load_dataset(root / "datasets/mine").keys_by_split["test"]
    for number in range(20, 26):
        make_clip(videos / "ab"[number % 2] / f"{number}.mp4", number)
    done(*pack, "mine", "--hold-out", "0.2", "--append")
    more = load_dataset(root / "datasets/mine").keys_by_split["test"]
    assert set(held) < set(more)
    assert len(more) == 4
    # Where it has no meaning.
    for where in ("train", "val"):
        shutil.copytree(videos, tmp_path / "sorted" / where)
    line = refused(
        *(2, "pack", "--videos", tmp_path / "sorted", "--dataset", "s", "--hold-out", "0.2"), *place
    )
    assert "for videos without splits, and these are in train, val: leave it out" in line
    line = refused(2, *pack, "u", "--unlabelled", "--hold-out", "0.2")
    assert "these videos have none" in line
    line = refused(2, "pack", "--tars", "x.tar", "--dataset", "t", "--hold-out", "0.2", *place)
    assert "--tars test=PATTERN" in line
    said = done(*pack, "plain")
    assert said["videos_packed"] == 18
