"""Chooses the frames that are taken of a video, by arithmetic on the number of its frames.

The formulas are those of the MoTE reference (Zhu et al., NeurIPS 2024), zero-based, including its
quirks: they decide which pixels the published numbers were measured on. Every function raises
ValueError for fewer than one frame or segment.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from featstore.errors import UserError, meant
from featstore.segments import IntArray, segment_positions, segment_ranges

Kind = Literal["uniform", "clips", "dense", "dist", "middle"]
_ONE_CLIP = ("uniform", "middle")
FloatArray = npt.NDArray[np.float32]

DENSE_SPAN = 128  # frames that one clip of dense sampling covers
MAX_FRAMES = 4096  # of one video in a store; far above any published protocol

SYNTAX = (
    "uniform:F (F frames over the whole video), clips:TxV (V clips of T frames each over the "
    "whole video), dense:TxV (V windows of 128 frames, T frames of each), dist:TxV (V clips of "
    "one frame from each of T segments, as DiST tests) or middle:F (the middle frames of F "
    "segments, as ViCLIP is evaluated)"
)


def validation_indices(n: int, segments: int) -> IntArray:
    """Indices of one clip over the whole video: int(n/segments*k) mod n, int64 [segments]."""
    return segment_positions(n, segments)


def test_indices(n: int, segments: int, clips: int, dense: bool = False) -> IntArray:  # noqa: PT028
    """Indices of `clips` clips of `segments` frames each, of `n` frames: int64 [clips, segments].

    Uniform: clip j starts at floor(linspace(0, n/segments - 1, clips)[j]) and takes every
    n/segments-th frame, modulo n. With n < segments later clips start at -1, so that their first
    frame is the last of the video, as in the reference under NumPy 1.20 and later.
    Dense: windows of 128 frames, stride 128 // segments, modulo n. The reference divides by zero
    for a single dense clip; here that is a ValueError.
    """
    if n <= 0 or segments <= 0 or clips <= 0:
        raise ValueError(
            f"frames, segments and clips must be positive, not {n}, {segments} and {clips}"
        )
    steps = np.arange(segments)
    if dense:
        if clips == 1:
            raise ValueError("dense sampling needs at least 2 clips")
        starts = np.arange(clips) * (max(0, n - DENSE_SPAN) // (clips - 1))
        return (starts[:, None] + steps * (DENSE_SPAN // segments)).astype(np.int64) % n
    starts = np.floor(np.linspace(0, n / segments - 1, clips))
    return np.trunc(starts[:, None] + n / segments * steps).astype(np.int64) % n


# pytest would otherwise take the function for a test wherever it is imported.
test_indices.__test__ = False  # type: ignore[attr-defined]


def train_ranges(n: int, segments: int) -> IntArray:
    """Inclusive (lo, hi) of every segment for random sampling in training: int64 [segments, 2]."""
    return np.stack(segment_ranges(n, segments), axis=-1)


def dense_train_starts(n: int) -> tuple[int, int]:
    """Inclusive (lo, hi) of the first frame of a dense training window.

    The reference leaves out the last start at which the window still fits.
    """
    if n <= 0:
        raise ValueError(f"cannot choose among {n} frames: there must be at least one")
    return 0, max(0, n - DENSE_SPAN - 1)


def dense_train_indices(n: int, segments: int, start: int) -> IntArray:
    """A dense training clip from `start`: int64 [segments], stride 128 // segments, modulo n."""
    if n <= 0 or segments <= 0:
        raise ValueError(f"frames and segments must be positive, not {n} and {segments}")
    return (start + np.arange(segments) * (DENSE_SPAN // segments)) % n


def dist_edges(n: int, segments: int) -> FloatArray:
    """Edges of the segments of `n` frames in DiST's sampling, float32 [segments + 1], from 0 to n.

    Source: DiST (Qing et al., ICCV 2023), its released code, which works in single precision.
    """
    if n <= 0 or segments <= 0:
        raise ValueError(f"frames and segments must be positive, not {n} and {segments}")
    return np.linspace(0, n, segments + 1, dtype=np.float32)


def dist_train_indices(n: int, segments: int, draws: Sequence[float] | FloatArray) -> IntArray:
    """DiST's training frames: int64 [segments], each at the share `draws` of its segment.

    `draws` [segments] are even from 0 to 1. Places are rounded half to even, so that a segment can
    give the first frame of the next one.
    """
    edges = dist_edges(n, segments)
    places = edges[:-1] + np.diff(edges) * np.asarray(draws, np.float32)
    return _nearest(places, n)


def dist_test_indices(n: int, segments: int, clips: int) -> IntArray:
    """DiST's test frames: int64 [clips, segments].

    Clip k of V takes the place (k + 1) / V of every segment, the last one its right end; a single
    clip takes the middle.
    """
    edges = dist_edges(n, segments)
    if clips == 1:
        return _nearest((edges[:-1] + edges[1:]) / 2, n)[None]
    steps = np.arange(1, clips + 1)[:, None].astype(np.float32)
    return _nearest(edges[:-1] + np.diff(edges) * steps / np.float32(clips), n)


def middle_indices(n: int, segments: int) -> IntArray:
    """The middle frame of each of `segments` segments: int64 [segments].

    Edges are whole numbers, and a segment of even length gives the earlier of its two middles. Of
    a video with fewer frames than segments the last frame is repeated. Source: the evaluation of
    ViCLIP (Wang et al., ICLR 2024) in its training repository.
    """
    if n <= 0 or segments <= 0:
        raise ValueError(f"frames and segments must be positive, not {n} and {segments}")
    edges = np.linspace(0, n, min(n, segments) + 1).astype(np.int64)
    middles: IntArray = (edges[:-1] + edges[1:] - 1) // 2
    return np.pad(middles, (0, segments - len(middles)), mode="edge")


def _nearest(places: npt.NDArray[np.floating], n: int) -> IntArray:
    nearest: IntArray = np.rint(np.clip(places, 0, n - 1)).astype(np.int64)
    return nearest


@dataclass(frozen=True, slots=True)
class Sampling:
    """A way of taking `clips` clips of `frames` frames; `text` is how it is written in options."""

    kind: Kind
    frames: int
    clips: int

    @property
    def text(self) -> str:
        """The canonical spelling, which `parse_sampling` reads back."""
        if self.kind in _ONE_CLIP:
            return f"{self.kind}:{self.frames}"
        return f"{self.kind}:{self.frames}x{self.clips}"

    def indices(self, num_frames: int) -> IntArray:
        """Frame indices of a video: int64 [clips, frames], each in [0, num_frames)."""
        if self.kind == "uniform":
            return validation_indices(num_frames, self.frames)[None]
        if self.kind == "middle":
            return middle_indices(num_frames, self.frames)[None]
        if self.kind == "dist":
            return dist_test_indices(num_frames, self.frames, self.clips)
        return test_indices(num_frames, self.frames, self.clips, dense=self.kind == "dense")


@dataclass(frozen=True, slots=True)
class Windows:
    """Takes `frames` frames, as `kind` does, from each of the windows between two `bounds`.

    Window k are the frames from `bounds[k]` to before `bounds[k + 1]`, as `window_bounds` gives
    them for a video.
    """

    bounds: tuple[int, ...]
    frames: int
    kind: Kind = "uniform"

    def indices(self, num_frames: int) -> IntArray:
        """Frame indices int64 [windows, frames], each below `num_frames`, the video's frames."""
        how = Sampling(self.kind, self.frames, 1)
        chosen = [first + how.indices(after - first)[0] for first, after in pairwise(self.bounds)]
        stacked: IntArray = np.stack(chosen)
        return np.minimum(stacked, num_frames - 1)


def window_bounds(num_frames: int, fps: float, seconds: float) -> tuple[int, ...]:
    """Cut a video into windows of `seconds`: the first frame of each, and `num_frames` at the end.

    A rest of less than half a window belongs to the last one; a window has at least one frame.
    """
    step = max(1.0, seconds * fps)
    windows = max(1, round(num_frames / step))
    return (*(int(number * step) for number in range(windows)), num_frames)


def parse_sampling(text: str) -> Sampling:
    """Read `uniform:16`, `clips:8x4` or `dense:8x4`. Raises UserError that shows the syntax."""
    match = re.fullmatch(
        r"(uniform|middle|clips|dense|dist):([0-9]{1,18})(?:x([0-9]{1,18}))?", text.strip()
    )
    if match is None or (match[1] in _ONE_CLIP) != (match[3] is None):
        near = meant(text.partition(":")[0], get_args(Kind))
        raise UserError(f"sampling {text!r} is not understood: {near}write {SYNTAX}")
    kind = cast(Kind, match[1])
    sampling = Sampling(kind, int(match[2]), int(match[3] or 1))
    if not 1 <= sampling.frames * sampling.clips <= MAX_FRAMES:
        raise UserError(
            f"sampling {text!r} takes {sampling.frames * sampling.clips} frames of a video: ask "
            f"for 1 to {MAX_FRAMES}"
        )
    if sampling.kind == "dense" and (sampling.clips == 1 or sampling.frames > DENSE_SPAN):
        raise UserError(
            f"sampling {text!r}: dense sampling needs at least 2 clips of at most {DENSE_SPAN} "
            "frames; use clips:TxV for a single one"
        )
    return sampling
