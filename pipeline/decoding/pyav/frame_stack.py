"""Collects decoded frames in the order of their indices, upright, as RGB."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from pipeline.decoding.contract import DecodeError, Frames

if TYPE_CHECKING:
    from av.sidedata.sidedata import SideData

MAX_BYTES = 2 << 30  # of all chosen frames of a video
MAX_PIXELS = 1 << 26  # of one frame: 8192 x 8192, twice the area of an 8K video frame
UPRIGHT = (1 << 16, 0, 0, 0, 1 << 16)  # the display matrix of a frame that is shown as it is
MAX_SIDE = 12288  # the width of a 12K camera's frame; a longer side is a broken or hostile header


def refuse_large(width: int, height: int) -> None:
    """Raise `DecodeError` for frames larger than any video's."""
    size = f"frames of {width}x{height} pixels are larger than the limit of"
    if max(width, height) > MAX_SIDE:
        raise DecodeError(f"{size} {MAX_SIDE} pixels a side")
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{size} {MAX_PIXELS} pixels")


class FrameStack:
    """Frames of the given indices [n], stored one by one; `missing` holds the indices to come."""

    def __init__(self, frame_indices: npt.ArrayLike) -> None:
        self.indices: npt.NDArray[np.int64] = np.asarray(frame_indices).reshape(-1)
        if self.indices.size and not np.issubdtype(self.indices.dtype, np.integer):
            raise ValueError(f"frame indices must be integers, not {self.indices.dtype}")
        self.indices = self.indices.astype(np.int64)
        if not self.indices.size:
            raise ValueError("no frame indices given: ask for at least one frame")
        if self.indices.min() < 0:
            raise DecodeError(f"there is no frame {self.indices.min()}: indices start at 0")
        self.start_again()
        self.seconds = np.full(len(self.indices), np.nan)
        self._frames: Frames | None = None
        # A reformatter of our own keeps its tables from frame to frame.
        self._reformatter = VideoReformatter()

    def start_again(self) -> None:
        """Count all frames as missing again."""
        self.missing = set(self.indices.tolist())

    def require_within(self, num_frames: int) -> None:
        """Raise `DecodeError` when an index is not below `num_frames`."""
        if self.indices.max() >= num_frames:
            raise DecodeError(
                f"there is no frame {self.indices.max()}: the video has {num_frames} frames"
            )

    def require_size(self, width: int, height: int) -> None:
        """Raise `DecodeError` if the frames do not have the size of the video's first frame."""
        if self.frames.shape[1:3] != (height, width):
            raise DecodeError(
                f"the size changes within the video: the frames asked for are "
                f"{self.frames.shape[2]}x{self.frames.shape[1]}, the first is {width}x{height}"
            )

    def put(self, index: int, frame: VideoFrame, seconds: float) -> None:
        """Store `frame`, shown at `seconds`, wherever `indices` holds `index`."""
        width, height = shown_size(frame)
        refuse_large(width, height)
        if self._frames is None:
            shape = (len(self.indices), height, width, 3)
            if np.prod(shape, dtype=object) > MAX_BYTES:
                raise DecodeError(
                    f"{shape[0]} frames of {width}x{height} need more than the limit of "
                    f"{MAX_BYTES >> 30} GiB"
                )
            self._frames = np.empty(shape, np.uint8)
        if self._frames.shape[1:3] != (height, width):
            raise DecodeError(
                f"the size changes within the video: frame {index} is {width}x{height}, others "
                f"are {self._frames.shape[2]}x{self._frames.shape[1]}"
            )
        # threads=1: by default swscale takes every core, and many videos are decoded at once.
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        places = self.indices == index
        self._frames[places] = _upright(rgb, frame)
        self.seconds[places] = seconds
        self.missing.discard(index)

    @property
    def frames(self) -> Frames:
        """RGB uint8 [n, height, width, 3]; only if no frame is missing."""
        assert self._frames is not None
        assert not self.missing
        return self._frames


def display_matrix(frame: VideoFrame) -> tuple[int, ...]:
    """(a, b, 0, c, d) of x' = a x + c y, y' = b x + d y, as 16.16 fixed-point numbers."""
    matrix = cast("SideData | None", frame.side_data.get("DISPLAYMATRIX"))
    return UPRIGHT if matrix is None else tuple(np.frombuffer(bytes(matrix), np.int32)[:5].tolist())


def _display_axes(frame: VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d) of the display matrix, rounded to right angles."""
    a, b, _, c, d = display_matrix(frame)
    if abs(b) > abs(a):
        return 0, (1 if b > 0 else -1), (1 if c > 0 else -1), 0
    return (1 if a >= 0 else -1), 0, 0, (1 if d >= 0 else -1)


def shown_rotation(frame: VideoFrame) -> int:
    """Degrees clockwise (0, 90, 180, 270) by which the frame is turned to be shown."""
    a, b, _, _ = _display_axes(frame)
    return {(1, 0): 0, (0, 1): 90, (-1, 0): 180, (0, -1): 270}[a, b]


def shown_size(frame: VideoFrame) -> tuple[int, int]:
    """(width, height) of the frame as it is shown."""
    turned = _display_axes(frame)[0] == 0
    return (frame.height, frame.width) if turned else (frame.width, frame.height)


def _upright(rgb: npt.NDArray[np.generic], frame: VideoFrame) -> npt.NDArray[np.generic]:
    """Turn and mirror the picture uint8 [H,W,3] as the display matrix says."""
    a, b, c, d = _display_axes(frame)
    if a == 0:
        rgb, a, d = rgb.transpose(1, 0, 2), c, b
    return rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
