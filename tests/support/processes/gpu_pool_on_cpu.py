"""The GPU pool on a machine without a GPU: its decode and encode stages are replaced.

Threads meet through events, never by waiting a while; `PATIENCE` only ends a test that would hang.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, cast
from unittest import mock

import numpy as np
import torch

from pipeline.clip_encoder import Encoder
from pipeline.decoding.nvdec.batcher import BATCH_VIDEOS
from pipeline.decoding.nvdec.graphs import Clip
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.extraction import gpu_pool
from pipeline.extraction.cpu_pool import EncodedVideo, encode_video
from pipeline.extraction.gpu_pool import DaliVideoPool
from pipeline.preprocessing import Preprocessing
from pipeline.sampling import parse_sampling
from tests.support.worlds.frames import frames_of
from tests.support.worlds.media import make_video

PATIENCE = 60
PREPROCESSING = Preprocessing(size=(16, 16))
Result = Future[EncodedVideo | str]


class Tower:
    """Stands in for an encoder: every picture's features depend on that picture alone."""

    device = torch.device("cpu")
    preprocessing = PREPROCESSING
    precision = "fp32"
    dim = 8
    frames_together = clip_frames = 1

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


def gpu_pool_on_cpu(
    decode: Callable[[Sequence[Clip]], list[torch.Tensor]],
    *arguments: Any,
    batch_videos: int = BATCH_VIDEOS,
) -> DaliVideoPool:
    """`DaliVideoPool(*arguments)` for a made-up Hopper; `decode` stands in for `DaliPixels`."""
    with (
        mock.patch.object(gpu_pool, "DaliPixels", return_value=decode),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
    ):
        return DaliVideoPool(*arguments, batch_videos)
