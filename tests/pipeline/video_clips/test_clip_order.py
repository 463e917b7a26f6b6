"""The order of an epoch: everything once over ranks, the same whatever cuts it into parts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.errors import UserError
from featstore.segments import segment_ranges
from pipeline.tars.dataset import Dataset, load_dataset
from pipeline.tars.reading import DamagedTar, read_video
from pipeline.video_clips.order import (
    augmentation_rng,
    epoch_order,
    list_digest,
    listed_clips,
    rank_parts,
    steps_per_epoch,
    training_frames,
)
from tests.support.processes.command_line import done
from tests.support.worlds.media import make_video
from tests.support.worlds.tiny_world import make_clip

# The number of clips of each of up to 12 tars.
TARS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


def tars_of(sizes: list[int]) -> np.ndarray:
    """The tar of every position; positions of a tar do not follow each other."""
    tars = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(5).permutation(tars)


@given(
    sizes=TARS,
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 40),
    window=st.integers(1, 14),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 5),
    start=st.integers(0, 200),
)
@settings(max_examples=200, deadline=None)
def test_every_clip_is_seen_once_over_the_ranks(
    sizes: list[int],
    seed: int,
    epoch: int,
    window: int,
    batch_size: int,
    world_size: int,
    start: int,
) -> None:
    order = epoch_order(tars_of(sizes), seed, epoch, window)
    n = len(order)
    steps = steps_per_epoch(n, batch_size, world_size)
    parts = [list(rank_parts(order, batch_size, r, world_size)) for r in range(world_size)]
    assert [len(rank) for rank in parts] == [steps] * world_size
    assert sorted(np.concatenate([p for rank in parts for p in rank]).tolist()) == list(range(n))
    for number, batch in enumerate(zip(*parts, strict=True)):
        # the same global batch as that of one process, dealt out in turn
        size = batch_size * world_size
        together = order[number * size : (number + 1) * size]
        assert all(np.array_equal(batch[r], together[r::world_size]) for r in range(world_size))
        assert max(map(len, batch)) <= batch_size
        assert max(map(len, batch)) - min(map(len, batch)) <= 1
    start = min(start, steps)
    for rank in range(world_size):
        rest = list(rank_parts(order, batch_size, rank, world_size, start))
        assert len(rest) == steps - start
        assert all(map(np.array_equal, rest, parts[rank][start:]))


@given(sizes=TARS, seed=st.integers(0, 2**32), window=st.integers(1, 14))
@settings(max_examples=80, deadline=None)
def test_the_clips_of_a_few_tars_are_read_together(
    sizes: list[int], seed: int, window: int
) -> None:
    tars = tars_of(sizes)
    in_order = tars[epoch_order(tars, seed, 3, window)].tolist()
    present = len(set(in_order))
    blocks: list[set[int]] = []
    for tar in in_order:
        if not blocks or (tar not in blocks[-1] and len(blocks[-1]) == window):
            blocks.append(set())
        blocks[-1].add(tar)
    assert len(blocks) == -(-present // window)  # no tar comes back after its block
    assert sum(map(len, blocks)) == present


def test_order_depends_on_seed_and_epoch_and_mixes() -> None:
    tars = np.repeat(np.arange(40), 50)
    order = epoch_order(tars, 1, 0)
    assert np.array_equal(order, epoch_order(tars, 1, 0))
    others = [epoch_order(tars, 2, 0), epoch_order(tars, 1, 1), epoch_order(tars, 0, 1)]
    assert all(np.mean(order == other) < 0.02 for other in others)
    # positions within the first block of 8 tars are spread evenly over it
    place = np.empty(2000, np.int64)
    for epoch in range(60):
        place[epoch_order(tars, 7, epoch)] = np.arange(2000)
        if epoch == 0:
            total = np.zeros(2000)
        total += place
    assert total.mean() / 60 == pytest.approx(999.5)
    assert np.abs(total / 60 - 999.5).max() < 400  # 5 standard deviations of the mean of 60


def test_frames_are_those_of_the_segments_and_differ_by_epoch_and_clip() -> None:
    lowest, highest = segment_ranges(250, 8)
    draws = np.array([training_frames(250, 8, 3, epoch, 17) for epoch in range(3000)])
    assert (draws >= lowest).all()
    assert (draws <= highest).all()
    # even over each segment, both ends included
    for segment, (low, high) in enumerate(zip(lowest, highest, strict=True)):
        counts = np.bincount(draws[:, segment] - low, minlength=high - low + 1)
        assert counts.min() > 0.55 * 3000 / len(counts)
    assert not np.array_equal(draws[0], training_frames(250, 8, 3, 0, 18))
    assert not np.array_equal(draws[0], training_frames(250, 8, 4, 0, 17))
    # the chance of frames and of augmentation are two streams, also where the words are zero
    first = np.random.default_rng([2, 0, 0, 0]).random()
    assert augmentation_rng(0, 0, 0).random() != first
    assert augmentation_rng(0, 1, 0).random() != augmentation_rng(1, 0, 0).random()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with a training and a validation split, and one video that cannot be packed."""
    root = tmp_path_factory.mktemp("packed")
    number = 0
    for split, count in (("train", 5), ("val", 2)):
        for name in ("jump", "run"):
            for i in range(count):
                make_clip(root / "videos" / split / name / f"{split}{i}.mp4", number)
                number += 1
    (root / "videos/train/run/empty.mp4").touch()
    done(
        *("pack", "--dataset", "clips", "--videos", root / "videos", "--root", root),
        *("--samples-per-shard", "3", "--max-failures", "1"),
    )
    return root / "datasets/clips"


@pytest.fixture
def damaged(packed: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(packed, tmp_path / "clips")


def tar_of(dataset: Dataset, split: str, number: int = 0) -> tuple[int, Path]:
    """A tar of a split: its number in `dataset.json`, and its path."""
    tars = [i for i, shard in enumerate(dataset.tars) if shard.split == split]
    return tars[number], dataset.tar_path(dataset.tars[tars[number]])


def test_listed_clips_are_those_of_the_split_in_the_order_of_keys(packed: Path) -> None:
    dataset = load_dataset(packed)
    clips = listed_clips(dataset, "train")
    assert [clip.key for clip in clips] == sorted(dataset.keys_by_split["train"])
    assert [clip.position for clip in clips] == list(range(11))
    by_key = {clip.key: clip for clip in clips}
    (failed,) = [clip for clip in clips if clip.reason]
    assert "empty" in failed.key
    assert failed.reason == "the file is empty (zero bytes)"
    assert dataset.class_names[failed.label] == "run"
    for key, clip in by_key.items():
        assert dataset.tars[clip.tar].split == "train"
        assert dataset.class_names[clip.label] == ("jump" if "jump" in key else "run")
        if not clip.reason:
            tar = dataset.tars[clip.tar]
            data = read_video(dataset, tar, clip.key, clip.offset, clip.size)
            assert data[4:8] == b"ftyp"
    everything = listed_clips(dataset, None)
    assert [clip.key for clip in everything] == sorted(
        {*dataset.keys_by_split["train"], *dataset.keys_by_split["val"]}
    )


@pytest.mark.parametrize("harm", ["gone", "short", "other bytes"])
def test_videos_of_a_damaged_tar_keep_their_places_and_get_a_reason(
    damaged: Path, harm: str
) -> None:
    dataset = load_dataset(damaged)
    before = listed_clips(dataset, "train")
    tar, path = tar_of(dataset, "train", 1)
    data = path.read_bytes()
    if harm == "gone":
        path.unlink()
    elif harm == "short":
        path.write_bytes(data[:-700])
    else:
        path.write_bytes(b"\xff" * 512 + data[512:])
    after = listed_clips(dataset, "train")
    assert [clip.key for clip in after] == [clip.key for clip in before]
    for was, now in zip(before, after, strict=True):
        assert now.tar == was.tar
        if was.tar == tar and not was.reason:
            assert path.name in now.reason
            assert now.label == -1
        else:
            assert now == was
    assert list_digest(after) == list_digest(before)  # so the order is the same


def test_videos_of_several_damaged_tars_are_all_named(damaged: Path) -> None:
    dataset = load_dataset(damaged)
    before = listed_clips(dataset, None)
    gone = set()
    for split in ("train", "val"):
        tar, path = tar_of(dataset, split)
        gone.add(tar)
        path.unlink()
    after = listed_clips(dataset, None)
    assert [clip.key for clip in after] == [clip.key for clip in before]
    lost = {clip.key for clip in before if clip.tar in gone and not clip.reason}
    assert {clip.key for clip in after if "is missing" in clip.reason} == lost


def test_videos_without_a_split_cannot_be_named_when_their_tar_is_gone(tmp_path: Path) -> None:
    for number in range(4):
        make_clip(tmp_path / f"videos/{'ab'[number % 2]}/{number}.mp4", number)
    done("pack", "--dataset", "plain", "--videos", tmp_path / "videos", "--root", tmp_path)
    dataset = load_dataset(tmp_path / "datasets/plain")
    assert len(listed_clips(dataset, None)) == 4
    dataset.tar_path(dataset.tars[0]).unlink()
    with pytest.raises(DamagedTar, match=r"is missing.*4 videos without a split"):
        listed_clips(dataset, None)


def test_a_split_that_is_unknown_or_empty_is_refused(packed: Path) -> None:
    dataset = load_dataset(packed)
    with pytest.raises(UserError, match=r"split 'test' does not exist.*'train', 'val'"):
        listed_clips(dataset, "test")


def test_overlapping_splits_share_tars(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    for number in range(6):
        make_video(videos / f"v{number}.mp4", frames=8, first=number, width=72, height=48)
    for name, numbers in (("train1", (0, 1, 2, 3)), ("train2", (2, 3, 4, 5))):
        rows = "".join(f"v{n}.mp4 {n % 2}\n" for n in numbers)
        (tmp_path / "lists").mkdir(exist_ok=True)
        (tmp_path / f"lists/{name}.txt").write_text(rows)
    done(
        *("pack", "--dataset", "two", "--videos", videos, "--annotations", tmp_path / "lists"),
        *("--samples-per-shard", "2", "--root", tmp_path),
    )
    dataset = load_dataset(tmp_path / "datasets/two")
    for split in dataset.split_names:
        clips = listed_clips(dataset, split)
        assert [clip.key for clip in clips] == sorted(dataset.keys_by_split[split])
        assert len(clips) == 4
    before = listed_clips(dataset, "train2")
    gone = before[0].tar
    dataset.tar_path(dataset.tars[gone]).unlink()
    after = listed_clips(dataset, "train2")
    assert [(clip.key, clip.tar) for clip in after] == [(clip.key, clip.tar) for clip in before]
    assert [bool(clip.reason) for clip in after] == [clip.tar == gone for clip in before]


def test_the_order_needs_no_torch() -> None:
    code = "import sys, pipeline.video_clips.order; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
