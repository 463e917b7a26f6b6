"""What a mirrored clip shows: by the names of the classes, left becomes right.

C = classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from featstore.segments import IntArray

NEVER: Final = -1
_COUNTER: Final = ("counterclockwise", "anticlockwise", "counter-clockwise", "anti-clockwise")
_MIRRORED: Final = {
    "left": "right",
    "right": "left",
    "clockwise": _COUNTER[0],
    **dict.fromkeys(_COUNTER, "clockwise"),
}
_SIDE: Final = re.compile(
    rf"(?<![a-z])({'|'.join(sorted(_MIRRORED, key=len, reverse=True))})(?![a-z])"
)


def mirrored_classes(class_names: Sequence[str]) -> IntArray:
    """Return which class a mirrored clip of each class shows, int64 [C], by the names.

    A name with left or right in it, or with a sense of rotation, is another class in the mirror:
    the one of the mirrored name, or `NEVER` (such a clip must not be mirrored) if there is none.
    Every other class is its own.
    """
    plain = [name.casefold() for name in class_names]
    place = {name: at for at, name in enumerate(plain)}
    found = [
        next((place[other] for other in _mirror_images(name) if other in place), NEVER)
        for name in plain
    ]
    # Both must agree, or a clip would be mirrored into a class whose clips never are.
    both = [at if at != NEVER and found[at] == own else NEVER for own, at in enumerate(found)]
    return np.array(both, np.int64)


def _mirror_images(name: str) -> Iterator[str]:
    for counter in _COUNTER:
        other = _MIRRORED | {"clockwise": counter}
        parts = _SIDE.split(name)  # sides stand between the other parts
        yield "".join(other.get(part, part) for part in parts)


def label_swaps(how: str, class_names: Sequence[str]) -> IntArray | None:
    """Return the `mirrored` of `ClipStream` for a way of mirroring.

    It is `mirrored_classes` for "names", and None for "" and "plain": then any clip may be
    mirrored, and keeps its label.
    """
    return mirrored_classes(class_names) if how == "names" else None
