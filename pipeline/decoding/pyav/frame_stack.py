"""Collects decoded frames in the order of their indices, upright, as RGB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

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
        self.seconds = np.full(len(self.indices), np.nan)
        self._upright: bool | None = None  # whether the first frame is; None before it
        self.start_again()
        # A reformatter of our own keeps its tables from frame to frame.
        self._reformatter = VideoReformatter()

    def start_again(self) -> None:
        """Count all frames as missing again."""
        self.missing = set(self.indices.tolist())
        self._pictures: dict[int, npt.NDArray[np.uint8]] = {}  # by their place among the indices
        self._frames: Frames
        self._bytes = 0

    def require_within(self, num_frames: int) -> None:
        """Raise `DecodeError` when an index is not below `num_frames`."""
        if self.indices.max() >= num_frames:
            raise DecodeError(
                f"there is no frame {self.indices.max()}: the video has {num_frames} frames"
            )

    def put(self, index: int, frame: VideoFrame, seconds: float) -> None:
        """Store `frame`, shown at `seconds`, wherever `indices` holds `index`."""
        axes = self._axes(frame)
        width, height = _turned_size(frame, axes)
        refuse_large(width, height)
        places = np.flatnonzero(self.indices == index)
        if not self._pictures:
            # Pictures of the first one's size lie in one array, so that nothing is copied later.
            self._bytes = 0
            self._take(len(self.indices), width, height)
            self._frames = np.empty((len(self.indices), height, width, 3), np.uint8)
        rgb = _upright(self._rgb(frame), axes)
        if self._frames.shape[1:3] == (height, width):
            self._frames[places] = rgb
            self._pictures.update((place, self._frames[place]) for place in places.tolist())
        else:
            self._take(1, width, height)
            picture = np.ascontiguousarray(rgb, np.uint8)
            self._pictures.update(dict.fromkeys(places.tolist(), picture))
        self.seconds[places] = seconds
        self.missing.discard(index)

    def _axes(self, frame: VideoFrame) -> tuple[int, int, int, int]:
        """As `_display_axes`, read only where it can be needed.

        Reading it ties a frame to itself, so that its memory is freed late. A file that mirrors
        pictures top to bottom without turning them does so from its first one.
        """
        if self._upright is None or not self._upright or frame.rotation:
            axes = _display_axes(frame)
            if self._upright is None:
                self._upright = axes == (1, 0, 0, 1)
            return axes
        return 1, 0, 0, 1

    def _take(self, count: int, width: int, height: int) -> None:
        """Count the memory of `count` pictures. Raises `DecodeError` if it is too much."""
        self._bytes += count * width * height * 3
        if self._bytes > MAX_BYTES:
            raise DecodeError(
                f"{len(self.indices)} frames of {width}x{height} need more than the limit of "
                f"{MAX_BYTES >> 30} GiB"
            )

    def _rgb(self, frame: VideoFrame) -> npt.NDArray[Any]:
        """The picture uint8 [H,W,3] as it is stored; what is transparent lies on black."""
        clear = any(component.is_alpha for component in frame.format.components)
        form = "rgba" if clear or frame.format.name == "pal8" else "rgb24"
        # threads=1: by default swscale takes every core, and many videos are decoded at once.
        rgb = self._reformatter.reformat(frame, format=form, threads=1).to_ndarray()
        if form == "rgb24":
            return rgb
        opaque = rgb[..., 3:].astype(np.uint16)
        return ((rgb[..., :3] * opaque + 127) // 255).astype(np.uint8)

    def other_sizes(self, width: int, height: int) -> int:
        """How many of the frames do not have this size."""
        sizes = [picture.shape[:2] for picture in self._pictures.values()]
        return len(sizes) - sizes.count((height, width))

    @property
    def frames(self) -> Frames:
        """The frames, only if none is missing: RGB uint8 [n, height, width, 3].

        Where they differ in size, an array [n] of dtype object that holds them one by one.
        """
        assert not self.missing
        pictures = [self._pictures[place] for place in range(len(self.indices))]
        sizes = {picture.shape for picture in pictures}
        if sizes == {self._frames.shape[1:]}:
            return self._frames
        if len(sizes) == 1:
            return np.stack(pictures)
        mixed = np.empty(len(pictures), object)
        mixed[:] = pictures
        return cast(Frames, mixed)


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
    return _turned_size(frame, _display_axes(frame))


def _turned_size(frame: VideoFrame, axes: tuple[int, int, int, int]) -> tuple[int, int]:
    turned = axes[0] == 0
    return (frame.height, frame.width) if turned else (frame.width, frame.height)


def _upright(
    rgb: npt.NDArray[np.generic], axes: tuple[int, int, int, int]
) -> npt.NDArray[np.generic]:
    """Turn and mirror the picture uint8 [H,W,3] as the axes of `_display_axes` say."""
    a, b, c, d = axes
    if a == 0:
        rgb, a, d = rgb.transpose(1, 0, 2), c, b
    return rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
