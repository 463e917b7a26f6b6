"""What the GPU pool promises, on the CPU with its decode and encode stages replaced."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featstore import open_store
from pipeline.clip_encoder import load_encoder
from pipeline.decoding import chosen_frames
from pipeline.decoding.contract import DecodeError
from pipeline.decoding.nvdec import batcher as nvdec_batcher
from pipeline.decoding.nvdec.batcher import Buckets
from pipeline.decoding.nvdec.graphs import Clip, DaliPixels, import_problem
from pipeline.decoding.nvdec.rule import nvdec_codecs, survey_video
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.extraction import cpu_pool
from pipeline.extraction.cpu_pool import EncodedVideo, encode_video
from pipeline.extraction.gpu_pool import DECODED_AHEAD, DaliVideoPool
from pipeline.extraction.request import ExtractionRequest
from pipeline.extraction.run import extract
from pipeline.sampling import parse_sampling
from pipeline.tars.packing import pack
from pipeline.tars.reading import DamagedTar
from tests.support.processes.gpu_pool_on_cpu import (
    PATIENCE,
    SMALL,
    PoolMaker,
    Result,
    Tower,
    assert_same,
    decode_clips,
    gpu_pool_on_cpu,
    on_cpu,
    results,
    submit,
)
from tests.support.worlds.frames import frames_of
from tests.support.worlds.media import make_video
from tests.support.worlds.tiny_world import make_clips, make_encoder


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
        "1 video decoded by pyav (turned or mirrored by its metadata)",
        "1 video decoded by pyav (container other than mp4, mkv or webm)",
        "1 video decoded by pyav (another picture size shares its coded size)",
    }


def test_a_file_that_is_too_large_for_memory_is_streamed(
    make_pool: PoolMaker, tmp_path: Path
) -> None:
    (tmp_path / "large.mp4").write_bytes(SMALL[0])
    pool = make_pool()
    (streamed,) = results([pool.submit(lambda: tmp_path / "large.mp4")])
    assert_same(streamed, on_cpu(SMALL[0]))
    pool.close()
    assert "1 video decoded by pyav (read as a stream)" in pool._batcher.report()


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


def test_too_large_a_clip_goes_to_pyav(
    make_pool: PoolMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvdec_batcher, "BATCH_BYTES", 4 * 3 * (96 * 64 + 16 * 16 * 4))
    pool = make_pool()
    large = make_video(frames=8, width=128, height=64, options={"sc_threshold": "0"})
    for got, video in zip(results(submit(pool, SMALL[0], large)), [SMALL[0], large], strict=True):
        assert_same(got, on_cpu(video))
    assert set(pool._batcher.report()) == {
        "1 video decoded by NVDEC",
        "1 video decoded by pyav (too many or too large frames for the GPU's memory)",
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
