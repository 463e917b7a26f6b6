"""Fetches videos that a list names by URL."""

from __future__ import annotations

from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Final

from featstore.errors import WorkError, one_line
from featstore.remote.urls import parsed_file

if TYPE_CHECKING:
    from featstore.remote.objects import ObjectFolder

MAX_VIDEO_BYTES: Final = 4 << 30
"""The most bytes of one video that are read into memory."""
_OPEN_FOLDERS: Final = 256


class VideoFetcher:
    """Fetches videos into memory; several threads may share one."""

    def __init__(self) -> None:
        self._folder = lru_cache(_OPEN_FOLDERS)(_opened)
        self._unreachable: dict[str, str] = {}
        self._lock = Lock()

    def fetch(self, url: str) -> bytes | str:
        """Return the bytes of a video, or why it cannot be fetched, after the usual repeats.

        A server that cannot be reached for one video is not tried again for the others. Raises
        UserError if the environment lacks what the URL needs.
        """
        from featstore.remote.objects import UnreachableObject

        folder, name = parsed_file(url)
        host = "/".join(folder.split("/", 3)[:3])
        with self._lock:
            if reason := self._unreachable.get(host):
                return reason
        try:
            return self._folder(folder).get_bytes(name, MAX_VIDEO_BYTES)
        except UnreachableObject as error:
            with self._lock:
                self._unreachable[host] = one_line(error)
            return one_line(error)
        except WorkError as error:
            return one_line(error)


def _opened(folder: str) -> ObjectFolder:
    from featstore.remote.objects import folder_at

    return folder_at(folder)
