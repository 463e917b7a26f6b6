"""Checks of arrays: row numbers must be whole numbers, and features must be finite."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from featstore.errors import UserError, one_line
from featstore.format.schema import FeatureArray, RowArray

# The float16 infinities as bit patterns.
_INFINITY: Final = 0x7C00
_NEGATIVE_INFINITY: Final = 0xFC00


def whole_numbers(values: npt.ArrayLike, what: str) -> RowArray:
    """Return `values` as int64 in the same shape; `what` names them in messages.

    Raises UserError for anything but whole numbers, because numpy would read a mask as zeros and
    ones, and cut off fractions.
    """
    try:
        found = np.asarray(values)
    except ValueError:  # lists of different lengths
        found = np.asarray(None)
    if found.dtype == np.int64:
        return found
    if found.dtype.kind in "iu" or found.shape == (0,):  # numpy makes floats of []
        return found.astype(np.int64)
    if found.dtype.kind == "b":
        raise UserError(
            f"{what} are a mask: give numbers instead, store.rows[mask] if the mask is over the "
            "samples, else numpy.flatnonzero(mask)"
        )
    shown = one_line(repr(values), 60)
    raise UserError(f"{what} are {shown}: they must be whole numbers, in a list or an array")


def wrong_labels(labels: npt.NDArray[np.int32], classes: int, multi_label: bool = False) -> bool:
    """Return whether any label is not in 0..classes - 1.

    In a store without classes, and with `multi_label`, all must be -1.
    """
    if multi_label:
        return bool((labels != -1).any())
    lowest = 0 if classes else -1
    return bool(((labels < lowest) | (labels >= classes)).any())


def not_finite(features: FeatureArray) -> npt.NDArray[np.bool_]:
    """Return which rows of [n, ...] hold a number that is not finite; bool [n].

    Whole numbers are always finite. Infinities and NaN have all bits of the exponent set, so they
    are the largest bit patterns of their sign. Comparing bit patterns is ten times as fast as
    numpy's test of float16 values, and needs no memory; other types have numpy's test.
    """
    if features.dtype.kind != "f":
        return np.zeros(len(features), np.bool_)
    flat = features.reshape(len(features), -1)
    if features.dtype != np.float16:
        return np.array([not np.isfinite(row).all() for row in flat], np.bool_)
    signed, unsigned = flat.view(np.int16), flat.view(np.uint16)
    if signed.max() < _INFINITY and unsigned.max() < _NEGATIVE_INFINITY:
        return np.zeros(len(features), np.bool_)
    found: npt.NDArray[np.bool_] = signed.max(1) >= _INFINITY
    found |= unsigned.max(1) >= _NEGATIVE_INFINITY
    return found
