"""Frame choice: every golden case exactly, the option syntax, and bounds for any video length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import UserError
from pipeline import sampling
from pipeline.sampling import (
    Sampling,
    Windows,
    dense_train_indices,
    dense_train_starts,
    dist_test_indices,
    parse_sampling,
    train_ranges,
    validation_indices,
    window_bounds,
)

ONE_CLIP = ("uniform", "middle")


@pytest.fixture(scope="module")
def cases(golden: Path) -> dict[str, list[dict[str, Any]]]:
    loaded: dict[str, list[dict[str, Any]]] = json.loads(
        (golden / "frame_indices.json").read_text()
    )
    return loaded


def test_validation_frames_are_the_authors(cases: dict[str, list[dict[str, Any]]]) -> None:
    assert len(cases["val"]) == 120
    for case in cases["val"]:
        assert validation_indices(case["n"], case["segs"]).tolist() == case["frames"], case


def test_test_frames_are_the_authors(cases: dict[str, list[dict[str, Any]]]) -> None:
    assert len(cases["test"]) == 960
    for case in cases["test"]:
        arguments = case["n"], case["segs"], case["clips"], case["dense"]
        if case["error"]:
            with pytest.raises(ValueError, match="at least 2 clips"):
                sampling.test_indices(*arguments)
            continue
        frames = sampling.test_indices(*arguments)
        assert frames.shape == (case["clips"], case["segs"])
        assert frames.dtype == np.int64
        assert frames.reshape(-1).tolist() == case["frames"], case


def test_training_ranges_are_the_authors(cases: dict[str, list[dict[str, Any]]]) -> None:
    assert len(cases["train_uniform"]) == 120
    for case in cases["train_uniform"]:
        ranges = train_ranges(case["n"], case["segs"])
        assert ranges.tolist() == [list(pair) for pair in zip(case["lo"], case["hi"], strict=True)]


def test_dense_training_windows_are_the_authors(cases: dict[str, list[dict[str, Any]]]) -> None:
    assert len(cases["train_dense"]) == 120
    for case in cases["train_dense"]:
        lo, hi = dense_train_starts(case["n"])
        assert [lo, hi] == case["start_range"], case
        for start, key in ((lo, "frames_at_lo"), (hi, "frames_at_hi")):
            assert dense_train_indices(case["n"], case["segs"], start).tolist() == case[key], case


@pytest.mark.parametrize("n", [0, -3])
def test_a_video_without_frames_is_an_error(n: int) -> None:
    for call in (
        lambda: validation_indices(n, 8),
        lambda: sampling.test_indices(n, 8, 3),
        lambda: sampling.test_indices(n, 8, 3, dense=True),
        lambda: train_ranges(n, 8),
        lambda: dense_train_starts(n),
        lambda: dense_train_indices(n, 8, 0),
        lambda: parse_sampling("uniform:8").indices(n),
    ):
        with pytest.raises(ValueError, match="frames"):
            call()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uniform:16", Sampling("uniform", 16, 1)),
        ("middle:8", Sampling("middle", 8, 1)),
        (" clips:8x4 ", Sampling("clips", 8, 4)),
        ("clips:8x1", Sampling("clips", 8, 1)),
        ("dense:16x3", Sampling("dense", 16, 3)),
    ],
)
def test_option_syntax_is_read_and_written_back(text: str, expected: Sampling) -> None:
    assert parse_sampling(text) == expected
    assert expected.text == text.strip()


@pytest.mark.parametrize(
    "text",
    ["", "uniform", "uniform:x", "clips:8", "uniform:8x3", "middle:8x3", "all", "uniform:-1"],
)
def test_a_wrong_option_names_the_syntax(text: str) -> None:
    with pytest.raises(UserError, match=r"write uniform:F .*clips:TxV.*dense:TxV"):
        parse_sampling(text)


@pytest.mark.parametrize(
    "text",
    ["uniform:0", "clips:8x0", "clips:4096x2", "uniform:100000000", "dense:8x1", "dense:129x2"],
)
def test_an_option_out_of_range_says_so(text: str) -> None:
    with pytest.raises(UserError, match=f"sampling '{text}'"):
        parse_sampling(text)


@given(
    n=st.integers(1, 100_000),
    frames=st.integers(1, 64),
    clips=st.integers(2, 8),
    kind=st.sampled_from(["uniform", "middle", "clips", "dense"]),
)
def test_indices_always_name_existing_frames(n: int, frames: int, clips: int, kind: Any) -> None:
    chosen = Sampling(kind, frames, 1 if kind in ONE_CLIP else clips).indices(n)
    assert chosen.shape == (1 if kind in ONE_CLIP else clips, frames)
    assert chosen.min() >= 0
    assert chosen.max() < n


@given(
    num_frames=st.integers(1, 100_000),
    fps=st.floats(0.01, 240),
    seconds=st.floats(0.01, 10_000),
    frames=st.integers(1, 64),
)
def test_windows_cut_a_video_without_gaps(
    num_frames: int, fps: float, seconds: float, frames: int
) -> None:
    bounds = window_bounds(num_frames, fps, seconds)
    assert (bounds[0], bounds[-1]) == (0, num_frames)
    lengths = np.diff(bounds)
    assert (lengths >= 1).all()
    step = max(1.0, fps * seconds)
    assert (np.abs(lengths[:-1] - step) < 1).all()
    assert lengths[-1] <= 1.5 * step + 1
    indices = Windows(bounds[:50], frames).indices(num_frames) if len(bounds) > 1 else None
    if indices is None or len(bounds) < 3:
        return
    middles = Windows(bounds[:50], frames, "dist").indices(num_frames)
    for row, middle, first, after in zip(indices, middles, bounds, bounds[1:], strict=False):
        assert (row - first).tolist() == validation_indices(after - first, frames).tolist()
        assert (middle - first).tolist() == dist_test_indices(after - first, frames, 1)[0].tolist()
