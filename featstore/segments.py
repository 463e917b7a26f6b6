"""Segment arithmetic: which of n ordered things to take, as pure integer arithmetic.

Both ends of the store use it: `pipeline.sampling` chooses frames of a video, and training chooses
among the stored frames of a row. It lives here because both may import `featstore`.

The formulas are those of the MoTE reference (Zhu et al., NeurIPS 2024), zero-based.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Places = npt.NDArray[np.int64] | npt.NDArray[np.int32]

# How many numbers are computed at once: so few that they stay in a core's nearer caches.
_AT_ONCE: Final = 2**14


def segment_positions(n: int, segments: int) -> IntArray:
    """Return `segments` evenly spaced positions among n; position k is int(n/segments*k) mod n.

    The result is int64 [segments], each in [0, n). If n < segments, positions repeat.
    Raises ValueError when n or `segments` is not positive.
    """
    _require_positive(n, segments)
    steps = np.arange(segments, dtype=np.float64)
    return (n / segments * steps).astype(np.int64) % n


def segment_ranges(n: int, segments: int) -> tuple[IntArray, IntArray]:
    """Return the inclusive bounds of segments for random sampling: lo and hi, int64 [segments].

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

    A stream is the sequence of 64-bit words that numpy's PCG64 makes from the stream's seed. Each
    sample has its own place in the stream, so any range of samples can be drawn without the
    earlier ones, and a sample's draws do not depend on how the range is cut.

    A number below n is a random 16-bit number times n, divided by 2**16: Lemire's method (ACM
    TOMACS 2019) without its rejections, which would shift all later numbers. The chance of each
    value is within 2**-16 of 1 / n.
    """

    def __init__(self, views: int, stored: int, frames: int) -> None:
        """Draw `frames` of the `stored` frames of one of `views` views.

        Raises ValueError if one would be drawn from more than 2**16 frames or views.
        """
        lowest, highest = segment_ranges(stored, frames)
        sizes = highest - lowest + 1
        most = max(views, int(sizes.max()))
        if most > 2**16:
            raise ValueError(
                f"cannot draw one of {most} frames or views: at most {2**16} are possible"
            )
        self._views, self._stored, self._frames = views, stored, frames
        # A sample's words hold the 16-bit numbers of its frames, then the number of its view.
        self._words = -(-(frames + (views > 1)) // 4)
        # Numpy works along long rows: along the eight of a sample it takes four times as long.
        self._at_once = max(1, _AT_ONCE // frames)
        self._lowest = np.tile(lowest.astype(np.int32), self._at_once)
        self._sizes = np.tile(sizes.astype(np.uint32), self._at_once)

    def draw(
        self, stream: Sequence[int], first: int, count: int, starts: Places | None = None
    ) -> Places:
        """Draw samples first, first + 1, ... of `stream`, whose seed is whole numbers >= 0.

        Returns places among the V * F stored frames of a sample, int64 [count, T]: frame f of view
        v is v * F + f, and all frames of a sample have one view. `starts` [count] are added to the
        places, which then have the type of `starts`; it must be able to hold the sums.
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
    """Turn random 16-bit numbers into numbers below `sizes`, which are at most 2**16."""
    products = np.multiply(numbers, sizes, dtype=np.uint32)
    products >>= np.uint32(16)
    return products.view(np.int32)


def _require_positive(n: int, segments: int) -> None:
    if n <= 0:
        raise ValueError(f"cannot choose among {n} frames: there must be at least one")
    if segments <= 0:
        raise ValueError(f"{segments} segments asked for: there must be at least one")
