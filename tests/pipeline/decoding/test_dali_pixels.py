"""DALI's graph without a GPU, decode stage replaced, against the exact CPU preprocessing."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decoding.nvdec.graphs import Clip, DaliPixels, import_problem
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.preprocessing import Preprocessing
from tests.support.worlds.frames import frames_of
from tests.support.worlds.media import make_video

pytestmark = pytest.mark.skipif(
    import_problem() is not None, reason=f"DALI cannot be used: {import_problem()}"
)

# Measured over the sizes below: mean at most 0.0032 and, of 1080p and bilinear, a few pixels up to
# five grey levels off (a grey level is 0.014 to 0.015 after normalising); 1 - cosine at most 5e-5.
MEAN_ABS = 0.004
MAX_ABS = 0.076
COSINE = 0.9999

# (height, width): landscape, portrait, square, exact fit, smaller than the tower's input, odd crop
# offsets (297 - 224 = 73, 399 - 224 = 175), one with a long side far longer than the short one.
SIZES = [
    (256, 340),
    (340, 256),
    (240, 320),
    (224, 224),
    (225, 401),
    (401, 225),
    (480, 854),
    (1080, 1920),
    (120, 163),
    (227, 226),
    (64, 500),
]


def chosen_frames(encoded: Any, frames: Any) -> Any:
    """A decode stage for clips that hold decoded frames."""
    fn = importlib.import_module("nvidia.dali.fn")
    return fn.sequence_rearrange(fn.reinterpret(encoded, layout="FHWC"), new_order=frames)


def cpu_video(encoded: Any, frames: Any) -> Any:
    """DALI's own decoder on the CPU: VP8, VP9 and MJPEG only."""
    fn = importlib.import_module("nvidia.dali.fn")
    return fn.decoders.video(encoded, frames=frames, pad_mode="none")


def graph(preprocessing: Preprocessing, crops: int, **extra: Any) -> DaliPixels:
    options = {"decode": chosen_frames, "rank": 4, "batch_size": 16, **extra}
    return DaliPixels(preprocessing, crops, threads=1, device_id=None, **options)


def textured(height: int, width: int, frames: int, seed: int = 0) -> np.ndarray:
    """uint8 [frames, height, width, 3] with detail at several scales, as pictures have."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.full((frames, 3, height, width), 128.0)
    for cells, strength in ((4, 60.0), (16, 40.0), (64, 20.0)):
        noise = torch.randn(frames, 3, cells, cells, generator=generator) * strength
        total += torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")
    return total.clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def clip_of(video: np.ndarray, frames: Any = None) -> Clip:
    chosen = np.arange(len(video)) if frames is None else np.array(frames)
    return Clip(video, chosen.astype(np.int64), *video.shape[1:3])


def assert_close(
    got: torch.Tensor,
    want: torch.Tensor,
    mean_abs: float = MEAN_ABS,
    max_abs: float = MAX_ABS,
    cosine: float = COSINE,
) -> None:
    assert got.shape == want.shape
    difference = (got.float() - want).abs()
    similar = torch.nn.functional.cosine_similarity(got.double().flatten(), want.flatten(), dim=0)
    assert difference.mean() <= mean_abs
    assert difference.max() <= max_abs
    assert similar >= cosine


@pytest.mark.parametrize("crops", [1, 3])
def test_pixels_are_those_of_the_cpu_path_for_mixed_sizes_in_one_batch(crops: int) -> None:
    preprocessing = Preprocessing()
    videos = [textured(*size, frames=1 + i % 2, seed=i) for i, size in enumerate(SIZES)]
    pixels = graph(preprocessing, crops)([clip_of(video) for video in videos])
    assert len(pixels) == len(videos)
    for video, got in zip(videos, pixels, strict=True):
        assert got.dtype == torch.float32
        assert_close(got, preprocessing.crops(video, crops))


@pytest.mark.parametrize(
    ("preprocessing", "crops"),
    [
        (Preprocessing(size=(32, 32)), 5),
        (Preprocessing(size=(32, 32)), 10),
        (Preprocessing(size=(32, 48)), 3),
        (Preprocessing(size=(32, 32), resize_mode="squash"), 1),
        (Preprocessing(size=(32, 32), resize_mode="longest", fill_color=127), 1),
        (Preprocessing(size=(32, 32), interpolation="bilinear", mean=(0.5,) * 3), 1),
    ],
    ids=["five", "ten", "oblong", "squash", "longest", "bilinear"],
)
def test_every_way_of_preprocessing_is_known_to_the_graph(
    preprocessing: Preprocessing, crops: int
) -> None:
    videos = [textured(60, 91, 2), textured(75, 40, 1, seed=1)]
    for video, got in zip(
        videos, graph(preprocessing, crops)([clip_of(v) for v in videos]), strict=True
    ):
        assert_close(got, preprocessing.crops(video, crops))


def test_crops_begin_at_the_same_pixel_for_every_size() -> None:
    # Pictures that need no resizing, so that nothing hides a crop that is one pixel off.
    plain = Preprocessing(size=(16, 16), mean=(0.0,) * 3, std=(1 / 255,) * 3)
    noise = np.random.default_rng(0).integers(0, 256, (1, 16, 300, 3), np.uint8)
    videos = [noise[:, :, :long] for long in range(16, 301)]
    videos += [video.transpose(0, 2, 1, 3) for video in videos]
    for crops in (1, 3):
        pixels = graph(plain, crops, batch_size=len(videos))
        for video, got in zip(videos, pixels([clip_of(v.copy()) for v in videos]), strict=True):
            assert torch.equal(got.round(), plain.crops(video, crops).round()), video.shape


SMALL = Preprocessing(size=(16, 16))


@pytest.fixture(scope="module")
def small_graphs() -> dict[int, DaliPixels]:
    return {crops: graph(SMALL, crops) for crops in (1, 3)}


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(16, 160), st.integers(16, 160)), min_size=1, max_size=8),
    crops=st.sampled_from([1, 3]),
)
def test_pixels_are_those_of_the_cpu_path_for_any_size(
    small_graphs: dict[int, DaliPixels], sizes: list[tuple[int, int]], crops: int
) -> None:
    videos = [textured(*size, 1, seed=size[0]) for size in sizes]
    got = small_graphs[crops]([clip_of(video) for video in videos])
    for video, pixels in zip(videos, got, strict=True):
        # Pictures of a few pixels: half a grey level on average. Of all sizes from 16 x 16 to 60 x
        # 90, one has a single pixel eight levels off (18 x 34), the others at most six.
        want = SMALL.crops(video, crops)
        assert_close(pixels, want, mean_abs=0.0075, max_abs=0.13, cosine=0.9997)


def test_half_precision_and_tensors_that_outlive_the_next_batch() -> None:
    pixels = graph(Preprocessing(size=(32, 32)), 1, half=True)
    first = pixels([clip_of(textured(60, 90, 2))])[0]
    assert first.dtype == torch.float16
    kept = first.clone()
    for seed in range(4):
        pixels([clip_of(textured(60, 90, 2, seed=seed + 1))])
    assert torch.equal(first, kept)


def test_frames_come_in_the_order_asked_with_dalis_own_decoder() -> None:
    # VP9, which DALI decodes without a GPU: bytes and indices through the real operator.
    preprocessing = Preprocessing(size=(32, 32))
    data = [
        make_video(frames=30, first=k, codec="libvpx-vp9", container="webm", width=w, height=64)
        for k, w in ((0, 96), (100, 128))
    ]
    asked = np.array([0, 7, 13, 29])
    pixels = graph(preprocessing, 1, decode=cpu_video, rank=1)(
        [
            Clip(np.frombuffer(d, np.uint8), asked, 64, w)
            for d, w in zip(data, (96, 128), strict=True)
        ]
    )
    for d, got in zip(data, pixels, strict=True):
        want = preprocessing.crops(frames_of(PyAVDecoder(), d, asked), 1)
        # Another FFmpeg turns YUV into RGB here: a grey level, more beside edges of colour.
        assert (got - want).abs().mean() < 0.03
        assert (got[:, 1:] - want[:, :-1]).abs().mean() > 0.1


@pytest.mark.parametrize("fault", ["garbage", "beyond the end"])
def test_one_bad_clip_fails_its_batch_and_the_next_batch_works(fault: str) -> None:
    good = make_video(frames=10, codec="libvpx-vp9", container="webm")
    sound = Clip(np.frombuffer(good, np.uint8), np.array([0, 9]), 64, 96)
    bad = {
        "garbage": Clip(np.arange(5000).astype(np.uint8), np.array([0, 9]), 64, 96),
        # DALI's default gives black frames here instead of an error.
        "beyond the end": Clip(np.frombuffer(good, np.uint8), np.array([0, 10]), 64, 96),
    }[fault]
    pixels = graph(Preprocessing(size=(32, 32)), 1, decode=cpu_video, rank=1)
    with pytest.raises(RuntimeError):
        pixels([sound, bad])
    assert pixels([sound])[0].shape == (1, 2, 3, 32, 32)
