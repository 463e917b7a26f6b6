"""Segment arithmetic: which of n ordered things to take, as pure integer arithmetic.

Used at both ends of the store: `pipeline.sampling` chooses frames of a video with it, training
chooses among the stored frames of a row. It lives here because both may import `featstore`.

The formulas are those of the MoTE reference (Zhu et al., NeurIPS 2024), zero-based.
"""

from __future__ import annotations

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


def _require_positive(n: int, segments: int) -> None:
    if n <= 0:
        raise ValueError(f"cannot choose among {n} frames: there must be at least one")
    if segments <= 0:
        raise ValueError(f"{segments} segments asked for: there must be at least one")
