"""Chooses the frames that are kept of a video of any length, one after the other as they are shown.

Each rule looks at one frame and at when the next one is shown, and at nothing else. So a video is
decoded once, in order, and work that was interrupted goes on at any frame.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, Literal, cast

from featstore.errors import UserError, meant

StreamKind = Literal["fps", "every", "keyframes", "windows"]

KINDS: Final[tuple[StreamKind, ...]] = ("fps", "every", "keyframes", "windows")
SYNTAX: Final = (
    "fps:R (R frames a second), every:N (every N-th frame), keyframes, or windows:SECONDS/STRIDE:F "
    "(F frames of each window of SECONDS, one every STRIDE)"
)
# Some containers round times to milliseconds: a frame that begins so little late is shown in time.
TOLERANCE_S: Final = 0.001
MAX_RATE: Final = 1000.0
MAX_SECONDS: Final = 86_400.0
MAX_COUNT: Final = 100_000

_NUMBER: Final = r"(\d{1,9}(?:\.\d{1,9})?)"
_FORMS: Final[dict[StreamKind, re.Pattern[str]]] = {
    "fps": re.compile(rf"fps:{_NUMBER}"),
    "every": re.compile(r"every:(\d{1,9})"),
    "keyframes": re.compile("keyframes"),
    "windows": re.compile(rf"windows:{_NUMBER}/{_NUMBER}:(\d{{1,9}})"),
}


@dataclass(frozen=True, slots=True)
class ShownFrame:
    """What a rule knows of a frame: its number, when it is shown, whether it is a keyframe."""

    index: int
    seconds: float
    keyframe: bool = False


@dataclass(frozen=True, slots=True)
class StreamSampling:
    """A rule that keeps frames of a stream.

    `numbers` are those of its spelling: R; N; none; or SECONDS, STRIDE and F. Times are counted
    from the first frame. `fps:R` keeps the frame that is on the screen at 0, 1/R, 2/R, ... seconds,
    and a window the one in the middle of each of its F equal parts. A frame is kept once, however
    often it is asked for.
    """

    kind: StreamKind
    numbers: tuple[float, ...] = ()

    @property
    def text(self) -> str:
        """The canonical spelling, which `parse_stream_sampling` reads back."""
        shown = [f"{number:.9f}".rstrip("0").rstrip(".") for number in self.numbers]
        if self.kind == "windows":
            return f"windows:{shown[0]}/{shown[1]}:{shown[2]}"
        return ":".join([self.kind, *shown])

    def keeps(self, frame: ShownFrame, until: float, first: float) -> bool:
        """Return whether a frame is kept that is on the screen until the time `until`.

        `first` is when the video's first frame is shown; all times are seconds on one clock.
        """
        if self.kind == "every":
            return frame.index % int(self.numbers[0]) == 0
        if self.kind == "keyframes":
            return frame.keyframe
        begin, end = (time - first - TOLERANCE_S for time in (frame.seconds, until))
        if self.kind == "fps":
            rate = self.numbers[0]
            return math.ceil(begin * rate) / rate < end if begin > 0 else end > 0
        seconds, stride, count = self.numbers
        part = seconds / count
        for window in range(max(0, math.floor((begin - seconds) / stride)), _windows(end, stride)):
            within = (begin - window * stride) / part - 0.5
            number = max(0, math.ceil(within))
            if number < count and window * stride + (number + 0.5) * part < end:
                return True
        return False


def _windows(end: float, stride: float) -> int:
    """Return how many windows begin before `end`."""
    return max(0, math.ceil(end / stride))


def parse_stream_sampling(text: str) -> StreamSampling | None:
    """Read a rule for streams; None if the text begins with the name of none.

    Raises UserError, which shows the syntax, for a rule that is wrong.
    """
    kind = text.strip().partition(":")[0]
    if kind not in KINDS:
        return None
    found = _FORMS[cast(StreamKind, kind)].fullmatch(text.strip())
    if found is None:
        near = meant(kind, KINDS)
        raise UserError(f"sampling {text!r} is not understood: {near}write {SYNTAX}")
    numbers = tuple(map(float, found.groups()))
    sampling = StreamSampling(cast(StreamKind, kind), numbers)
    limits = {
        "fps": (MAX_RATE,),
        "every": (MAX_COUNT,),
        "keyframes": (),
        "windows": (MAX_SECONDS, MAX_SECONDS, MAX_COUNT),
    }[kind]
    for number, most in zip(numbers, limits, strict=True):
        if not 0 < number <= most:
            raise UserError(
                f"sampling {text!r} has the number {number:g}: it must be above 0, and at most "
                f"{most:g}"
            )
    return sampling
