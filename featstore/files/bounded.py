"""Reads small files of a store that may come from anybody, or refuses to before reading them.

A pipe would keep its reader waiting for ever and a device never ends; both can be unpacked from an
archive. No memory is used for a file's content before its size is known.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def read_bounded(path: Path, limit: int) -> bytes:
    """Return all bytes of a regular file of at most `limit` bytes; never wait, follow no link.

    Raises OSError if it cannot be opened or read, ValueError if it is larger or is not a regular
    file.
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
