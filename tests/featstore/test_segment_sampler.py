"""Draws of frames and views: in range, uniform, and the same however they are asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.segments import SegmentSampler, segment_ranges


@given(
    views=st.integers(1, 4),
    stored=st.integers(1, 40),
    frames=st.integers(1, 12),
    first=st.integers(0, 2**40),
    counts=st.lists(st.integers(1, 2000), min_size=1, max_size=4),
    stream=st.lists(st.integers(0, 2**40), min_size=1, max_size=5),
)
def test_draws_are_in_range_and_the_same_however_cut(
    views: int, stored: int, frames: int, first: int, counts: list[int], stream: list[int]
) -> None:
    sampler = SegmentSampler(views, stored, frames)
    places = sampler.draw(stream, first, sum(counts))
    assert places.shape == (sum(counts), frames)
    assert places.dtype == np.int64
    chosen, drawn = np.divmod(places, stored)
    lowest, highest = segment_ranges(stored, frames)
    assert ((drawn >= lowest) & (drawn <= highest)).all()
    assert 0 <= chosen.min() <= chosen.max() < views
    assert (chosen == chosen[:, :1]).all(), "all frames of a sample are of one view"
    starts = np.arange(sum(counts), dtype=np.int64)[::-1] * 1_000_003_000_007
    small = np.arange(sum(counts), dtype=np.int32)[::-1] * np.int32(stored * views)
    at = 0
    for count in counts:
        part = slice(at, at + count)
        np.testing.assert_array_equal(sampler.draw(stream, first + at, count), places[part])
        begun = sampler.draw(stream, first + at, count, starts[part])
        np.testing.assert_array_equal(begun, places[part] + starts[part, None])
        begun = sampler.draw(stream, first + at, count, small[part])
        assert begun.dtype == np.int32
        np.testing.assert_array_equal(begun, places[part] + small[part, None])
        at += count


def chi_square(values: np.ndarray, size: int) -> float:
    """Deviation from equal counts in standard deviations of the chi-square distribution."""
    counts = np.bincount(values, minlength=size)
    expected = len(values) / size
    freedom = size - 1
    squares = float(((counts - expected) ** 2).sum()) / expected
    return float((squares - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize(
    ("views", "stored", "frames"), [(1, 32, 8), (3, 32, 8), (5, 9, 4), (2, 64, 3), (1, 16, 16)]
)
def test_every_choice_is_equally_likely_and_apart_from_the_others(
    views: int, stored: int, frames: int
) -> None:
    """Chi-square of each number, of neighbours in a sample, and of neighbours in the stream."""
    sampler = SegmentSampler(views, stored, frames)
    chosen, drawn = np.divmod(sampler.draw((0, 1, 2), 0, 100_000), stored)
    lowest, highest = segment_ranges(stored, frames)
    columns = list((drawn - lowest).T)
    sizes = (highest - lowest + 1).tolist()
    columns.append(chosen[:, 0])
    sizes.append(views)
    for column, size in zip(columns, sizes, strict=True):
        if size > 1:
            assert abs(chi_square(column, size)) < 5
            assert abs(chi_square(column[:-1] * size + column[1:], size * size)) < 5
    for a, b in zip(range(len(columns) - 1), range(1, len(columns)), strict=True):
        joint = sizes[a] * sizes[b]
        if joint > 1:
            assert abs(chi_square(columns[a] * sizes[b] + columns[b], joint)) < 5


def test_streams_differ_in_every_word() -> None:
    sampler = SegmentSampler(1, 64, 4)
    ours = sampler.draw((0, 1, 1, 0), 0, 500)
    for stream in ((1, 1, 1, 0), (0, 2, 1, 0), (0, 1, 0, 0), (0, 1, 1, 1)):
        theirs = sampler.draw(stream, 0, 500)
        assert (ours == theirs).mean() < 0.12


def test_more_choices_than_its_numbers_have_values_are_refused() -> None:
    most = 2**16
    assert SegmentSampler(1, most, 1).draw((0,), 0, 1000).max() > most * 0.9
    with pytest.raises(ValueError, match="one of 65537"):
        SegmentSampler(1, most + 1, 1)
    with pytest.raises(ValueError, match="one of 65537"):
        SegmentSampler(most + 1, 4, 2)
