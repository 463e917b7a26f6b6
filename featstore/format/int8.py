"""Features as int8 with one scale per dimension, and back to float16.

One scale per dimension, not per frame: CLIP's embeddings have a few dimensions that are many times
larger than the rest, and a common range would leave the others almost no steps.

Dimension letters: D dim; any number of leading axes.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from featstore.format.schema import INT8_MISSING, FloatArray, HalfArray

STEPS: Final = 127


def scale_of(largest: npt.NDArray[Any]) -> FloatArray:
    """float32 [D] scale for dimensions whose largest absolute value is `largest` [D].

    1 for a dimension that is always zero.
    """
    scale = (np.asarray(largest, np.float64) / STEPS).astype(np.float32)
    positive: FloatArray = np.where(scale > 0, scale, np.float32(1))
    return positive


def quantise(features: HalfArray, scale: FloatArray) -> npt.NDArray[np.int8]:
    """float16 [..., D] to int8 of the same shape; NaN becomes -128.

    Values beyond 127 steps are cut off, which happens only with a scale of other features.
    """
    missing = np.isnan(features)
    steps = np.rint(np.where(missing, 0, features).astype(np.float32) / scale)
    stored: npt.NDArray[np.int8] = np.clip(steps, -STEPS, STEPS).astype(np.int8)
    stored[missing] = INT8_MISSING
    return stored


def dequantise(stored: npt.NDArray[np.int8], scale: FloatArray) -> HalfArray:
    """int8 [..., D] to float16 of the same shape: the product in float32, then rounded.

    Both steps are exact by IEEE 754, so that every machine reads the same numbers.
    """
    features: HalfArray = (stored.astype(np.float32) * scale).astype(np.float16)
    features[stored == INT8_MISSING] = np.nan
    return features
