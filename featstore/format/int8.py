"""Convert features to int8 with one scale per dimension, and back to float16.

There is one scale per dimension and not per frame, because CLIP's embeddings have a few dimensions
that are many times larger than the rest; a common range would leave the rest almost no steps.

Dimension letters: D dim. There may be any number of leading axes.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from featstore.format.schema import INT8_MISSING, FloatArray, HalfArray

STEPS: Final = 127


def scale_of(largest: npt.NDArray[Any]) -> FloatArray:
    """Return the scale, float32 [D], of dimensions whose largest absolute value is `largest` [D].

    The scale is 1 for a dimension that is always zero.
    """
    scale = (np.asarray(largest, np.float64) / STEPS).astype(np.float32)
    positive: FloatArray = np.where(scale > 0, scale, np.float32(1))
    return positive


def quantise(features: HalfArray, scale: FloatArray) -> npt.NDArray[np.int8]:
    """Convert float16 [..., D] to int8 of the same shape; NaN becomes -128.

    Values beyond 127 steps are clipped, which happens only if the scale is of other features.
    """
    missing = np.isnan(features)
    steps = np.rint(np.where(missing, 0, features).astype(np.float32) / scale)
    stored: npt.NDArray[np.int8] = np.clip(steps, -STEPS, STEPS).astype(np.int8)
    stored[missing] = INT8_MISSING
    return stored


def dequantise(stored: npt.NDArray[np.int8], scale: FloatArray) -> HalfArray:
    """Convert int8 [..., D] to float16 of the same shape: multiply in float32, then round.

    IEEE 754 defines both steps exactly, so every machine reads the same numbers.
    """
    features: HalfArray = (stored.astype(np.float32) * scale).astype(np.float16)
    features[stored == INT8_MISSING] = np.nan
    return features
