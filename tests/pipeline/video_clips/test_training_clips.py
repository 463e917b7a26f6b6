"""The stream of clips: the authors' draws, exact positions, failures left out, clean ends."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from featstore.errors import UserError
from pipeline.augmentation import (
    AugmentationDraw,
    augmented_pixels,
    resized_clip,
    resized_for_training,
)
from pipeline.decoding.contract import ChooseFrames, DecodeError, Frames, Source, VideoInfo
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from pipeline.sampling import validation_indices
from pipeline.tars.dataset import Dataset
from pipeline.video_clips.loader import BATCHES_AHEAD, ClipBatch, _ByteBudget
from pipeline.video_clips.mirroring import NEVER, label_swaps
from pipeline.video_clips.order import augmentation_rng, epoch_order, training_frames
from pipeline.video_clips.stream import ClipStream, EvaluationClips
from tests.support.worlds.damage import Recipe, damaged, encoded
from tests.support.worlds.frames import frames_of
from tests.support.worlds.media import make_video
from tests.support.worlds.tar_sets import write_dataset

PATIENCE = 60
SMALL = Preprocessing(size=(32, 32))


@cache
def video(number: int) -> bytes:
    return make_video(frames=12, first=20 * number, width=72, height=48, gop=5)


class Pictures:
    """A decoder of files whose bytes are a number: noise of their own, and what a test adds."""

    name = "pictures"

    def __init__(self, before: Callable[[int], None] = lambda number: None, side: int = 40) -> None:
        self.before, self.side = before, side

    @property
    def info(self) -> VideoInfo:
        return VideoInfo(12, 25.0, self.side, self.side, "none", 0.48, 12, 0)

    def decode_with_info(
        self, source: Source, choose: ChooseFrames
    ) -> tuple[VideoInfo, Frames, npt.NDArray[np.float64]]:
        assert isinstance(source, bytes)
        number = int(source)
        indices = np.asarray(choose(self.info))
        self.before(number)
        rng = np.random.default_rng(number)
        frames = rng.integers(0, 256, (12, self.side, self.side, 3), np.uint8)
        return self.info, frames[indices], indices / 25


def numbered(folder: Path, tars: int = 4, per_tar: int = 5, **extra: Any) -> Dataset:
    """A data set for `Pictures`."""
    numbers = np.arange(tars * per_tar).reshape(tars, per_tar).tolist()
    return write_dataset(
        folder, [{f"v{n:03d}": str(n).encode() for n in tar} for tar in numbers], **extra
    )


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return numbered(tmp_path_factory.mktemp("numbers") / "made")


def stream(dataset: Dataset, **changes: Any) -> ClipStream:
    options: dict[str, Any] = {
        "split": "train",
        "frames": 4,
        "preprocessing": SMALL,
        "batch_size": 3,
        "seed": 11,
        "decoder": Pictures(),
        "workers": 2,
    }
    return ClipStream(dataset, **{**options, **changes})


def assert_same(got: ClipBatch, want: ClipBatch) -> None:
    assert torch.equal(got.frames, want.frames)
    assert got.labels.tolist() == want.labels.tolist()
    assert got.positions.tolist() == want.positions.tolist()
    assert (got.keys, got.failed) == (want.keys, want.failed)


def clip_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("clips")]


def test_damaged_videos_fail_alike_for_one_process_and_two(tmp_path: Path) -> None:
    recipe = Recipe("libx264", "mp4", gop=250)
    data = encoded(recipe)
    videos = {
        f"v{n:02d}": damaged(data, "mp4", "junk", random.Random(n)) if n % 2 else data
        for n in range(12)
    }
    dataset = write_dataset(tmp_path / "made", [videos], frames=40)

    def failed(world_size: int, epoch: int) -> set[tuple[str, str]]:
        parts = [
            stream(dataset, decoder="auto", rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        return {each for part in parts for batch in part.epoch(epoch) for each in batch.failed}

    for epoch in range(3):
        alone = failed(1, epoch)
        assert alone
        assert alone == failed(2, epoch) == failed(3, epoch)


def test_a_clip_of_the_stream_is_decoder_and_draw_by_hand(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "made", [{f"v{n}": video(n) for n in range(3)}])
    seen = 0
    for epoch in (0, 3):
        for batch in stream(dataset, decoder="auto").epoch(epoch):
            for frames, key, position in zip(
                batch.frames, batch.keys, batch.positions.tolist(), strict=True
            ):
                data = video(int(key[1:]))
                chosen = training_frames(12, 4, 11, epoch, position)
                decoded = frames_of(PyAVDecoder(), data, chosen)
                resized = resized_clip(decoded, 32)
                height, width = resized.shape[-2:]
                assert (height, width) == (32, 48)
                rng = augmentation_rng(11, epoch, position)
                draw = AugmentationDraw.sample(width, height, 32, rng)
                pixels = augmented_pixels(resized, 32, draw)
                assert torch.equal(frames, SMALL.normalise(pixels))
                mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
                torch.testing.assert_close(frames, (pixels / 255 - mean) / std)
                seen += 1
    assert seen == 6


def test_a_mirrored_clip_has_the_label_of_its_mirror_image(numbers: Dataset) -> None:
    loading: dict[str, Any] = {"split": "train", "frames": 4, "preprocessing": SMALL, "seed": 3}
    loading |= {"batch_size": 4, "workers": 2, "decoder": Pictures()}
    classes = len(numbers.class_names)
    names = ["to the left", "to the right", "turn left", *(f"jump {n}" for n in range(classes))]
    swaps = label_swaps("names", names[: max(classes, 3)])
    assert swaps is not None
    assert label_swaps("plain", names) is None
    assert label_swaps("", names) is None

    def clips(epoch: int, **more: Any) -> dict[str, tuple[torch.Tensor, int, int]]:
        found = {}
        for batch in ClipStream(numbers, **loading, **more).epoch(epoch):
            rows = zip(batch.labels.tolist(), batch.positions.tolist(), strict=True)
            for key, pixels, (label, at) in zip(batch.keys, batch.frames, rows, strict=True):
                found[key] = (pixels, label, at)
        return found

    mirrored = 0
    for epoch in range(4):
        usual, swapped = clips(epoch), clips(epoch, mirrored=swaps)
        assert usual.keys() == swapped.keys()
        for key, (pixels, label, at) in usual.items():
            height = width = resized_for_training(32)[0]
            rng = augmentation_rng(3, epoch, at)
            flip = AugmentationDraw.sample(width, height, 32, rng).flip
            plain = pixels.flip(-1) if flip else pixels
            other, own = swapped[key], int(swaps[label])
            if torch.equal(other[0], plain):  # all draws but the flip are the usual ones
                assert other[1] == label
            else:
                mirrored += 1
                assert own != NEVER
                assert other[1] == own
                assert torch.equal(other[0], plain.flip(-1))
    assert 0 < mirrored < 4 * len(usual)
    for key, (pixels, label, _) in clips(0, augment=False, mirrored=swaps).items():
        bare = clips(0, augment=False)[key]
        assert torch.equal(pixels, bare[0])
        assert label == bare[1]


def test_no_more_frames_are_asked_for_than_needed(numbers: Dataset) -> None:
    asked = []

    class Counting(Pictures):
        def decode_with_info(self, source: Source, choose: ChooseFrames) -> Any:
            asked.append(len(np.asarray(choose(self.info))))
            return super().decode_with_info(source, choose)

    list(stream(numbers, decoder=Counting()).epoch(0))
    assert asked == [4] * 20


def test_boxes_of_the_stream_are_distributed_like_the_authors(golden: Path) -> None:
    theirs = np.load(golden / "preprocess_train.npz")["boxes_341x256"].astype(np.int64)
    draws = [
        AugmentationDraw.sample(341, 256, 224, augmentation_rng(5, epoch, position))
        for epoch in range(4)
        for position in range(3000)
    ]
    ours = np.array([[d.x, d.y, d.x + d.width, d.y + d.height] for d in draws if not d.fitted])
    sizes = [boxes[:, 2:] - boxes[:, :2] for boxes in (ours, theirs)]
    columns = [
        *zip(ours.T, theirs.T, strict=True),
        *zip(sizes[0].T, sizes[1].T, strict=True),
        tuple(size.prod(1) for size in sizes),
        tuple(size[:, 0] / size[:, 1] for size in sizes),
    ]
    for a, b in columns:
        points = np.union1d(a, b)
        cumulative = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
        # exceeded by chance once in 300 times for 12,000 and 3000 values
        assert np.abs(cumulative[0] - cumulative[1]).max() < 0.036
    assert np.mean([d.flip for d in draws]) == pytest.approx(0.5, abs=0.015)
    assert np.mean([d.grey for d in draws]) == pytest.approx(0.2, abs=0.012)


def test_batches_are_the_same_for_any_number_of_workers_and_any_start(numbers: Dataset) -> None:
    whole = list(stream(numbers, workers=1).epoch(2))
    assert [len(batch.keys) for batch in whole] == [3] * 6 + [2]
    assert sorted(key for batch in whole for key in batch.keys) == [f"v{n:03d}" for n in range(20)]
    assert all(batch.frames.shape == (len(batch.keys), 4, 3, 32, 32) for batch in whole)
    assert all(batch.frames.dtype == torch.float32 for batch in whole)
    for workers, start in ((1, 3), (2, 0), (5, 0), (3, 6), (2, 7)):
        rest = list(stream(numbers, workers=workers).epoch(2, start=start))
        assert len(rest) == 7 - start
        for got, want in zip(rest, whole[start:], strict=True):
            assert_same(got, want)
    assert not torch.equal(whole[0].frames, next(stream(numbers).epoch(3)).frames)
    assert not torch.equal(whole[0].frames, next(stream(numbers, seed=12).epoch(2)).frames)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_the_global_batch(numbers: Dataset, world_size: int) -> None:
    whole = list(stream(numbers, batch_size=2 * world_size).epoch(1))
    ranks = [
        stream(numbers, batch_size=2, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({rank.digest for rank in ranks}) == 1
    parts = [list(rank.epoch(1)) for rank in ranks]
    assert {len(part) for part in parts} == {ranks[0].steps_per_epoch} == {len(whole)}
    for step, want in enumerate(whole):
        for rank, part in enumerate(parts):
            assert part[step].keys == want.keys[rank::world_size]
            assert torch.equal(part[step].frames, want.frames[rank::world_size])
    if world_size == 7:  # the last global batch of 6 leaves the last rank nothing
        last = parts[6][-1]
        assert last.frames.shape == (0, 4, 3, 32, 32)


def test_bad_videos_leave_their_places_empty(tmp_path: Path) -> None:
    files = {f"v{n}": video(n) for n in range(5)}
    bad = {
        "half": video(5)[: len(video(5)) // 2],
        "nothing": b"",
        "words": b"words " * 300,
        "longer": make_video(frames=15, width=72, height=48),
    }
    tars: list[Mapping[str, bytes]] = [{**files, **bad}, {"v6": video(6)}, {"v7": video(7)}]
    dataset = write_dataset(tmp_path / "made", tars)
    healthy = stream(dataset, decoder="auto", batch_size=11)
    (before,) = healthy.epoch(0)
    reasons = dict(before.failed)
    assert reasons.keys() == bad.keys()
    assert reasons["longer"] == "15 frames are found, 12 were packed"
    assert reasons["nothing"] == "the file is empty"
    assert "not a readable video file" in reasons["half"]
    assert len(before.keys) == 7
    # The order, and what is good, are those of a data set in which nothing is bad.
    order = epoch_order(np.zeros(11, np.int64), 0, 0)
    assert len(order) == 11
    # Damage that comes later: a tar is gone, and a byte of another is turned over.
    dataset.tar_path(dataset.tars[1]).unlink()
    path = dataset.tar_path(dataset.tars[2])
    data = bytearray(path.read_bytes())
    data[data.index(video(7)) + 900] ^= 1
    path.write_bytes(data)
    for other in (healthy, stream(dataset, decoder="auto", batch_size=11)):
        (after,) = other.epoch(0)
        reasons = dict(after.failed)
        assert reasons.keys() == {*bad, "v6", "v7"}
        assert "made-000001.tar is missing" in reasons["v6"]
        assert "sha256 of 'v7' differs" in reasons["v7"]
        kept = [i for i, key in enumerate(before.keys) if key in after.keys]
        assert after.keys == tuple(before.keys[i] for i in kept)
        assert torch.equal(after.frames, before.frames[kept])
        assert after.labels.tolist() == before.labels[kept].tolist()


def test_a_decoder_that_breaks_fails_that_video_only(
    numbers: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    def before(number: int) -> None:
        if number == 7:
            raise RuntimeError("the library\nis broken")

    batches = list(stream(numbers, decoder=Pictures(before)).epoch(0))
    failed = [failure for batch in batches for failure in batch.failed]
    assert failed == [("v007", "RuntimeError: the library is broken")]
    assert sum(len(batch.keys) for batch in batches) == 19
    assert "unexpected error of the decoder" in caplog.text


def test_a_batch_of_nothing_but_failures_is_empty(numbers: Dataset) -> None:
    def before(number: int) -> None:
        raise RuntimeError("broken")

    batches = list(stream(numbers, decoder=Pictures(before)).epoch(0))
    assert {tuple(batch.frames.shape[1:]) for batch in batches} == {(4, 3, 32, 32)}
    assert {len(batch.frames) for batch in batches} == {0}
    assert sum(len(batch.failed) for batch in batches) == 20


def test_frames_that_would_become_too_large_fail_as_in_extraction(numbers: Dataset) -> None:
    class Strip(Pictures):
        @property
        def info(self) -> VideoInfo:
            return VideoInfo(12, 25.0, 1 << 13, 1, "none", 0.48, 12, 0)

    batch = next(stream(numbers, decoder=Strip(), preprocessing=Preprocessing()).epoch(0))
    assert "more than the limit of 4194304 pixels" in batch.failed[0][1]


def test_what_is_ahead_of_the_consumer_is_bounded(numbers: Dataset) -> None:
    begun = threading.Semaphore(0)
    count = [0]
    lock = threading.Lock()

    def before(number: int) -> None:
        with lock:
            count[0] += 1
        begun.release()

    with closing(stream(numbers, decoder=Pictures(before)).epoch(0)) as batches:
        for taken in range(1, 3):
            next(batches)
            ahead = (taken + BATCHES_AHEAD) * 3
            while count[0] < ahead:
                assert begun.acquire(timeout=PATIENCE)  # it does go that far ahead
            assert count[0] <= ahead
    assert count[0] <= (2 + BATCHES_AHEAD) * 3
    assert not clip_threads()


@pytest.mark.parametrize("how", ["break", "error", "to the end"])
def test_threads_end_with_the_epoch(numbers: Dataset, how: str) -> None:
    def consume() -> None:
        with closing(stream(numbers, workers=3).epoch(0)) as batches:
            for number, _ in enumerate(batches):
                assert clip_threads()
                if number == 1 and how == "break":
                    return
                if number == 1 and how == "error":
                    raise KeyError("of the consumer")

    threads = torch.get_num_threads()
    if how == "error":
        with pytest.raises(KeyError):
            consume()
    else:
        consume()
    assert not clip_threads()
    assert torch.get_num_threads() == threads


def test_an_error_that_is_no_videos_fault_reaches_the_consumer(
    numbers: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("pipeline.video_clips.stream.training_pixels", broken)
    with pytest.raises(MemoryError, match="no room"):
        list(stream(numbers).epoch(0))
    assert not clip_threads()


INTERRUPTED = """
import os, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs tests may ignore Ctrl-C
sys.path.insert(0, {root!r})
from pathlib import Path
from pipeline.tars.dataset import load_dataset
from tests.pipeline.video_clips.test_training_clips import Pictures, stream

hang = threading.Event()
def before(number):
    os.write(1, b"decoding\\n")  # whole, whichever thread writes
    hang.wait(1)
dataset = load_dataset(Path({folder!r}))
try:
    for batch in stream(dataset, decoder=Pictures(before), batch_size=20, workers=2).epoch(0):
        pass
except KeyboardInterrupt:
    left = [t.name for t in threading.enumerate() if t.name.startswith("clips")]
    print("interrupted", left, flush=True)
"""


def test_control_c_ends_the_threads(numbers: Dataset) -> None:
    root = Path(__file__).parents[3]
    script = INTERRUPTED.format(root=str(root), folder=str(numbers.folder))
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    # The third clip begins when the first is done: by then all threads are there, and all is asked.
    assert [child.stdout.readline() for _ in range(3)] == ["decoding\n"] * 3
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=PATIENCE)
    assert out.splitlines()[-1] == "interrupted []"
    assert out.count("decoding") < 10  # of 20


def test_without_augmentation_frames_are_drawn_and_cropped_as_in_evaluation(
    numbers: Dataset,
) -> None:
    oblong = Preprocessing(size=(32, 24))
    batch = next(stream(numbers, augment=False, preprocessing=oblong).epoch(0))
    for frames, key, position in zip(
        batch.frames, batch.keys, batch.positions.tolist(), strict=True
    ):
        pictures = np.random.default_rng(int(key[1:])).integers(0, 256, (12, 40, 40, 3), np.uint8)
        chosen = pictures[training_frames(12, 4, 11, 0, position)]
        assert torch.equal(frames, oblong.crops(chosen)[0])
    with pytest.raises(UserError, match="32x24 pixels: augmentation needs a square input"):
        stream(numbers, preprocessing=oblong)


def test_evaluation_gives_every_video_once(numbers: Dataset) -> None:
    seen: dict[int, str] = {}
    for rank in range(3):
        found = EvaluationClips(
            numbers,
            split="train",
            frames=4,
            preprocessing=SMALL,
            batch_size=4,
            decoder=Pictures(),
            workers=2,
            rank=rank,
            world_size=3,
        )
        positions = []
        for batch in found.batches():
            assert batch.frames.shape == (len(batch.keys), 4, 3, 32, 32)
            positions += batch.positions.tolist()
            seen.update(zip(batch.positions.tolist(), batch.keys, strict=True))
            for frames, key in zip(batch.frames, batch.keys, strict=True):
                rng = np.random.default_rng(int(key[1:]))
                pictures = rng.integers(0, 256, (12, 40, 40, 3), np.uint8)
                assert torch.equal(frames, SMALL.crops(pictures[validation_indices(12, 4)])[0])
        assert positions == list(range(rank, 20, 3))
    assert [seen[position] for position in range(20)] == [f"v{n:03d}" for n in range(20)]


def test_bytes_held_together_are_bounded() -> None:
    budget = _ByteBudget(100)
    order: list[str] = []
    entered = threading.Event()

    def second() -> None:
        with budget.holding(30):
            order.append("second")

    def larger_than_all() -> None:
        with budget.holding(1000):
            order.append("larger")

    with budget.holding(80):
        threads = [threading.Thread(target=second), threading.Thread(target=larger_than_all)]
        for thread in threads:
            thread.start()
        with budget.holding(20):
            order.append("fits")
            entered.set()
        order.append("first")
    for thread in threads:
        thread.join(PATIENCE)
    assert order[:2] == ["fits", "first"]
    assert sorted(order[2:]) == ["larger", "second"]
    with budget.holding(80):
        failed = []

        def waits() -> None:
            try:
                with budget.holding(30):
                    failed.append("held")
            except DecodeError:
                failed.append("stopped")

        thread = threading.Thread(target=waits)
        thread.start()
        budget.stop()
        thread.join(PATIENCE)
        assert failed == ["stopped"]


def test_wrong_arguments(numbers: Dataset) -> None:
    with pytest.raises(UserError, match="decoder 'mystery' is unknown"):
        stream(numbers, decoder="mystery")
    with pytest.raises(ValueError, match="step 8 of an epoch of 7 steps"):
        stream(numbers).epoch(0, start=8)
    with pytest.raises(UserError, match="split 'dev' does not exist"):
        stream(numbers, split="dev")
