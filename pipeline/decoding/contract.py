"""What a decoder must do: give the same frames for the same file and indices, or `DecodeError`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.uint8]
Source = bytes | Path | BinaryIO

# How damage inside a file is treated. "auto": a video fails if a frame that is asked for, or one
# that it leans on, could not be decoded soundly. "always": a video fails at any sign of damage, and
# every frame is decoded to look for it. "never": damaged packets are skipped and counted.
Strictness = Literal["auto", "always", "never"]


class DecodeError(Exception):
    """One video cannot be decoded; the work on the others continues.

    `reason` is one plain line without file names or addresses: it is stored beside the sample.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What is known of a video before frames are chosen.

    `num_frames` is how many frames decoding really gives; `container_frames` is the number that the
    container states (0 if it states none). `width` and `height` are those of the picture as it is
    shown, after the `rotation` (degrees clockwise: 0, 90, 180 or 270) is applied.
    `damaged_packets` counts the packets skipped because they could not be read or decoded, or only
    with errors that the decoder reports. Packets that the chosen frames do not need are not checked
    for damage, except with strictness "always"; `checked_packets` counts those that were.
    `leading_pictures` counts the pictures at the start of a stream that was cut inside a group of
    pictures: they lean on what is missing, so they are no frames. `other_sizes` counts the chosen
    frames that have another size than the first of the video. `alpha_left_out`: how transparent the
    pictures are lies in a second stream, which is not decoded (VP8 and VP9).
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
    checked_packets: int = 0
    leading_pictures: int = 0
    other_sizes: int = 0
    alpha_left_out: bool = False

    def oddities(self) -> str:
        """What is unusual about the video and was dealt with, "" if there is nothing to say."""
        found = {
            "leading pictures skipped": self.leading_pictures,
            "frames of another size than the first": self.other_sizes,
        }
        lines = [f"{what}: {count}" for what, count in found.items() if count]
        if self.alpha_left_out:
            lines.append("transparency left out")
        return "; ".join(lines)

    def remarks(self) -> str:
        """What a row should say of a video that was decoded, "" if there is nothing to say."""
        lines = [self.oddities()] if self.oddities() else []
        if self.checked_packets < self.num_frames:
            lines.append(f"{self.checked_packets} of {self.num_frames} frames looked at for damage")
        return "; ".join(lines)


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
        RGB uint8 [n, height, width, 3] in the order given, seconds float64 [n]). Where chosen
        frames differ in size, the array has dtype object and shape [n], and its elements are
        pictures uint8 [their height, their width, 3]. The seconds are
        presentation times on the container's clock (frame number / fps in AVI, which has none).
        `choose` should depend on nothing but its argument: where only decoding can count the
        frames, it is called with the likely count first, and again if that was wrong.
        Raises `DecodeError` when a frame asked for does not exist or cannot be produced.
        """
        ...
