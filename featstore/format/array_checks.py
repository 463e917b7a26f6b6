"""What arrays hold: whole numbers where callers name rows, finite ones where features must be."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from featstore.errors import UserError, one_line
from featstore.format.schema import FeatureArray, RowArray

# float16 as bits.
_INFINITY: Final = 0x7C00
_NEGATIVE_INFINITY: Final = 0xFC00


def whole_numbers(values: npt.ArrayLike, what: str) -> RowArray:
    """`values` as int64 in their own shape; `what` names them in messages.

    UserError for anything but whole numbers: numpy would read a mask as zeros and ones, and cut
    fractions off.
    """
    try:
        found = np.asarray(values)
    except ValueError:  # lists of different lengths
        found = np.asarray(None)
    if found.dtype == np.int64:
        return found
    if found.dtype.kind in "iu" or found.shape == (0,):  # [] is of floats
        return found.astype(np.int64)
    if found.dtype.kind == "b":
        raise UserError(
            f"{what} are a mask: give numbers, of a mask over the samples store.rows[mask], else "
            "numpy.flatnonzero(mask)"
        )
    shown = one_line(repr(values), 60)
    raise UserError(f"{what} are {shown}: they must be whole numbers, in a list or an array")


def not_finite(features: FeatureArray) -> npt.NDArray[np.bool_]:
    """Which rows of float16 [n, ...] hold a number that is not finite; bool [n].

    Whole numbers are all finite. Infinities and NaN have all bits of the exponent set: they are the
    largest bit patterns of their sign. Comparing those is ten times as fast as asking for float16
    values, and needs no memory.
    """
    if features.dtype.kind != "f":
        return np.zeros(len(features), np.bool_)
    flat = features.reshape(len(features), -1)
    signed, unsigned = flat.view(np.int16), flat.view(np.uint16)
    if signed.max() < _INFINITY and unsigned.max() < _NEGATIVE_INFINITY:
        return np.zeros(len(features), np.bool_)
    found: npt.NDArray[np.bool_] = signed.max(1) >= _INFINITY
    found |= unsigned.max(1) >= _NEGATIVE_INFINITY
    return found
