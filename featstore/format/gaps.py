"""What is missing of a video in a store of sequences: damaged stretches, and why they are missing.

The array `gaps` holds a text per row: JSON of [start, end, reason], times in seconds on the clock
of `pts`, as in `[[61.2,63.2,"damaged"]]`. A row without gaps has no text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import NamedTuple


class Gap(NamedTuple):
    """No frame that is shown after `start` and before `end` (in seconds) could be had."""

    start: float
    end: float
    reason: str


def gaps_text(gaps: Iterable[Gap]) -> str:
    """Write gaps as the text of a row."""
    listed = [[*gap] for gap in gaps]
    return json.dumps(listed, separators=(",", ":"), allow_nan=False) if listed else ""


def gaps_of_text(text: str) -> tuple[Gap, ...]:
    """Read the text of a row; ValueError if `gaps_text` cannot have written it."""
    try:
        listed = json.loads(text) if text else []
    except RecursionError as error:
        raise ValueError("gaps are nested") from error
    if not isinstance(listed, list):
        raise ValueError("gaps are a list")
    found = []
    for entry in listed:
        if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[2], str):
            raise ValueError("a gap is [start, end, reason]")
        times = entry[:2]
        if not all(type(time) in (int, float) and math.isfinite(time) for time in times):
            raise ValueError("start and end of a gap are seconds")
        found.append(Gap(float(times[0]), float(times[1]), entry[2]))
    return tuple(found)
