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
Places = npt.NDArray[np.int64] | npt.NDArray[np.int32]

# Numbers that are computed at once, which stay in a core's nearer caches.
_AT_ONCE: Final = 2**14


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

    A number below n is a random 16-bit one times n, divided by 2**16: Lemire's method (ACM TOMACS
    2019) without its rejections, which would move all that comes after them. The chance of each
    value is within 2**-16 of 1 / n.
    """

    def __init__(self, views: int, stored: int, frames: int) -> None:
        """Samples of `views` views of `stored` frames, `frames` of which are drawn.

        ValueError when there are more than 2**16 to choose one from.
        """
        lowest, highest = segment_ranges(stored, frames)
        sizes = highest - lowest + 1
        most = max(views, int(sizes.max()))
        if most > 2**16:
            raise ValueError(
                f"one of {most} frames or views is to be drawn: at most {2**16} can be"
            )
        self._views, self._stored, self._frames = views, stored, frames
        # A sample's words hold the 16-bit numbers of its frames, then that of its view.
        self._words = -(-(frames + (views > 1)) // 4)
        # Numpy works along long rows: along the eight of a sample it takes four times as long.
        self._at_once = max(1, _AT_ONCE // frames)
        self._lowest = np.tile(lowest.astype(np.int32), self._at_once)
        self._sizes = np.tile(sizes.astype(np.uint32), self._at_once)

    def draw(
        self, stream: Sequence[int], first: int, count: int, starts: Places | None = None
    ) -> Places:
        """Samples first, first + 1, ... of `stream`, which is named by whole numbers >= 0.

        Returns places among the V * F stored frames of a sample, int64 [count, T]: frame f of view
        v, the same view in all of a sample, is v * F + f. `starts` [count] are added, and places
        are of their type, which must hold the sums.
        """
        bits = np.random.PCG64(stream)
        bits.advance(first * self._words)
        if starts is None:
            starts = np.zeros(count, np.int64)
        places: Places = np.empty((count, self._frames), starts.dtype)
        for at in range(0, count, self._at_once):
            part = places[at : at + self._at_once]
            words = bits.random_raw(len(part) * self._words)
            numbers = words.astype("<u8", copy=False).view("<u2").reshape(len(part), -1)
            of_frames = np.ascontiguousarray(numbers[:, : self._frames]).reshape(-1)
            drawn = _below(self._sizes[: part.size], of_frames)
            drawn += self._lowest[: part.size]
            begins = starts[at : at + self._at_once, None]
            if self._views > 1:
                views = _below(np.uint32(self._views), numbers[:, self._frames, None])
                begins = begins + views * np.int32(self._stored)
            # Summed while the numbers are in the nearer caches.
            np.add(drawn.reshape(part.shape), begins, out=part)
        return places


def _below(
    sizes: npt.NDArray[np.uint32] | np.uint32, numbers: npt.NDArray[np.uint16]
) -> npt.NDArray[np.int32]:
    """Random 16-bit numbers as numbers below `sizes`, which are 2**16 at most."""
    products = np.multiply(numbers, sizes, dtype=np.uint32)
    products >>= np.uint32(16)
    return products.view(np.int32)


def _require_positive(n: int, segments: int) -> None:
    if n <= 0:
        raise ValueError(f"cannot choose among {n} frames: there must be at least one")
    if segments <= 0:
        raise ValueError(f"{segments} segments asked for: there must be at least one")
