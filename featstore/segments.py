"""Segment arithmetic: which of n ordered things to take, as pure integer arithmetic.

Used at both ends of the store: `pipeline.sampling` chooses frames of a video with it, training
chooses among the stored frames of a row. It lives here because both may import `featstore`.

The formulas are those of the MoTE reference (Zhu et al., NeurIPS 2024), zero-based.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

_LOW_HALF = np.uint64(2**32 - 1)


def segment_positions(n: int, segments: int) -> IntArray:
    """Position k of `segments` evenly spaced ones among n: int(n/segments*k) mod n.

    Returns int64 [segments], each in [0, n). For n < segments positions repeat, none is invented.
    Raises ValueError when n or `segments` is not positive.
    """
    _require_positive(n, segments)
    steps = np.arange(segments, dtype=np.float64)
    return (n / segments * steps).astype(np.int64) % n


def segment_ranges(n: int, segments: int) -> tuple[IntArray, IntArray]:
    """Inclusive (lo, hi) of each segment for random segment sampling, int64 [segments] each.

    Edge k is round-half-even((n-1)/segments*k); segment k spans edge k to edge k+1, both included,
    so neighbours may pick the same edge position.
    Raises ValueError when n or `segments` is not positive.
    """
    _require_positive(n, segments)
    edges = np.rint((n - 1) / segments * np.arange(segments + 1, dtype=np.float64))
    edges = edges.astype(np.int64)
    return edges[:-1], edges[1:]


class SegmentSampler:
    """Draws a view of each sample and a frame of each segment, for a whole batch at once.

    The draws are those of numpy's `default_rng(seed)`: `integers(0, views, count)`, then `integers`
    of every segment's range for one sample after another (Lemire's method on 32-bit halves, ACM
    TOMACS 2019). Numpy itself goes number by number when the ranges differ, four times as slow.
    """

    def __init__(self, views: int, stored: int, frames: int) -> None:
        """Samples of `views` views of `stored` frames, `frames` of which are drawn."""
        self._views = views
        self._lowest, highest = segment_ranges(stored, frames)
        self._highest = highest
        sizes = highest - self._lowest + 1
        self._drawn = np.flatnonzero(sizes > 1)  # a segment of one frame takes no random number
        self._all_drawn = len(self._drawn) == frames
        self._sizes = sizes[self._drawn].astype(np.uint64)

    def draw(self, seed: Sequence[int], count: int) -> tuple[IntArray | None, IntArray]:
        """View of each sample, int64 [count], None where there is one only; frames [count, T]."""
        of_views = count if self._views > 1 else 0
        needed = of_views + count * len(self._drawn)
        raw = np.random.PCG64(seed).random_raw((needed + 1) // 2)
        halves = raw.astype("<u8", copy=False).view("<u4")[:needed].astype(np.uint64)
        products = halves[of_views:].reshape(count, len(self._drawn)) * self._sizes
        view_products = halves[:of_views] * np.uint64(self._views)
        # Rarely (one batch in 500,000) a number may have to be drawn again to be unbiased.
        if np.any(products & _LOW_HALF < self._sizes) or np.any(
            view_products & _LOW_HALF < self._views
        ):
            return self.draw_by_numpy(seed, count)
        drawn = (products >> np.uint64(32)).view(np.int64)
        views = (view_products >> np.uint64(32)).view(np.int64) if of_views else None
        if self._all_drawn:
            drawn += self._lowest
            return views, drawn
        frames = np.tile(self._lowest, (count, 1))
        frames[:, self._drawn] += drawn
        return views, frames

    def draw_by_numpy(self, seed: Sequence[int], count: int) -> tuple[IntArray | None, IntArray]:
        """The same, drawn by numpy."""
        rng = np.random.default_rng(seed)
        views = rng.integers(0, self._views, count)
        shape = (count, len(self._lowest))
        frames = rng.integers(self._lowest, self._highest, shape, endpoint=True)
        return (views if self._views > 1 else None), frames


def _require_positive(n: int, segments: int) -> None:
    if n <= 0:
        raise ValueError(f"cannot choose among {n} frames: there must be at least one")
    if segments <= 0:
        raise ValueError(f"{segments} segments asked for: there must be at least one")
