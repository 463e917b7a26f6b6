"""Small files of a store that may come from anybody: read whole, or refused before they are.

A pipe would keep its reader waiting for ever and a device never ends; both can be unpacked from an
archive. What a file claims to hold costs memory only once its size is known.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def read_bounded(path: Path, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes; never waits and follows no link.

    OSError when it cannot be opened or read, ValueError when it is something else than a file or
    larger.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags), "rb", buffering=0) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("is no regular file")
        if found.st_size > limit:
            raise ValueError(f"is larger than {limit} bytes")
        raw = file.readall()
    if len(raw) > limit:  # grown since
        raise ValueError(f"is larger than {limit} bytes")
    return raw
