"""One process at a time: lock files that the system frees however a process ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from featstore.errors import WorkError

log = logging.getLogger(__name__)

# Bytes of the lock file per record; they hold the name of the process that last locked it.
RECORD_BYTES: Final = 64
# Locks of an open file, not of a process: they also keep two writers of one process apart, and
# closing another descriptor of the file does not free them. Where the system lacks them (macOS),
# locks of the process do.
_LOCK, _LOCK_AND_WAIT = (
    (fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW)
    if hasattr(fcntl, "F_OFD_SETLK")
    else (fcntl.F_SETLK, fcntl.F_SETLKW)
)


@contextmanager
def exclusive(lock_file: Path, work: str, *, wait: bool = False) -> Iterator[None]:
    """Hold `lock_file` while doing `work`, such as "training RUN"; otherwise like `claimed`."""
    with claimed(lock_file, [0], lambda _: work, wait=wait):
        yield


@contextmanager
def claimed(
    lock_file: Path, records: Sequence[int], work: Callable[[int], str], *, wait: bool = False
) -> Iterator[None]:
    """Hold `records` of `lock_file`; each is for a piece of work: "writing partition 3 of STORE".

    If another process holds one of the records, raises a WorkError that names the process and the
    work, or waits for it if `wait` is set. The file is made if needed and never removed: removing
    it would let two processes lock two different files of the same name.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    try:  # never through a link, which may have come with somebody's archive
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(lock_file, flags, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise WorkError(f"{lock_file} is a symbolic link: remove it, locks are files") from error
    owner = f"{os.getpid()} on {socket.gethostname()}\n".encode()[:RECORD_BYTES]
    try:
        for record in records:
            start = record * RECORD_BYTES
            try:
                fcntl.fcntl(descriptor, _LOCK, _range(start))
            except (BlockingIOError, PermissionError):  # POSIX leaves the choice of the two
                holder = os.pread(descriptor, RECORD_BYTES, start).partition(b"\n")[0].strip(b"\0")
                process = f"another process (pid {holder.decode('ascii', 'replace') or 'unknown'})"
                if not wait:
                    raise WorkError(
                        f"{process} is {work(record)}: wait for it or stop it"
                    ) from None
                log.info("waiting for %s that is %s", process, work(record))
                fcntl.fcntl(descriptor, _LOCK_AND_WAIT, _range(start))
            os.pwrite(descriptor, owner.ljust(RECORD_BYTES, b"\0"), start)
        yield
    finally:
        os.close(descriptor)  # frees the locks


def hold(lock_file: Path) -> int | None:
    """Return a descriptor that holds `lock_file`, made if needed, until the descriptor is closed.

    Returns None if another process holds the lock or has just removed the file, which the holder
    of such a lock may do.
    """
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(lock_file), os.fstat(descriptor)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _range(start: int) -> bytes:
    """`struct flock` for writing one record's bytes."""
    if hasattr(fcntl, "F_OFD_SETLK"):  # Linux
        return struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, start, RECORD_BYTES, 0)
    return struct.pack("qqihh", start, RECORD_BYTES, 0, fcntl.F_WRLCK, os.SEEK_SET)
