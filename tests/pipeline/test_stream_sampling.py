"""Frames of a stream: those on the screen at the times of a rule, each once, chosen one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore import UserError
from pipeline.stream_sampling import (
    TOLERANCE_S,
    ShownFrame,
    parse_stream_sampling,
)

times = st.lists(st.integers(0, 12), min_size=1, max_size=80).map(
    lambda steps: (np.cumsum(steps) * 0.02 + 3.5).tolist()
)


def kept(text: str, seconds: list[float], last: float = 0.04) -> list[int]:
    sampling = parse_stream_sampling(text)
    assert sampling is not None
    ends = [*seconds[1:], seconds[-1] + last]
    return [
        index
        for index, (begin, end) in enumerate(zip(seconds, ends, strict=True))
        if sampling.keeps(ShownFrame(index, begin, index % 12 == 0), end, seconds[0])
    ]


def on_screen(wanted: np.ndarray, seconds: list[float]) -> list[int]:
    """The last frame that begins before each time, as a player shows it."""
    at = np.array(seconds) - seconds[0] - TOLERANCE_S
    return sorted(set((np.searchsorted(at, wanted + 1e-12, side="right") - 1).tolist()))


@given(times, st.sampled_from([0.5, 1, 4, 7.5, 25, 60]))
def test_fps_keeps_what_is_on_the_screen_at_its_ticks(seconds: list[float], rate: float) -> None:
    end = seconds[-1] + 0.04 - seconds[0] - TOLERANCE_S
    ticks = np.arange(0, np.ceil(end * rate - 1e-9)) / rate
    assert kept(f"fps:{rate:g}", seconds) == on_screen(ticks, seconds)


@given(
    times,
    st.sampled_from([0.4, 1, 2.5]),
    st.sampled_from([0.3, 1, 4]),
    st.sampled_from([1, 3, 8]),
)
def test_windows_keep_the_middle_of_each_part(
    seconds: list[float], window: float, stride: float, count: int
) -> None:
    end = seconds[-1] + 0.04 - seconds[0] - TOLERANCE_S
    starts = np.arange(np.ceil(end / stride)) * stride
    wanted = (starts[:, None] + (np.arange(count) + 0.5) * window / count).reshape(-1)
    wanted = wanted[wanted < end]
    assert kept(f"windows:{window:g}/{stride:g}:{count}", seconds) == on_screen(wanted, seconds)


def test_every_and_keyframes() -> None:
    seconds = (np.arange(40) / 25).tolist()
    assert kept("every:16", seconds) == [0, 16, 32]
    assert kept("keyframes", seconds) == [0, 12, 24, 36]


@pytest.mark.parametrize(("rate", "step"), [(4, 6.25), (25, 1), (50, 1), (12.5, 2)])
def test_fps_of_an_even_video(rate: float, step: float) -> None:
    seconds = (np.arange(250) / 25).tolist()
    expected = [int(step * n + 1e-9) for n in range(int(250 / step))]
    assert kept(f"fps:{rate:g}", seconds) == expected


def test_times_rounded_to_milliseconds_lose_no_frame() -> None:
    seconds = np.round(np.arange(300) / 30, 3).tolist()
    assert kept("fps:30", seconds, last=1 / 30) == list(range(300))


@pytest.mark.parametrize(
    "text", ["fps:4", "fps:0.5", "every:16", "keyframes", "windows:2/0.5:8", "fps:29.97"]
)
def test_the_spelling_is_read_back(text: str) -> None:
    sampling = parse_stream_sampling(f" {text} ")
    assert sampling is not None
    assert sampling.text == text


def test_other_samplings_are_none_of_these() -> None:
    assert parse_stream_sampling("uniform:16") is None


@pytest.mark.parametrize(
    "text",
    [
        *("fps", "fps:", "fps:0", "fps:-1", "fps:1e3", "fps:nan", "fps:1001", "every:0"),
        *("every:1.5", "keyframes:2", "windows:2/1", "windows:0/1:4", "windows:2/1:0"),
    ],
)
def test_wrong_rules_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^sampling "):
        parse_stream_sampling(text)
