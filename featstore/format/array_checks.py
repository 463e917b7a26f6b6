"""Rows and frames as callers give them: whole numbers, or an error instead of other rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from featstore.errors import UserError, one_line
from featstore.format.schema import RowArray


def whole_numbers(values: npt.ArrayLike, what: str) -> RowArray:
    """`values` as int64 in their own shape; `what` names them in messages.

    UserError for anything but whole numbers: numpy would take a mask for zeros and ones, and cut
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
