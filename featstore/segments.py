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
    """Draws a view of each sample and a frame of each segment, for several batches at once.

    The draws of a batch are those of numpy's `default_rng(seed)`: `integers(0, views, count)`, then
    `integers` of every segment's range for one sample after another (Lemire's method on 32-bit
    halves, ACM TOMACS 2019). Numpy itself goes number by number when the ranges differ.
    """

    def __init__(self, views: int, stored: int, frames: int) -> None:
        """Samples of `views` views of `stored` frames, `frames` of which are drawn."""
        self._views = views
        self._lowest, self._highest = segment_ranges(stored, frames)
        sizes = self._highest - self._lowest + 1
        self._drawn = np.flatnonzero(sizes > 1)  # a segment of one frame takes no random number
        self._sizes = sizes[self._drawn].astype(np.uint32)
        self._tiles = (0, self._sizes[:0], self._lowest[:0])

    def draw(self, seeds: Sequence[Sequence[int]], count: int) -> tuple[IntArray | None, IntArray]:
        """Batches of `count` samples, one per seed, one after another; n = seeds * count.

        Returns the view of each sample, int64 [n], None where there is one only, and its frames,
        int64 [n, T].
        """
        of_views = count if self._views > 1 else 0
        needed = of_views + count * len(self._drawn)
        raw = np.empty((len(seeds), (needed + 1) // 2), "<u8")
        for target, seed in zip(raw, seeds, strict=True):
            target[:] = np.random.PCG64(seed).random_raw(len(target))
        halves = raw.view("<u4")
        sizes, lowest = self._tiled(count)
        frames, unbiased = _scaled(halves[:, of_views:needed], sizes)
        views = None
        if of_views:
            views, sure = _scaled(halves[:, :of_views].reshape(-1), np.uint32(self._views))
            unbiased = unbiased and sure
        if not unbiased:
            return self.draw_by_numpy(seeds, count)
        frames += lowest
        rows, segments = len(seeds) * count, len(self._lowest)
        drawn = frames.reshape(rows, len(self._drawn))
        if len(self._drawn) == segments:
            return views, drawn
        frames = np.tile(self._lowest, (rows, 1))
        frames[:, self._drawn] = drawn
        return views, frames

    def _tiled(self, count: int) -> tuple[npt.NDArray[np.uint32], IntArray]:
        """Size and lowest frame of the drawn segments, once per sample: [count * drawn] each.

        Numpy works along long rows; along eight numbers at a time it takes four times as long.
        """
        tiles = self._tiles  # threads may draw for batches of other sizes
        if count != tiles[0]:
            lowest = np.tile(self._lowest[self._drawn], count)
            tiles = self._tiles = count, np.tile(self._sizes, count), lowest
        return tiles[1:]

    def draw_by_numpy(
        self, seeds: Sequence[Sequence[int]], count: int
    ) -> tuple[IntArray | None, IntArray]:
        """The same, drawn by numpy."""
        views, frames = [], []
        for seed in seeds:
            rng = np.random.default_rng(seed)
            views.append(rng.integers(0, self._views, count))
            shape = (count, len(self._lowest))
            frames.append(rng.integers(self._lowest, self._highest, shape, endpoint=True))
        return (np.concatenate(views) if self._views > 1 else None), np.concatenate(frames)


def _scaled(
    halves: npt.NDArray[np.uint32], sizes: npt.NDArray[np.uint32] | np.uint32
) -> tuple[IntArray, bool]:
    """Random 32-bit numbers as numbers below `sizes`, and whether all are sure to be unbiased.

    If not (one batch in 500,000), a number may have to be drawn again.
    """
    products = np.multiply(halves, sizes, dtype=np.uint64)
    unbiased = not (products.astype(np.uint32) < sizes).any()
    products >>= np.uint64(32)
    return products.view(np.int64), unbiased


def _require_positive(n: int, segments: int) -> None:
    if n <= 0:
        raise ValueError(f"cannot choose among {n} frames: there must be at least one")
    if segments <= 0:
        raise ValueError(f"{segments} segments asked for: there must be at least one")
