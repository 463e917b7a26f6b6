"""What a store holds for one tar: the rows of its samples.

Dimension letters: n samples of the tar (or frames), V views, F frames, D dim, in tiers the item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from featstore.errors import WorkError
from featstore.format.array_checks import not_finite
from featstore.format.gaps import Gap, gaps_text
from featstore.format.schema import GAPS, SPANS, STATUS_FAILED, STATUS_OK, FeatureArray
from featstore.format.spans import Span, spans_text
from featstore.writing.shard_rows import FeatureRows


@dataclass(frozen=True, eq=False, kw_only=True)
class ListedSamples:
    """What every partition says of the n listed samples of its tar, failed ones included.

    `label` int32 [n]; `num_frames` int32 [n]; `fps` float32 [n]; `status` uint8 [n] (1 ok, 2
    failed); `splits` uint32 [n] (bit i is set if the sample belongs to split i); `container_frames`
    int32 [n], the number of frames that the container states, 0 if it states none;
    `damaged_packets` int32 [n], how many the decoder skipped; both are 0 for failed samples;
    `reason`, why a sample failed, else "". `spans` are the classes that every sample shows, in a
    store where it may show several: then every `label` is -1. Raises ValueError if lengths, shapes
    or statuses do not fit.
    """

    key: list[str]
    label: npt.NDArray[np.int32]
    num_frames: npt.NDArray[np.int32]
    fps: npt.NDArray[np.float32]
    status: npt.NDArray[np.uint8]
    splits: npt.NDArray[np.uint32]
    container_frames: npt.NDArray[np.int32]
    damaged_packets: npt.NDArray[np.int32]
    reason: list[str]
    spans: Sequence[Sequence[Span]] | None = None

    def __post_init__(self) -> None:
        n = len(self.key)
        if n == 0 or len(set(self.key)) != n:
            raise ValueError("a partition needs at least one sample and distinct keys")
        if len(self.reason) != n:
            raise ValueError("there must be as many reasons as keys")
        if self.spans is not None and len(self.spans) != n:
            raise ValueError(f"{n} samples need as many lists of spans, not {len(self.spans)}")
        types: dict[str, type[np.generic]] = {
            "label": np.int32,
            "num_frames": np.int32,
            "fps": np.float32,
            "status": np.uint8,
            "splits": np.uint32,
            "container_frames": np.int32,
            "damaged_packets": np.int32,
        }
        for name, dtype in types.items():
            require_array(name, getattr(self, name), dtype, (n,))
        if not np.all((self.status == STATUS_OK) | (self.status == STATUS_FAILED)):
            raise ValueError("every sample of a partition must be ok (1) or failed (2)")

    def column(self, name: str) -> Any:
        """Return the values of a small array; spans as their texts."""
        if name == SPANS:
            return [spans_text(spans) for spans in self.spans or ()]
        return getattr(self, name)


@dataclass(frozen=True, eq=False, kw_only=True)
class Partition(ListedSamples):
    """The n listed samples of one tar in the tar's order, including those that failed.

    `frame_index` int32 [n, V, F]; `pts` float64 [n, V, F] in seconds; `features` float16
    [n, V, F, D], or [n, V, F, *item] in the type of a tier, or `FeatureRows` into which the ok rows
    were put. A failed row has features and pts NaN (features of whole numbers: 0) and frame_index
    -1. Raises ValueError as `ListedSamples`, WorkError if the features of an ok row are not finite.
    """

    frame_index: npt.NDArray[np.int32]
    pts: npt.NDArray[np.float64]
    features: FeatureArray | FeatureRows

    def __post_init__(self) -> None:
        super().__post_init__()
        n = len(self.key)
        if len(self.features.shape) < 4:
            raise ValueError("features must be [n, V, F, ...]")
        views, frames = self.features.shape[1:3]
        of_features = np.uint8 if self.features.dtype == np.uint8 else np.float16
        require_array("frame_index", self.frame_index, np.int32, (n, views, frames))
        require_array("pts", self.pts, np.float64, (n, views, frames))
        require_array("features", self.features, of_features, (n, *self.features.shape[1:]))
        failed = self.status == STATUS_FAILED
        if isinstance(self.features, FeatureRows):
            if np.any(self.features.written == failed):
                raise ValueError("features must be put for all ok samples and for no others")
        else:
            wrong = not_finite(self.features) & ~failed
            if wrong.any():
                raise WorkError(
                    f"features of {self.key[int(wrong.argmax())]} are not finite in float16: the "
                    "encoder overflows; use --precision fp32 or check the weights"
                )
            for row in (self.features[i] for i in np.flatnonzero(failed)):
                if not (np.isnan(row) if row.dtype.kind == "f" else row == 0).all():
                    raise ValueError("features of a failed sample must be NaN (whole numbers: 0)")
        if np.any(self.frame_index[failed] != -1):
            raise ValueError("frame_index of a failed sample must be -1")

    @property
    def rows(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """The type and the shape of a row of features."""
        return self.features.dtype, tuple(self.features.shape[1:])


class SomeFrames(NamedTuple):
    """Successive frames: features [n, ...], `pts` float64 [n] and `frame_index` int32 [n]."""

    features: FeatureArray
    pts: npt.NDArray[np.float64]
    frame_index: npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False, kw_only=True)
class SequencePartition(ListedSamples):
    """The same of sequences: `length` int64 [n] frames each, none exactly in a failed row.

    `frames` yields the frames of all rows, one row after the other, in portions of any size, each
    of frames of one row; it is called once. The frames of a row ascend in `pts`. `gaps` are the
    damaged stretches of every sample. Raises ValueError as `ListedSamples`.
    """

    length: npt.NDArray[np.int64]
    gaps: Sequence[Sequence[Gap]]
    frames: Callable[[], Iterator[SomeFrames]]

    def __post_init__(self) -> None:
        super().__post_init__()
        require_array("length", self.length, np.int64, (len(self.key),))
        if len(self.gaps) != len(self.key):
            raise ValueError("there must be as many lists of gaps as keys")
        if (self.length < 0).any() or ((self.length == 0) != (self.status != STATUS_OK)).any():
            raise ValueError("a sample that is ok has frames, and one that failed has none")

    @property
    def first_frame(self) -> npt.NDArray[np.int64]:
        """Where every row begins among the partition's frames, int64 [n]."""
        first: npt.NDArray[np.int64] = np.cumsum(self.length) - self.length
        return first

    def column(self, name: str) -> Any:
        """Return the values of a small array; spans and gaps as their texts."""
        if name == GAPS:
            return [gaps_text(gaps) for gaps in self.gaps]
        return super().column(name)

    def checked_frames(self) -> Iterator[SomeFrames]:
        """Yield `frames`, and see that they are as they must be.

        Raises WorkError if a feature is not finite, ValueError if a portion belongs to two rows,
        if times descend, or if there are not as many frames as `length` says.
        """
        edges = np.cumsum(self.length)
        at, row, before = 0, -1, -np.inf
        for some in self.frames():
            if not len(some.pts):
                continue
            now = int(np.searchsorted(edges, at, side="right"))
            at += len(some.pts)
            if now >= len(edges) or at > edges[now]:
                raise ValueError("frames belong to two rows, or to none")
            before = before if now == row else -np.inf
            row = now
            if not np.isfinite(some.pts).all() or (np.diff(some.pts, prepend=before) < 0).any():
                raise ValueError(f"the times of {self.key[row]} descend")
            before = some.pts[-1]
            if not_finite(some.features).any():
                raise WorkError(
                    f"features of {self.key[row]} are not finite: the encoder overflows; use "
                    "--precision fp32 or check the weights"
                )
            yield some
        if at != (edges[-1] if len(edges) else 0):
            raise ValueError(f"{at} frames were given, {edges[-1]} are listed")


def require_array(
    name: str,
    array: npt.NDArray[Any] | FeatureRows,
    dtype: type[np.generic],
    shape: tuple[int, ...],
) -> None:
    """Raise ValueError unless an array has this type and shape."""
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(
            f"{name} is {array.dtype} {list(array.shape)}: it must be {np.dtype(dtype)} "
            f"{list(shape)}"
        )
