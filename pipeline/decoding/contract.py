"""What a decoder is: the same file and indices give the same frames, or a `DecodeError`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]
Source = bytes | Path | BinaryIO

# What is done about damage inside a file. "auto": damage that the H.264 and HEVC decoders notice
# fails the video. "always": every sign of damage in any codec fails it, and every frame is decoded
# to look for one. "never": damage is passed over and counted.
Strictness = Literal["auto", "always", "never"]


class DecodeError(Exception):
    """One video cannot be decoded as asked; the rest of the work goes on.

    `reason` is one plain line without file names or addresses: it is stored beside the sample.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What is known of a video before frames are chosen.

    `num_frames` is the number of frames that a decoder really shows; `container_frames` is what
    the container says (0 when it says nothing). `width` and `height` are those of the picture as
    it is shown, that is after the `rotation` (degrees clockwise: 0, 90, 180 or 270) is applied.
    `damaged_packets` counts the packets passed over because they could not be read or decoded, or
    only with errors that the decoder reports. Damage in packets that were not needed for the frames
    asked for is not looked for, except with strictness "always".
    """

    num_frames: int
    fps: float
    width: int
    height: int
    codec: str
    duration_s: float
    container_frames: int
    rotation: int
    damaged_packets: int = 0


ChooseFrames = Callable[[VideoInfo], npt.ArrayLike]


class Decoder(Protocol):
    """Decodes chosen frames of one video; holds no open file, so threads may share one."""

    @property
    def name(self) -> str:
        """Short name for provenance."""
        ...

    def decode_with_info(
        self, source: Source, choose: ChooseFrames
    ) -> tuple[VideoInfo, Frames, npt.NDArray[np.float64]]:
        """Count the frames, let `choose` pick indices [n], and decode those; read the file once.

        Indices are zero-based in display order; any order and repeats are allowed. Returns (info,
        RGB uint8 [n, height, width, 3] in the order asked, seconds float64 [n]); the seconds are
        presentation times on the container's clock (frame number / fps in AVI, which has none).
        `choose` should depend on nothing but its argument: where only decoding can count the
        frames, it is called with the likely count first, and again if that was wrong.
        Raises `DecodeError` when a frame asked for does not exist or cannot be produced.
        """
        ...
