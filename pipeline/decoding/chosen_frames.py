"""Decodes chosen frames of one video; extraction and training both use it.

T chosen frames, H, W height and width of the picture.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from featstore.errors import one_line
from featstore.segments import IntArray
from pipeline.decoding.contract import DecodeError, Decoder, Frames, Source, VideoInfo
from pipeline.preprocessing import ResizeMode, resized_size

logger = logging.getLogger(__name__)

# The largest size of a resized frame. Without a limit, a strip of 8192x2 pixels whose short side is
# resized to the encoder's input would become a picture of 600 MB.
MAX_RESIZED_PIXELS = 1 << 22


def within_limit(
    choose: Callable[[VideoInfo], IntArray],
    size: tuple[int, int],
    resize_mode: ResizeMode = "shortest",
) -> Callable[[VideoInfo], IntArray]:
    """Return a `choose` that raises `DecodeError` if resized frames would become too large.

    `size` and `resize_mode` say how frames are resized, see `Preprocessing`.
    """

    def checked(found: VideoInfo) -> IntArray:
        height, width = resized_size(found.height, found.width, size, resize_mode)
        if height * width > MAX_RESIZED_PIXELS:
            raise DecodeError(
                f"frames of {found.width}x{found.height} pixels would be resized to "
                f"{width}x{height}, more than the limit of {MAX_RESIZED_PIXELS} pixels"
            )
        return choose(found)

    return checked


def decode_chosen(
    source: Source,
    decoder: Decoder,
    choose: Callable[[VideoInfo], IntArray],
    size: tuple[int, int],
    resize_mode: ResizeMode = "shortest",
) -> tuple[VideoInfo, Frames, npt.NDArray[np.float64]]:
    """Decode the frames int64 [T] that `choose` gives.

    Returns (info, RGB uint8 [T,H,W,3], seconds float64 [T]). `size` and `resize_mode` are as in
    `within_limit`, `choose` as in `Decoder.decode_with_info`. Raises `DecodeError`, also for frames
    that would become too large and for any other error of the decoder, so that only this video
    fails and the others go on.
    """
    try:
        info, frames, seconds = decoder.decode_with_info(
            source, within_limit(choose, size, resize_mode)
        )
        for height, width, _ in {frame.shape for frame in frames} if info.other_sizes else ():
            within_limit(choose, size, resize_mode)(replace(info, width=width, height=height))
        return info, frames, seconds
    except DecodeError:
        raise
    except Exception as error:
        # One file must not stop the work on all the others; its error is recorded.
        logger.exception("unexpected error of the decoder: %s", one_line(error))
        raise DecodeError(one_line(f"{type(error).__name__}: {error}")) from error
