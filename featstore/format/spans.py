"""The classes that a video shows where it may show several, and when it shows them.

n = videos, C = classes.

The array `spans` of a store holds a text per row, and the sidecar of a video the same list: JSON of
[label] or [label, start, end], as in `[[3,11.9,21.2],[7]]`. A row without classes has no text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:  # packing reads and writes spans without numpy
    from featstore.format.schema import Shown

MAX_SPANS_BYTES: Final = 2**18
"""The longest text of a row: more than ten thousand spans, ten times what any data set has."""


class Span(NamedTuple):
    """A class that a video shows, from `start` to `end` in seconds; None: the list has no times."""

    label: int
    start: float | None = None
    end: float | None = None

    def to_json(self) -> list[int | float]:
        """The span as a list of numbers."""
        if self.start is None or self.end is None:
            return [self.label]
        return [self.label, self.start, self.end]


def spans_from_json(value: Any, classes: int) -> tuple[Span, ...]:
    """Read a list that `Span.to_json` wrote; ValueError for anything else or a label from C up."""
    if not isinstance(value, list):
        raise ValueError("spans are a list")
    found = []
    for entry in value:
        if not isinstance(entry, list) or len(entry) not in (1, 3):
            raise ValueError("a span is [label] or [label, start, end]")
        label, *times = entry
        if type(label) is not int or not 0 <= label < classes:
            raise ValueError(f"a label of a span lies outside 0..{classes - 1}")
        if not all(type(time) in (int, float) and math.isfinite(time) for time in times):
            raise ValueError("start and end of a span are seconds")
        found.append(Span(label, *map(float, times)))
    return tuple(found)


def spans_text(spans: Iterable[Span]) -> str:
    """Write spans as the text of a row."""
    listed = [span.to_json() for span in spans]
    return json.dumps(listed, separators=(",", ":")) if listed else ""


def spans_of_text(text: str, classes: int) -> tuple[Span, ...]:
    """Read the text of a row; ValueError if `spans_text` cannot have written it."""
    try:
        return spans_from_json(json.loads(text), classes) if text else ()
    except RecursionError as error:
        raise ValueError("spans are nested") from error


def shown_classes(spans: Sequence[Sequence[Span]], classes: int) -> Shown:
    """Return which classes every video shows at any time, bool [n, C]."""
    import numpy as np

    shown = np.zeros((len(spans), classes), np.bool_)
    for row, of_video in zip(shown, spans, strict=True):
        row[[span.label for span in of_video]] = True
    return shown
