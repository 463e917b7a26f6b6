"""One process at a time: a lock file that the system frees however its process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from featstore.errors import WorkError


@contextmanager
def exclusive(lock_file: Path, work: str) -> Iterator[None]:
    """Hold `lock_file` (made if needed, never removed) while doing `work`, "writing STORE".

    Raises WorkError that names the process which holds it. The file stays: removing it would let
    two processes lock two different files of the same name.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            raise WorkError(
                f"another process (pid {holder}) is {work}: wait for it or stop it"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # frees the lock
