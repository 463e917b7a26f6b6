"""Checks that a video gives frames, and reads what is recorded about it, in several threads."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from featstore.errors import one_line
from pipeline.decoding.contract import DecodeError
from pipeline.decoding.pyav import PyAVDecoder

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def probe(data: bytes, name: str) -> tuple[dict[str, Any], str]:
    """Return what a sidecar says of a video file, or {} and the reason why it cannot be used.

    `name` is the file's, for the log.
    """
    if not data:
        return {}, "the file is empty (zero bytes)"
    try:
        # Extraction judges damage inside a file (--strict-decode). Here frames are only counted,
        # and videos that have none are left out.
        info = PyAVDecoder("never").probe(data)
    except DecodeError as error:
        return {}, one_line(error.reason)
    except Exception as error:
        # One bad file must not stop hundreds of thousands of others; its failure is recorded.
        logger.exception("unexpected error in %s", name)
        return {}, one_line(f"{type(error).__name__}: {error}")
    if info.num_frames < 1:
        return {}, "the video has no frames"
    return {
        "num_frames": info.num_frames,
        "fps": info.fps,
        "width": info.width,
        "height": info.height,
        "duration_s": info.duration_s,
        "codec": info.codec,
        **({"leading_pictures": info.leading_pictures} if info.leading_pictures else {}),
    }, ""


def in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    window: int,
) -> Iterator[_Result]:
    """Yield results in the order of `items`; at most `window` are begun and not yet taken."""
    begun: deque[Future[_Result]] = deque()
    for item in items:
        begun.append(pool.submit(function, item))
        if len(begun) >= window:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()
