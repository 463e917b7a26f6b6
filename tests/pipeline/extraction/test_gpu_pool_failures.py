"""What the GPU pool does when a stage, a thread or a clip fails, on the CPU."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

from featstore.errors import WorkError
from pipeline.decoding.contract import DecodeError
from pipeline.decoding.nvdec.batcher import GIVE_UP_AFTER
from pipeline.decoding.nvdec.graphs import Clip
from pipeline.extraction.gpu_pool import DaliVideoPool
from tests.support.processes.gpu_pool_on_cpu import (
    PATIENCE,
    SMALL,
    PoolMaker,
    Tower,
    assert_same,
    decode_clips,
    on_cpu,
    results,
    submit,
)
from tests.support.worlds.media import make_video


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
    some = "1 video" if by_pyav == 1 else f"{by_pyav} videos"
    lines += [f"{some} decoded by pyav (NVDEC failed)"] if by_pyav else []
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
