"""What a store holds for one tar: the rows of its samples.

Dimension letters: n samples of the tar, V views, F frames, D dim, in tiers the item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import WorkError
from featstore.format.array_checks import not_finite
from featstore.format.schema import SPANS, STATUS_FAILED, STATUS_OK, FeatureArray
from featstore.format.spans import Span, spans_text
from featstore.writing.shard_rows import FeatureRows


@dataclass(frozen=True, eq=False)
class Partition:
    """The n listed samples of one tar in the tar's order, including those that failed.

    `label` int32 [n]; `num_frames` int32 [n]; `fps` float32 [n]; `status` uint8 [n] (1 ok, 2
    failed); `splits` uint32 [n] (bit i is set if the sample belongs to split i); `container_frames`
    int32 [n], the number of frames that the container states, 0 if it states none;
    `damaged_packets` int32 [n], how many the decoder skipped; both are 0 for failed samples;
    `reason`, why a sample failed, else ""; `frame_index` int32 [n, V, F]; `pts` float64 [n, V, F]
    in seconds; `features` float16 [n, V, F, D], or [n, V, F, *item] in the type of a tier, or
    `FeatureRows` into which the ok rows were put. A failed row has features and pts NaN (features
    of whole numbers: 0) and frame_index -1. `spans` are the classes that every sample shows, in a
    store where it may show several: then every `label` is -1. Raises ValueError if lengths, shapes
    or statuses do not fit, WorkError if the features of an ok row are not finite.
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
    frame_index: npt.NDArray[np.int32]
    pts: npt.NDArray[np.float64]
    features: FeatureArray | FeatureRows
    spans: Sequence[Sequence[Span]] | None = None

    def __post_init__(self) -> None:
        n = len(self.key)
        if n == 0 or len(set(self.key)) != n:
            raise ValueError("a partition needs at least one sample and distinct keys")
        if len(self.features.shape) < 4 or len(self.reason) != n:
            raise ValueError("features must be [n, V, F, ...], with as many reasons as keys")
        if self.spans is not None and len(self.spans) != n:
            raise ValueError(f"{n} samples need as many lists of spans, not {len(self.spans)}")
        views, frames = self.features.shape[1:3]
        of_features = np.uint8 if self.features.dtype == np.uint8 else np.float16
        expected: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
            "label": (np.int32, (n,)),
            "num_frames": (np.int32, (n,)),
            "fps": (np.float32, (n,)),
            "status": (np.uint8, (n,)),
            "splits": (np.uint32, (n,)),
            "container_frames": (np.int32, (n,)),
            "damaged_packets": (np.int32, (n,)),
            "frame_index": (np.int32, (n, views, frames)),
            "pts": (np.float64, (n, views, frames)),
            "features": (of_features, (n, *self.features.shape[1:])),
        }
        for name, (dtype, shape) in expected.items():
            array: npt.NDArray[Any] | FeatureRows = getattr(self, name)
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(
                    f"{name} is {array.dtype} {list(array.shape)}: it must be "
                    f"{np.dtype(dtype)} {list(shape)}"
                )
        if not np.all((self.status == STATUS_OK) | (self.status == STATUS_FAILED)):
            raise ValueError("every sample of a partition must be ok (1) or failed (2)")
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

    def column(self, name: str) -> Any:
        """Return the values of a small array; spans as their texts."""
        if name == SPANS:
            return [spans_text(spans) for spans in self.spans or ()]
        return getattr(self, name)
