"""Segment arithmetic: which of n ordered things to take, as pure integer arithmetic.

Used at both ends of the store: `pipeline.sampling` chooses frames of a video with it, training
chooses among the stored frames of a row. It lives here because both may import `featstore`.

The formulas are those of the MoTE reference (Zhu et al., NeurIPS 2024), zero-based.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

# Numbers that are computed at once, which stay in a core's nearest cache.
_AT_ONCE: Final = 2**13


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
    """Draws a view of each sample and a frame of each of its segments, for many samples at once.

    A stream is the 64-bit words of numpy's PCG64 from the seed that names it, and each of its
    samples has a place of its own there: any range of them is drawn without the ones before it,
    and however it is cut, a sample gets the same.

    A number below n is a random 32-bit one times n, divided by 2**32: Lemire's method (ACM TOMACS
    2019) without its rejections, which would move all that comes after them. The chance of each
    value is within 2**-32 of 1 / n.
    """

    def __init__(self, views: int, stored: int, frames: int) -> None:
        """Samples of `views` views of `stored` frames, `frames` of which are drawn."""
        self._views, self._stored, self._frames = views, stored, frames
        lowest, highest = segment_ranges(stored, frames)
        # A sample's words hold the 32-bit numbers of its frames, then that of its view.
        self._words = -(-(frames + (views > 1)) // 2)
        # Numpy works along long rows: along the eight of a sample it takes four times as long.
        self._at_once = max(1, _AT_ONCE // frames)
        self._lowest = np.tile(lowest, self._at_once)
        self._sizes = np.tile((highest - lowest + 1).astype(np.uint32), self._at_once)

    def draw(
        self, stream: Sequence[int], first: int, count: int, starts: IntArray | None = None
    ) -> IntArray:
        """Samples first, first + 1, ... of `stream`, which is named by whole numbers >= 0.

        Returns places among the V * F stored frames of a sample, int64 [count, T]: frame f of view
        v, the same view in all of a sample, is v * F + f. `starts` int64 [count] are added.
        """
        bits = np.random.PCG64(stream)
        bits.advance(first * self._words)
        places = np.empty((count, self._frames), np.int64)
        for at in range(0, count, self._at_once):
            part = places[at : at + self._at_once]
            words = bits.random_raw(len(part) * self._words)
            halves = words.astype("<u8", copy=False).view("<u4").reshape(-1, 2 * self._words)
            of_frames = np.ascontiguousarray(halves[:, : self._frames]).reshape(-1)
            drawn = _below(self._sizes[: part.size], of_frames)
            begins = None if starts is None else starts[at : at + self._at_once]
            if self._views > 1:
                views = _below(np.uint32(self._views), halves[:, self._frames]) * self._stored
                begins = views if begins is None else begins + views
            # All sums while the numbers are in the nearest cache.
            out = part.reshape(-1) if begins is None else drawn
            np.add(drawn, self._lowest[: part.size], out=out)
            if begins is not None:
                np.add(drawn.reshape(part.shape), begins[:, None], out=part)
        return places


def _below(sizes: npt.NDArray[np.uint32] | np.uint32, halves: npt.NDArray[np.uint32]) -> IntArray:
    """Random 32-bit numbers as numbers below `sizes`."""
    products = np.multiply(halves, sizes, dtype=np.uint64)
    products >>= np.uint64(32)
    return products.view(np.int64)


def _require_positive(n: int, segments: int) -> None:
    if n <= 0:
        raise ValueError(f"cannot choose among {n} frames: there must be at least one")
    if segments <= 0:
        raise ValueError(f"{segments} segments asked for: there must be at least one")
