"""Preprocessing: golden crops, PIL as the truth, open_clip's own settings, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featstore.errors import UserError
from pipeline.preprocessing import (
    CLIP_STD,
    CROP_COUNTS,
    Preprocessing,
    crop_corners,
    evaluation_crops,
    resized_size,
)

ONE_LEVEL = 1 / 255 / min(CLIP_STD)  # one grey level in normalised units


def noise(height: int, width: int, frames: int = 1) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


def test_golden_crops_to_the_last_bit(golden: Path) -> None:
    case = np.load(golden / "preprocess_eval.npz")
    meta = json.loads(str(case["meta_json"]))
    for number in range(12):
        expected = torch.from_numpy(case[f"out_{number}"])
        crops, frames, _, size, _ = expected.shape
        result = evaluation_crops(case[f"in_{number}"], size, crops)
        assert (meta[number]["crops"], meta[number]["frames"]) == (crops, frames)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)
    pixels = Preprocessing().crop_pixels(case["in_12"])
    assert torch.equal(pixels, torch.from_numpy(case["out_12_u8"]))


@settings(max_examples=60, deadline=None)
@given(height=st.integers(8, 200), width=st.integers(8, 200), size=st.integers(8, 64))
def test_resize_equals_pillow(height: int, width: int, size: int) -> None:
    frames = noise(height, width)
    target = resized_size(height, width, (size, size))
    expected = Image.fromarray(frames[0]).resize(target[::-1], Image.Resampling.BICUBIC)
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    resized = Preprocessing(size=(size, size)).resize(tensor)[0].permute(1, 2, 0)
    assert np.array_equal(np.asarray(expected), resized.numpy())


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    size=st.integers(1, 48),
    crops=st.sampled_from(CROP_COUNTS),
)
def test_every_video_shape_gives_full_crops(height: int, width: int, size: int, crops: int) -> None:
    if max(height, width) * size > min(height, width) * 5000:
        return
    result = evaluation_crops(noise(height, width, 2), size, crops)
    assert result.shape == (crops, 2, 3, size, size)
    assert torch.isfinite(result).all()


def test_geometry_of_the_method() -> None:
    assert resized_size(256, 340, (224, 224)) == (224, 297)
    assert resized_size(340, 256, (224, 224)) == (297, 224)
    # Half to even for the single crop; quarters rounded down for three.
    assert crop_corners(224, 229, (224, 224), 1) == [(2, 0)]
    assert crop_corners(224, 227, (224, 224), 1) == [(2, 0)]
    assert crop_corners(224, 231, (224, 224), 3) == [(0, 0), (4, 0), (2, 0)]
    assert crop_corners(300, 224, (224, 224), 3) == [(0, 38), (0, 38), (0, 38)]


def test_ten_crops_are_five_and_their_mirrors() -> None:
    frames = noise(50, 80)
    five = evaluation_crops(frames, 32, 5)
    ten = evaluation_crops(frames, 32, 10)
    torch.testing.assert_close(ten[0::2], five)
    torch.testing.assert_close(ten[1::2], five.flip(-1))


def test_arrays_tensors_and_odd_memory_give_the_same() -> None:
    frames = noise(40, 60, 3)
    expected = evaluation_crops(frames, 32, 3)
    torch.testing.assert_close(evaluation_crops(torch.from_numpy(frames), 32, 3), expected)
    flipped = np.ascontiguousarray(frames[:, ::-1])[:, ::-1]
    flipped.flags.writeable = False
    torch.testing.assert_close(evaluation_crops(flipped, 32, 3), expected)


@pytest.mark.parametrize(
    "config",
    [
        {"size": 32},
        {"size": [32, 32], "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3},
        {"size": 32, "resize_mode": "squash"},
        {"size": [24, 40], "resize_mode": "squash"},
        {"size": [24, 40]},
        {"size": 32, "resize_mode": "longest", "fill_color": 7},
    ],
)
@pytest.mark.parametrize("shape", [(48, 64), (64, 40), (20, 33)])
def test_settings_mean_what_open_clip_means(config: dict[str, Any], shape: tuple[int, int]) -> None:
    frames = noise(*shape)
    settings_of_open_clip = open_clip.transform.PreprocessCfg(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    )
    transform = open_clip.transform.image_transform_v2(settings_of_open_clip, is_train=False)
    expected = transform(Image.fromarray(frames[0]))
    preprocessing = Preprocessing.from_open_clip(config)
    result = preprocessing.crops(frames)[0, 0]
    assert result.shape == expected.shape
    assert (result - expected).abs().max() <= 2 / 255 / min(preprocessing.std) + 1e-6


def test_the_tower_decides_the_size_and_json_reads_back() -> None:
    preprocessing = Preprocessing.from_open_clip({"size": 224, "interpolation": None}, size=32)
    assert preprocessing.size == (32, 32)
    plain = json.loads(json.dumps(preprocessing.to_json()))
    assert Preprocessing.from_open_clip(plain) == preprocessing


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"interpolation": "lanczos"}, "interpolation 'lanczos' is not supported: use bicubic or"),
        ({"resize_mode": "fit"}, "resize_mode 'fit' is not supported"),
        ({"mode": "L"}, "mode 'L' is not supported"),
        ({"size": 0}, "size 0 is not a size"),
        ({"size": [1, 2, 3]}, "is not a size"),
        ({"size": "224"}, "is not a size"),
        ({"mean": [0.5]}, "mean .* give three numbers"),
        ({"std": [0.5, 0, 0.5]}, "std .* give three numbers"),
        ({"mean": [0.5, float("nan"), 0]}, "mean .* give three numbers"),
        ({"fill_color": 300}, "fill_color 300 is not a grey level"),
    ],
)
def test_unsupported_settings_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Preprocessing.from_open_clip(config)


def test_unsupported_crops_and_shapes_are_named() -> None:
    with pytest.raises(UserError, match="2 crops are not supported: use 1, 3, 5 or 10"):
        evaluation_crops(noise(40, 60), 32, 2)
    with pytest.raises(UserError, match="3 crops make no sense with resize mode 'squash'"):
        Preprocessing(size=(32, 32), resize_mode="squash").crops(noise(40, 60), 3)
    with pytest.raises(ValueError, match=r"frames must be uint8 \[T,H,W,3\]"):
        evaluation_crops(torch.zeros(1, 3, 40, 60), 32, 1)
    with pytest.raises(ValueError, match="frames are empty"):
        evaluation_crops(noise(40, 60)[:0], 32, 1)
