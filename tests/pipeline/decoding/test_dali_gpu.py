"""NVDEC itself, on machines that have one: are its frames the ones PyAV gives?

Everything here is skipped without a GPU that DALI can use. What the rule in
`pipeline.decoding.nvdec.rule` supposes about DALI and NVDEC is tested here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.clip_encoder import load_encoder
from pipeline.decoding.nvdec.decoder import NvdecDecoder
from pipeline.decoding.nvdec.graphs import Clip, DaliPixels, dali_problem
from pipeline.decoding.nvdec.rule import NvdecSurvey, nvdec_codecs, survey_video
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.extraction.cpu_pool import EncodedVideo, encode_video
from pipeline.extraction.gpu_pool import DaliVideoPool
from pipeline.preprocessing import Preprocessing
from pipeline.sampling import parse_sampling
from tests.support.worlds.frames import frames_of
from tests.support.worlds.media import frame_number, make_video
from tests.support.worlds.tiny_world import make_encoder

PROBLEM = dali_problem()
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=f"not run: {PROBLEM}")

Frames = npt.NDArray[np.uint8]
Decode = Callable[..., list[Frames]]
BASE = {"frames": 60, "width": 320, "height": 240}


@pytest.fixture(scope="module")
def decode() -> Decode:
    """Frames uint8 [n,height,width,3] of each video, all of one size, as NVDEC gives them."""
    graphs: dict[tuple[int, int], DaliPixels] = {}

    def decoded(videos: Sequence[bytes], asked: Sequence[int], width: int, height: int) -> Any:
        if (width, height) not in graphs:
            # An input of the picture's own size: nothing is resized, cropped or normalised.
            plain = Preprocessing((height, width), (0.0,) * 3, (1 / 255,) * 3)
            graphs[width, height] = DaliPixels(plain, 1, batch_size=8, threads=4, device_id=0)
        chosen = np.array(asked, np.int64)
        pixels = graphs[width, height](
            [Clip(np.frombuffer(video, np.uint8), chosen, height, width) for video in videos]
        )
        return [
            found[0].permute(0, 2, 3, 1).round().clamp(0, 255).byte().cpu().numpy()
            for found in pixels
        ]

    return decoded


def accepted(video: bytes) -> bool:
    codecs = nvdec_codecs(torch.cuda.get_device_capability())
    return isinstance(survey_video(video, codecs), NvdecSurvey)


def assert_same_frames(got: Frames, want: Frames) -> None:
    # Half of the samples of a colour plane are interpolated in another way, and rounded once more.
    difference = np.abs(got.astype(int) - want.astype(int))
    assert difference.mean() < 3
    assert [frame_number(frame) for frame in got] == [frame_number(frame) for frame in want]


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"gop": 250},
        {"container": "matroska"},
        {"options": {"x264-params": "bframes=3:b-pyramid=normal"}},
        {"options": {"x264-params": "open-gop=1:bframes=3"}},
        {"options": {"x264-params": "scenecut=0:keyint=30:bframes=2"}},
        {"times": [n * n for n in range(60)]},
        {"codec": "libx265", "options": {"x265-params": "log-level=none:open-gop=0"}},
        {"codec": "libvpx-vp9", "container": "webm"},
        {"width": 340, "height": 256},
        {"width": 480, "height": 270},
        {"width": 1920, "height": 1080},
    ],
    ids=str,
)
def test_frames_are_pyavs(decode: Decode, recipe: dict[str, Any]) -> None:
    settings = {**BASE, **recipe}
    video = make_video(**settings)
    assert accepted(video)
    asked = [0, 1, 11, 12, 13, 24, 30, 47, 59]
    (got,) = decode([video], asked, settings["width"], settings["height"])
    assert_same_frames(got, frames_of(PyAVDecoder(), video, asked))


def test_every_single_frame_can_be_asked_for(decode: Decode) -> None:
    video = make_video(**BASE, options={"x264-params": "bframes=3:keyint=13:scenecut=0"})
    assert accepted(video)
    for index in range(60):
        (got,) = decode([video], [index], 320, 240)
        assert frame_number(got[0]) == index


@pytest.mark.xfail(strict=False, reason="not promised: the pool sends all but one size to PyAV")
def test_pictures_that_share_a_coded_size(decode: Decode) -> None:
    videos = [make_video(frames=20, width=480, height=height) for height in (272, 270, 272)]
    for video, height in zip(videos, (272, 270, 272), strict=True):
        (got,) = decode([video], [0, 19], 480, height)
        assert_same_frames(got, frames_of(PyAVDecoder(), video, [0, 19]))


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_video_never_shows_another_ones_frames(decode: Decode, seed: int) -> None:
    others = [make_video(**BASE, first=1000 + 100 * n) for n in range(7)]
    asked = [0, 9, 20, 33, 47, 59]
    seen = np.concatenate(decode(others, asked, 320, 240)).astype(int)
    rng = np.random.default_rng(seed)
    damaged = bytearray(make_video(**BASE))
    start = damaged.index(b"mdat") + 4
    for place in rng.integers(start, len(damaged) - 2000, 20):
        damaged[place] ^= int(rng.integers(1, 256))
    try:
        (got,) = decode([bytes(damaged)], asked, 320, 240)
    except RuntimeError:
        return  # noticed
    for frame in got:
        assert np.abs(seen - frame.astype(int)).mean(axis=(1, 2, 3)).min() > 2


def test_the_decoder_of_training_agrees_with_the_cpu_path() -> None:
    sizes = [(320, 240), (340, 256), (480, 270), (256, 320)]
    videos = [
        make_video(frames=20 + n, first=40 * n, width=sizes[n % 4][0], height=sizes[n % 4][1])
        for n in range(40)
    ]
    decoder = NvdecDecoder(PyAVDecoder(), torch.device("cuda"), batch_videos=8)
    asked = [2, 5, 5, 17]
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda video: frames_of(decoder, video, asked), videos))
    assert "40 videos decoded by NVDEC" in decoder._batcher.report()
    for got, video in zip(found, videos, strict=True):
        assert_same_frames(got, frames_of(PyAVDecoder(), video, asked))


def test_the_pool_agrees_with_the_cpu_path(tmp_path: Path) -> None:
    encoder = load_encoder(make_encoder(tmp_path), "fp32", "cuda")
    sampling = parse_sampling("clips:4x2")
    sizes = [(320, 240), (340, 256), (480, 270), (256, 320)]
    videos = [
        make_video(frames=20 + n, first=40 * n, width=sizes[n % 4][0], height=sizes[n % 4][1])
        for n in range(40)
    ]
    videos += [make_video(**BASE, rotation=90), make_video(**BASE, codec="mpeg4", container="avi")]
    pool = DaliVideoPool(PyAVDecoder(), encoder, sampling, 3, 4)
    futures = [pool.submit(lambda video=video: video) for video in videos]
    results = [future.result(300) for future in futures]
    pool.close()
    assert pool._batcher.report()[0] == "40 videos decoded by NVDEC"
    for video, got in zip(videos, results, strict=True):
        want = encode_video(video, PyAVDecoder(), encoder, sampling, 3)
        assert isinstance(got, EncodedVideo)
        assert got.info == want.info
        np.testing.assert_array_equal(got.frame_index, want.frame_index)
        np.testing.assert_allclose(got.pts, want.pts)
        a, b = torch.from_numpy(got.features), torch.from_numpy(want.features)
        assert torch.nn.functional.cosine_similarity(a, b, dim=-1).min() > 0.999
