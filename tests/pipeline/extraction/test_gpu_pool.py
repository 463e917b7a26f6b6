"""The GPU pool on the CPU, with its decode and encode stages replaced: threads, batches, failures.

Threads meet through events, never by waiting a while; `PATIENCE` only ends a test that would hang.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featstore import open_store
from featstore.errors import WorkError
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.decoding import chosen_frames
from pipeline.decoding.contract import DecodeError
from pipeline.decoding.nvdec import batcher as nvdec_batcher
from pipeline.decoding.nvdec.batcher import GIVE_UP_AFTER, Buckets
from pipeline.decoding.nvdec.graphs import Clip, DaliPixels, import_problem
from pipeline.decoding.nvdec.rule import nvdec_codecs, survey_video
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.extraction import cpu_pool
from pipeline.extraction.cpu_pool import EncodedVideo, encode_video
from pipeline.extraction.gpu_pool import DECODED_AHEAD, DaliVideoPool
from pipeline.extraction.request import ExtractionRequest
from pipeline.extraction.run import extract
from pipeline.preprocessing import Preprocessing
from pipeline.sampling import parse_sampling
from pipeline.tars.packing import pack
from pipeline.tars.reading import DamagedTar
from tests.support.processes.gpu_pool_on_cpu import gpu_pool_on_cpu
from tests.support.worlds.frames import frames_of
from tests.support.worlds.media import make_video
from tests.support.worlds.tiny_world import make_clips, make_encoder

PATIENCE = 60
PREPROCESSING = Preprocessing(size=(16, 16))
Result = Future[EncodedVideo | str]


@pytest.fixture(autouse=True)
def no_sizes_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvdec_batcher, "SHOWN_SIZES", {})


class Tower:
    """Stands in for an encoder: every picture's features depend on that picture alone."""

    device = torch.device("cpu")
    preprocessing = PREPROCESSING
    precision = "fp32"
    dim = 8
    frames_together = 1

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self.before = before

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        self.before()
        rows = torch.stack([picture.double().flatten()[::97].cumsum(0)[-8:] for picture in pixels])
        return rows.float()


def decode_clips(clips: Sequence[Clip], crops: int = 1) -> list[torch.Tensor]:
    """A decode stage that gives what the CPU path gives."""
    decoder = PyAVDecoder()
    return [
        PREPROCESSING.crops(frames_of(decoder, clip.data.tobytes(), clip.frames), crops)
        for clip in clips
    ]


class PoolMaker:
    """Makes pools and closes them when the test is over."""

    def __init__(self) -> None:
        self.pools: list[DaliVideoPool] = []

    def __call__(
        self,
        pixels: Callable[[Sequence[Clip]], list[torch.Tensor]] | None = None,
        tower: Tower | None = None,
        sampling: str = "uniform:4",
        crops: int = 1,
        workers: int = 2,
        **extra: Any,
    ) -> DaliVideoPool:
        pool = gpu_pool_on_cpu(
            pixels or partial(decode_clips, crops=crops),
            PyAVDecoder(),
            cast(Encoder, tower or Tower()),
            parse_sampling(sampling),
            crops,
            workers,
            **extra,
        )
        self.pools.append(pool)
        return pool


@pytest.fixture
def make_pool() -> Iterator[PoolMaker]:
    maker = PoolMaker()
    yield maker
    for pool in maker.pools:
        pool.close()


def submit(pool: DaliVideoPool, *videos: bytes) -> list[Result]:
    return [pool.submit(partial(bytes, video)) for video in videos]


def results(futures: Sequence[Result]) -> list[EncodedVideo | str]:
    return [future.result(PATIENCE) for future in futures]


def on_cpu(video: bytes, sampling: str = "uniform:4", crops: int = 1) -> EncodedVideo:
    tower = cast(Encoder, Tower())
    return encode_video(video, PyAVDecoder(), tower, parse_sampling(sampling), crops)


def assert_same(got: EncodedVideo | str, want: EncodedVideo) -> None:
    assert isinstance(got, EncodedVideo), got
    looked = got.info.checked_packets  # NVDEC looks for no damage
    assert got.info == replace(want.info, checked_packets=looked)
    assert looked in (0, want.info.checked_packets)
    np.testing.assert_array_equal(got.frame_index, want.frame_index)
    np.testing.assert_allclose(got.pts, want.pts)
    assert got.features.shape == want.features.shape
    np.testing.assert_allclose(got.features, want.features, rtol=1e-5, atol=1e-4)


SMALL = [make_video(frames=12 + n, first=50 * n) for n in range(6)]


@pytest.mark.parametrize(
    ("sampling", "crops"), [("uniform:4", 1), ("clips:4x2", 3), ("uniform:16", 1)]
)
def test_results_are_those_of_the_cpu_path(make_pool: PoolMaker, sampling: str, crops: int) -> None:
    videos = [
        *SMALL,
        make_video(frames=3, first=400),  # fewer frames than asked for
        make_video(frames=20, width=128, height=96),
        make_video(frames=20, width=64, height=96),
        make_video(frames=20, rotation=90),
        make_video(frames=20, container="avi", codec="mpeg4"),
        make_video(frames=20, width=98, height=64),  # shares its coded size with no other
        make_video(frames=20, width=100, height=64),
    ]
    pool = make_pool(sampling=sampling, crops=crops, batch_videos=4)
    for got, video in zip(results(submit(pool, *videos)), videos, strict=True):
        assert_same(got, on_cpu(video, sampling, crops))
    pool.close()
    report = pool._batcher.report()
    assert report[0] == "10 videos decoded by NVDEC"
    assert set(report[1:]) == {
        "1 videos decoded by pyav (turned or mirrored by its metadata)",
        "1 videos decoded by pyav (container other than mp4, mkv or webm)",
        "1 videos decoded by pyav (another picture size shares its coded size)",
    }


def test_a_file_that_is_too_large_for_memory_is_streamed(
    make_pool: PoolMaker, tmp_path: Path
) -> None:
    (tmp_path / "large.mp4").write_bytes(SMALL[0])
    pool = make_pool()
    (streamed,) = results([pool.submit(lambda: tmp_path / "large.mp4")])
    assert_same(streamed, on_cpu(SMALL[0]))
    pool.close()
    assert "1 videos decoded by pyav (read as a stream)" in pool._batcher.report()


@pytest.mark.parametrize("data", [b"", b"words " * 200, SMALL[0][: len(SMALL[0]) // 2]])
def test_a_file_that_cannot_be_read_gets_pyavs_reason(make_pool: PoolMaker, data: bytes) -> None:
    with pytest.raises(DecodeError) as error:
        on_cpu(data)
    futures = submit(make_pool(), SMALL[0], data, SMALL[1])
    assert results(futures)[1] == error.value.reason
    assert_same(results(futures)[2], on_cpu(SMALL[1]))


def test_frames_that_would_become_too_large_fail_on_either_path(
    make_pool: PoolMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chosen_frames, "MAX_RESIZED_PIXELS", 16 * 20)
    videos = [SMALL[0], make_video(frames=12, rotation=90), make_video(width=64, height=64)]
    large, turned, square = results(submit(make_pool(), *videos))
    limit = "more than the limit of 320 pixels"
    assert large == f"frames of 96x64 pixels would be resized to 24x16, {limit}"
    assert turned == f"frames of 64x96 pixels would be resized to 16x24, {limit}"
    assert_same(square, on_cpu(videos[2]))


def test_what_reading_raises_the_future_raises(make_pool: PoolMaker) -> None:
    def read() -> bytes:
        raise DamagedTar("clips-000001.tar ends early")

    pool = make_pool()
    damaged, sound = pool.submit(read), pool.submit(lambda: SMALL[0])
    with pytest.raises(DamagedTar, match="ends early"):
        damaged.result(PATIENCE)
    assert_same(sound.result(PATIENCE), on_cpu(SMALL[0]))


def test_decoding_and_encoding_overlap(make_pool: PoolMaker) -> None:
    encoding, decoding_more = threading.Event(), threading.Event()
    calls = []

    def decode(clips: Sequence[Clip]) -> list[torch.Tensor]:
        calls.append(len(clips))
        if len(calls) == 2:
            # Begins while the first batch is being encoded, and keeps that one waiting.
            assert encoding.wait(PATIENCE)
            decoding_more.set()
        return decode_clips(clips)

    def before_encoding() -> None:
        if not encoding.is_set():
            encoding.set()
            assert decoding_more.wait(PATIENCE), "nothing was decoded while a batch was encoded"

    pool = make_pool(decode, Tower(before_encoding), batch_videos=2)
    futures = submit(pool, *SMALL[:4])
    for got, video in zip(results(futures), SMALL, strict=False):
        assert_same(got, on_cpu(video))
    assert calls == [2, 2]


def test_reading_goes_on_while_a_batch_is_decoded(make_pool: PoolMaker) -> None:
    decoding, read_more = threading.Event(), threading.Event()

    def decode(clips: Sequence[Clip]) -> list[torch.Tensor]:
        decoding.set()
        assert read_more.wait(PATIENCE), "nothing was read while a batch was decoded"
        return decode_clips(clips)

    def read() -> bytes:
        assert decoding.wait(PATIENCE)
        read_more.set()
        return SMALL[1]

    pool = make_pool(decode, batch_videos=1)
    assert len(results([*submit(pool, SMALL[0]), pool.submit(read)])) == 2


def test_no_more_is_decoded_than_the_encoder_can_take(make_pool: PoolMaker) -> None:
    decoded, encoded, most = 0, 0, 0
    ahead = threading.Event()

    def decode(clips: Sequence[Clip]) -> list[torch.Tensor]:
        nonlocal decoded, most
        decoded += 1
        most = max(most, decoded - encoded)
        if decoded == DECODED_AHEAD + 1:
            ahead.set()
        return decode_clips(clips)

    def before_encoding() -> None:
        nonlocal encoded
        # Not before as much is decoded ahead as may be.
        assert ahead.wait(PATIENCE)
        encoded += 1

    pool = make_pool(decode, Tower(before_encoding), batch_videos=1)
    results(submit(pool, *SMALL, *SMALL))
    assert (decoded, encoded) == (12, 12)
    # What waits, what the encoder has just taken, and what is being decoded.
    assert most <= DECODED_AHEAD + 2


def test_a_full_window_of_different_sizes_is_finished(make_pool: PoolMaker) -> None:
    # No batch ever fills: each is decoded because nothing else can come before results go out.
    videos = [make_video(frames=6, width=64 + 16 * n, height=64) for n in range(5)]
    pool = make_pool(batch_videos=2)
    assert pool.window == 12
    waiting: set[Result] = set()
    done = 0
    for number in range(40):
        while len(waiting) == pool.window:
            finished, waiting = wait(waiting, PATIENCE, return_when="FIRST_COMPLETED")
            assert finished, "a full window is stuck"
            done += len(finished)
        waiting.add(pool.submit(partial(bytes, videos[number % 5])))
    finished, rest = wait(waiting, PATIENCE)
    assert not rest
    assert done + len(finished) == 40


def test_results_come_in_any_order(make_pool: PoolMaker) -> None:
    held = threading.Event()

    def read_late() -> bytes:
        assert held.wait(PATIENCE)
        return SMALL[0]

    pool = make_pool(batch_videos=1)
    first, second = pool.submit(read_late), pool.submit(lambda: SMALL[1])
    assert_same(second.result(PATIENCE), on_cpu(SMALL[1]))
    assert not first.done()
    held.set()
    assert_same(first.result(PATIENCE), on_cpu(SMALL[0]))


class Faulty:
    """A decode stage that fails as `fault` says; counts its calls."""

    def __init__(self, fault: Callable[[Sequence[Clip]], bool], how: str = "raises") -> None:
        self.fault, self.how = fault, how
        self.calls: list[int] = []

    def __call__(self, clips: Sequence[Clip]) -> list[torch.Tensor]:
        self.calls.append(len(clips))
        if not self.fault(clips):
            return decode_clips(clips)
        if self.how == "raises":
            raise RuntimeError("Critical error in pipeline:\nmemory file")
        pixels = decode_clips(clips)
        if self.how == "too few videos":
            return pixels[1:]
        if self.how == "too few frames":
            return [pixels[0][:, 1:], *pixels[1:]]
        return [pixels[0][..., 1:], *pixels[1:]]


HOW = ["raises", "too few videos", "too few frames", "too small"]


def is_second(clip: Clip) -> bool:
    return clip.data.tobytes() == SMALL[1]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("fault", "by_pyav"),
    [
        (lambda clips: len(clips) > 1, 0),
        (lambda clips: any(map(is_second, clips)), 1),
        (lambda clips: True, 4),
    ],
    ids=["batches", "one video", "always"],
)
def test_a_failing_batch_is_taken_apart_and_then_goes_to_pyav(
    make_pool: PoolMaker, fault: Callable[[Sequence[Clip]], bool], by_pyav: int, how: str
) -> None:
    decode = Faulty(fault, how)
    pool = make_pool(decode, batch_videos=4)
    for got, video in zip(results(submit(pool, *SMALL[:4])), SMALL, strict=False):
        assert_same(got, on_cpu(video))
    assert decode.calls == [4, 1, 1, 1, 1]
    pool.close()
    lines = [f"{4 - by_pyav} videos decoded by NVDEC"] if by_pyav < 4 else []
    lines += [f"{by_pyav} videos decoded by pyav (NVDEC failed)"] if by_pyav else []
    assert pool._batcher.report() == lines


def test_a_video_that_fails_everywhere_keeps_pyavs_reason(make_pool: PoolMaker) -> None:
    # A packet table that is whole, and frames that are not: only decoding tells.
    damaged = bytearray(make_video(frames=30, options={"crf": "1"}))
    start = damaged.index(b"mdat") + 2000
    damaged[start : start + 3000] = bytes(range(250)) * 12
    with pytest.raises(DecodeError) as error:
        on_cpu(bytes(damaged))
    pool = make_pool(Faulty(lambda clips: True), batch_videos=2)
    got = results(submit(pool, bytes(damaged), SMALL[0]))
    assert got[0] == error.value.reason
    assert_same(got[1], on_cpu(SMALL[0]))


def test_after_several_fruitless_batches_pyav_does_the_rest(
    make_pool: PoolMaker, caplog: pytest.LogCaptureFixture
) -> None:
    decode = Faulty(lambda clips: True)
    pool = make_pool(decode, batch_videos=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            for got, video in zip(results(submit(pool, *SMALL)), SMALL, strict=True):
                assert_same(got, on_cpu(video))
    assert len(decode.calls) == GIVE_UP_AFTER
    assert [r.message for r in caplog.records] == [
        "the GPU's decoder failed on 3 batches in a row: PyAV decodes the rest"
    ]


def test_an_encoder_that_fails_fails_its_batch_only(make_pool: PoolMaker) -> None:
    calls = 0

    def once() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("out of memory")

    pool = make_pool(tower=Tower(once), batch_videos=2)
    first = submit(pool, *SMALL[:2])
    for future in first:
        with pytest.raises(RuntimeError, match="out of memory"):
            future.result(PATIENCE)
    assert_same(results(submit(pool, SMALL[2]))[0], on_cpu(SMALL[2]))


@pytest.mark.parametrize("method", ["_decode", "_next_decoded", "_finish"])
def test_a_thread_that_dies_takes_every_future_with_it(
    make_pool: PoolMaker, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def die(*args: object, **options: object) -> None:
        raise MemoryError("no memory for a list")

    monkeypatch.setattr(DaliVideoPool, method, die)
    pool = make_pool()
    if method == "_next_decoded":  # dies at once
        with pool._changed:
            assert pool._changed.wait_for(lambda: pool._broken is not None, PATIENCE)
        futures = submit(pool, SMALL[0])
    else:
        futures = submit(pool, *SMALL)
    for future in futures:
        with pytest.raises(WorkError, match=r"no memory for a list.*--decoder pyav"):
            future.result(PATIENCE)
    with pytest.raises(WorkError, match="what is done is kept"):
        pool.submit(lambda: SMALL[0]).result(PATIENCE)


@pytest.mark.parametrize("stage", ["reading", "decoding", "encoding"])
def test_closing_in_the_middle_leaves_no_future_open(make_pool: PoolMaker, stage: str) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def hold(name: str) -> None:
        if name == stage:
            reached.set()
            assert go_on.wait(PATIENCE)

    def decode(clips: Sequence[Clip]) -> list[torch.Tensor]:
        hold("decoding")
        return decode_clips(clips)

    def read(video: bytes) -> bytes:
        hold("reading")
        return video

    pool = make_pool(decode, Tower(lambda: hold("encoding")), batch_videos=2)
    turned = make_video(frames=8, rotation=90)  # for PyAV
    futures = [pool.submit(partial(read, video)) for video in [*SMALL, turned] * 3]
    assert reached.wait(PATIENCE)
    closing = threading.Thread(target=pool.close)
    closing.start()
    with pool._changed:
        assert pool._changed.wait_for(lambda: pool._stopping, PATIENCE)
    go_on.set()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert all(future.done() for future in futures)
    assert sum(future.cancelled() for future in futures) > 0
    assert not any(thread.is_alive() for thread in pool._threads)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(lambda: SMALL[0])


def test_a_future_may_be_cancelled_by_who_asked(make_pool: PoolMaker) -> None:
    held = threading.Event()

    def decode(clips: Sequence[Clip]) -> list[torch.Tensor]:
        assert held.wait(PATIENCE)
        return decode_clips(clips)

    pool = make_pool(decode, batch_videos=1)
    unwanted, wanted = submit(pool, *SMALL[:2])
    assert unwanted.cancel()
    held.set()
    assert_same(wanted.result(PATIENCE), on_cpu(SMALL[1]))


def test_too_large_a_clip_goes_to_pyav(
    make_pool: PoolMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvdec_batcher, "BATCH_BYTES", 4 * 3 * (96 * 64 + 16 * 16 * 4))
    pool = make_pool()
    large = make_video(frames=8, width=128, height=64, options={"sc_threshold": "0"})
    for got, video in zip(results(submit(pool, SMALL[0], large)), [SMALL[0], large], strict=True):
        assert_same(got, on_cpu(video))
    assert set(pool._batcher.report()) == {
        "1 videos decoded by NVDEC",
        "1 videos decoded by pyav (too many or too large frames for the GPU's memory)",
    }


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60)), max_size=60),
    st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_buckets_lose_nothing_and_mix_nothing(
    items: list[tuple[int, int]], more: list[bool]
) -> None:
    buckets: Buckets[tuple[int, int, int]] = Buckets(items=4, cost=100, open_keys=3)
    taken = []
    for number, (key, cost) in enumerate(items):
        buckets.add(key, (number, key, cost), cost)
        if more[number] and (batch := buckets.take(more_coming=True)):
            taken.append(batch)
    while batch := buckets.take(more_coming=False):
        taken.append(batch)
    assert sorted(item[0] for batch in taken for item in batch) == list(range(len(items)))
    for batch in taken:
        assert len(batch) <= 4
        assert len({key for _, key, _ in batch}) == 1
        assert sum(cost for *_, cost in batch) <= 100


def test_buckets_give_a_full_batch_first_then_the_fullest_when_nothing_comes() -> None:
    buckets: Buckets[int] = Buckets(items=2, cost=100, open_keys=2)
    for key, item in (("a", 1), ("b", 2), ("b", 3)):
        buckets.add(key, item, 1)
    assert buckets.take(more_coming=True) == [2, 3]
    assert buckets.take(more_coming=True) is None
    assert buckets.take(more_coming=False) == [1]
    # More sizes than may wait: one of them goes though others may come.
    for number, key in enumerate("abc"):
        buckets.add(key, number, 1)
    assert buckets.take(more_coming=True) == [0]
    assert buckets.take(more_coming=True) is None


def test_a_whole_extraction_through_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_clips(tmp_path / "videos")
    pack(tmp_path / "videos", "clips", tmp_path / "clips", samples_per_shard=4)
    encoder = load_encoder(make_encoder(tmp_path / "clip"), "fp32")
    request = ExtractionRequest(
        tmp_path / "clips", tmp_path / "cpu.zarr", "test", parse_sampling("uniform:4"), workers=2
    )
    extract(request, encoder=encoder)

    def decode(clips: Sequence[Clip]) -> list[torch.Tensor]:
        decoder = PyAVDecoder()
        return [
            encoder.preprocessing.crops(frames_of(decoder, clip.data.tobytes(), clip.frames))
            for clip in clips
        ]

    pools = []

    def gpu_pool_instead(*args: Any) -> DaliVideoPool:
        pools.append(gpu_pool_on_cpu(decode, *args[:5]))
        return pools[0]

    monkeypatch.setattr(cpu_pool, "ThreadVideoPool", gpu_pool_instead)
    extract(replace(request, store_path=tmp_path / "gpu.zarr"), encoder=encoder)
    assert pools[0]._batcher.report()[0].endswith("videos decoded by NVDEC")
    cpu, gpu = (open_store(tmp_path / f"{name}.zarr") for name in ("cpu", "gpu"))
    assert cpu.keys == gpu.keys
    np.testing.assert_array_equal(cpu.status, gpu.status)
    np.testing.assert_array_equal(cpu.num_frames, gpu.num_frames)
    # Batches of other sizes round differently; the rows hold float16.
    np.testing.assert_allclose(cpu.features(cpu.rows), gpu.features(gpu.rows), atol=0.02)


@pytest.mark.skipif(import_problem() is not None, reason="DALI cannot be used")
def test_the_pool_around_dalis_graph_with_a_codec_it_decodes_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(make_encoder(tmp_path / "clip"), "fp32")
    sampling = parse_sampling("clips:3x2")
    videos = [
        make_video(frames=20 + n, first=n, width=w, height=h, codec="libvpx-vp9", container="webm")
        for n, (w, h) in enumerate([(160, 128), (160, 128), (128, 192), (160, 128)])
    ]

    def decode(encoded: Any, frames: Any) -> Any:
        fn = importlib.import_module("nvidia.dali.fn")
        return fn.decoders.video(encoded, frames=frames, pad_mode="none")

    pixels = DaliPixels(
        encoder.preprocessing, 3, batch_size=2, threads=1, device_id=None, decode=decode
    )
    # Rubbish that calls itself sound fails its batch of two; the other one must not suffer.
    sound = survey_video(videos[0], nvdec_codecs((9, 0)))
    monkeypatch.setattr(
        nvdec_batcher,
        "survey_video",
        lambda data, codecs: sound if data == b"rubbish" else survey_video(data, codecs),
    )
    pool = gpu_pool_on_cpu(
        pixels,
        PyAVDecoder(),
        encoder,
        sampling,
        3,
        2,
        batch_videos=2,
    )
    got = results(submit(pool, *videos, b"rubbish"))
    pool.close()
    assert pool._batcher.report() == ["4 videos decoded by NVDEC"]
    assert got[4] == "not a readable video file (Invalid data found when processing input)"
    for video, result in zip(videos, got, strict=False):
        want = encode_video(video, PyAVDecoder(), encoder, sampling, 3)
        assert isinstance(result, EncodedVideo)
        np.testing.assert_array_equal(result.frame_index, want.frame_index)
        a, b = result.features.astype(np.float64), want.features.astype(np.float64)
        cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert cosines.min() > 0.999
