"""NVDEC as a decoder for many threads, on the CPU with its decode stage replaced; not run on a GPU.

Threads meet through events; `PATIENCE` only ends a test that would hang.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.decoding.contract import DecodeError
from pipeline.decoding.nvdec import batcher
from pipeline.decoding.nvdec.batcher import GIVE_UP_AFTER
from pipeline.decoding.nvdec.decoder import NvdecDecoder
from pipeline.decoding.nvdec.graphs import Clip, DaliFrames, import_problem
from pipeline.decoding.nvdec.rule import nvdec_codecs
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.preprocessing import Preprocessing
from pipeline.video_clips import loader as clip_loader
from pipeline.video_clips.stream import ClipStream
from tests.support.worlds.frames import frames_of
from tests.support.worlds.media import make_video
from tests.support.worlds.tar_sets import write_dataset

PATIENCE = 60
HOPPER = nvdec_codecs((9, 0))
CPU = torch.device("cpu")
SMALL = [make_video(frames=12 + n, first=50 * n) for n in range(6)]
CHOSEN = np.array([1, 4, 4, 9])


class Stage:
    """A decode stage that gives what the CPU path gives; remembers its batches."""

    def __init__(self, before: Callable[[Sequence[Clip]], None] = lambda clips: None) -> None:
        self.before = before
        self.batches: list[int] = []

    def __call__(self, clips: Sequence[Clip]) -> list[npt.NDArray[np.uint8]]:
        self.batches.append(len(clips))
        self.before(clips)
        return [frames_of(PyAVDecoder(), clip.data.tobytes(), clip.frames) for clip in clips]


def decoder(source: Any, **extra: Any) -> NvdecDecoder:
    options = {"codecs": HOPPER, "batch_videos": 4, **extra}
    return NvdecDecoder(PyAVDecoder(), CPU, source=source, **options)


@pytest.fixture(autouse=True)
def no_sizes_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher, "SHOWN_SIZES", {})


def waiting(using: NvdecDecoder) -> int:
    buckets = using._batcher._buckets
    return sum(map(len, (*buckets._open.values(), *buckets._full)))


def decode_all(using: NvdecDecoder, videos: Sequence[bytes], threads: int = 8) -> list[Any]:
    def one(data: bytes) -> Any:
        try:
            return using.decode_with_info(data, lambda found: CHOSEN)
        except DecodeError as error:
            return error.reason

    with ThreadPoolExecutor(threads) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(one, v) for v in videos]]


def assert_pyavs(got: Any, video: bytes) -> None:
    info, frames, seconds = PyAVDecoder().decode_with_info(video, lambda found: CHOSEN)
    assert got[0] in (info, replace(info, checked_packets=0))  # NVDEC looks for no damage
    assert np.array_equal(got[1], frames)
    np.testing.assert_allclose(got[2], seconds)


def test_frames_are_pyavs_whoever_decodes() -> None:
    videos = [
        *SMALL,
        make_video(frames=20, width=128, height=96),
        make_video(frames=20, rotation=90),
        make_video(frames=20, container="avi", codec="mpeg4"),
    ]
    stage = Stage()
    using = decoder(stage)
    for got, video in zip(decode_all(using, videos), videos, strict=True):
        assert_pyavs(got, video)
    assert sum(stage.batches) == 7
    report = using._batcher.report()
    assert report[0] == "7 videos decoded by NVDEC"
    assert set(report[1:]) == {
        "1 video decoded by pyav (turned or mirrored by its metadata)",
        "1 video decoded by pyav (container other than mp4, mkv or webm)",
    }
    assert np.array_equal(frames_of(using, SMALL[0], [3]), frames_of(PyAVDecoder(), SMALL[0], [3]))


def test_clips_asked_for_meanwhile_become_one_batch() -> None:
    begun = threading.Event()
    met = []

    def before(clips: Sequence[Clip]) -> None:
        if len(stage.batches) == 1:  # the first batch lasts until the others wait
            begun.set()
            with using._changed:
                met.append(using._changed.wait_for(lambda: waiting(using) == 5, PATIENCE))

    stage = Stage(before)
    using = decoder(stage, batch_videos=5)
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(using.decode_with_info, SMALL[0], lambda found: CHOSEN)
        assert begun.wait(PATIENCE)
        rest = [pool.submit(using.decode_with_info, v, lambda found: CHOSEN) for v in SMALL[1:]]
        for future, video in zip([first, *rest], SMALL, strict=True):
            assert_pyavs(future.result(PATIENCE), video)
    assert met == [True], "the others do not wait"
    assert stage.batches == [1, 5]


def test_a_bad_clip_in_a_batch_goes_to_pyav_alone() -> None:
    def before(clips: Sequence[Clip]) -> None:
        if any(clip.data.tobytes() == SMALL[2] for clip in clips):
            raise RuntimeError("one of the clips")

    using = decoder(Stage(before))
    for got, video in zip(decode_all(using, SMALL), SMALL, strict=True):
        assert_pyavs(got, video)
    assert using._batcher.report() == [
        "5 videos decoded by NVDEC",
        "1 video decoded by pyav (NVDEC failed)",
    ]


def test_a_gpu_that_decodes_nothing_is_left_alone() -> None:
    def before(clips: Sequence[Clip]) -> None:
        raise RuntimeError("no device")

    stage = Stage(before)
    using = decoder(stage, batch_videos=1)
    for _ in range(3):
        for got, video in zip(decode_all(using, SMALL, 1), SMALL, strict=True):
            assert_pyavs(got, video)
    assert len(stage.batches) == GIVE_UP_AFTER
    assert "16 videos decoded by pyav (NVDEC failed again and again)" in using._batcher.report()


@pytest.mark.parametrize("wrong", ["shape", "type", "count"])
def test_frames_that_were_not_asked_for_are_not_taken(wrong: str) -> None:
    def source(clips: Sequence[Clip]) -> list[npt.NDArray[Any]]:
        frames = Stage()(clips)
        if wrong == "shape":
            return [f[:, 1:] for f in frames]
        return [f.astype(np.float32) for f in frames] if wrong == "type" else frames[1:]

    assert_pyavs(decode_all(decoder(source), SMALL[:1])[0], SMALL[0])


@pytest.mark.parametrize("data", [b"", b"words " * 200, SMALL[0][: len(SMALL[0]) // 2]])
def test_a_file_that_cannot_be_read_gets_pyavs_reason(data: bytes) -> None:
    with pytest.raises(DecodeError) as error:
        frames_of(PyAVDecoder(), data, CHOSEN)
    results = decode_all(decoder(Stage()), [SMALL[0], data, SMALL[1]])
    assert results[1] == error.value.reason
    assert_pyavs(results[2], SMALL[1])


def test_what_the_choice_raises_reaches_the_caller_and_stops_nobody() -> None:
    using = decoder(Stage())

    def refuse(found: object) -> npt.NDArray[np.int64]:
        raise DecodeError("too large")

    with pytest.raises(DecodeError, match="too large"):
        using.decode_with_info(SMALL[0], refuse)
    assert_pyavs(decode_all(using, SMALL[:1])[0], SMALL[0])


@pytest.mark.parametrize("room", [1, 1 << 30])
def test_the_stream_is_the_same_with_either_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    # With room for one clip's frames, clips that wait for a batch must not wait for more clips.
    monkeypatch.setattr(clip_loader, "FRAME_BYTES", room)
    videos = {f"v{n}": video for n, video in enumerate(SMALL)}
    lengths = {f"v{n}": 12 + n for n in range(6)}
    dataset = write_dataset(tmp_path / "made", [{**videos, "bad": b"words"}], {**lengths, "bad": 9})
    options: dict[str, Any] = {
        "split": "train",
        "frames": 4,
        "preprocessing": Preprocessing(size=(32, 32)),
        "batch_size": 3,
        "seed": 0,
        "workers": 2,
    }
    stage = Stage()
    nvdec = decoder(stage)
    on_gpu = ClipStream(dataset, decoder=nvdec, **options)
    on_cpu = ClipStream(dataset, decoder="pyav", **options)
    assert (on_gpu.decoder_name, on_cpu.decoder_name) == ("dali", "pyav")
    for got, want in zip(on_gpu.epoch(0), on_cpu.epoch(0), strict=True):
        assert torch.equal(got.frames, want.frames)
        assert (got.keys, got.failed) == (want.keys, want.failed)
    assert sum(stage.batches) == 6
    assert nvdec._batcher.report() == [
        "6 videos decoded by NVDEC",
        "1 video decoded by pyav (cannot be surveyed)",
    ]


@pytest.mark.skipif(import_problem() is not None, reason=f"DALI cannot be used: {import_problem()}")
def test_the_graph_gives_the_decoded_frames_and_works_on_after_an_error() -> None:
    def chosen_frames(encoded: Any, frames: Any) -> Any:
        fn = importlib.import_module("nvidia.dali.fn")
        return fn.sequence_rearrange(fn.reinterpret(encoded, layout="FHWC"), new_order=frames)

    graph = DaliFrames(batch_size=4, threads=1, device_id=None, decode=chosen_frames, rank=4)
    rng = np.random.default_rng(0)
    shapes = [(5, 24, 32, 3), (9, 50, 18, 3), (7, 24, 32, 3)]
    videos = [rng.integers(0, 256, shape, np.uint8) for shape in shapes]
    clips = [Clip(video, np.array([1, 3, 4]), *video.shape[1:3]) for video in videos]
    first = graph(clips)
    with pytest.raises(RuntimeError):
        graph([Clip(videos[0], np.array([99]), 24, 32)])
    second = graph(clips[:2])
    for got, video in zip([*first, *second], [*videos, *videos[:2]], strict=True):
        assert np.array_equal(got, video[[1, 3, 4]])  # the first ones too, after other runs
