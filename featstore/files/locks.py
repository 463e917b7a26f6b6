"""One process at a time: lock files that the system frees however a process ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from featstore.errors import WorkError

log = logging.getLogger(__name__)

# Bytes of the lock file per record; they hold the name of the process that last locked it.
RECORD_BYTES: Final = 64
# Locks of an open file, not of a process: they also keep two writers of one process apart, and
# closing another descriptor of the file does not free them. Where the system lacks them (macOS),
# locks of the process do.
_LOCK, _LOCK_AND_WAIT, _ASK = (
    (fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW, fcntl.F_OFD_GETLK)
    if hasattr(fcntl, "F_OFD_SETLK")
    else (fcntl.F_SETLK, fcntl.F_SETLKW, fcntl.F_GETLK)
)
_LINUX, _BSD = "hhqqi0q", "qqihh"  # `struct flock` of the two kinds of system
_TO_THE_END: Final = 0  # the length of a range that reaches to the end of any file


@contextmanager
def exclusive(
    lock_file: Path, work: str, *, wait: bool = False, keep: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Hold `lock_file` while doing `work`, such as "training RUN"; otherwise like `claimed`."""
    with claimed(lock_file, [0], lambda _: work, wait=wait, keep=keep):
        yield


@contextmanager
def claimed(
    lock_file: Path,
    records: Sequence[int],
    work: Callable[[int], str],
    *,
    wait: bool = False,
    keep: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Hold `records` of `lock_file`; each is for a piece of work: "writing partition 3 of STORE".

    If another process holds one of the records, raises a WorkError that names the process and the
    work, or waits for it if `wait` is set. The file is made if needed. `keep` says at the end
    whether it stays: work that was refused leaves no lock of what was never made.
    """
    new = [each for each in (lock_file.parent, *lock_file.parent.parents) if not each.exists()]
    held = False
    while not held:
        descriptor = _opened(lock_file)
        try:
            for record in records:
                _lock(descriptor, record, work, wait)
            held = _lies_at(lock_file, descriptor)  # else its holder has just removed it
            if held:
                yield
        finally:
            if held and not keep():
                lock_file.unlink(missing_ok=True)
                with suppress(OSError):  # a folder that is not empty stays
                    for folder in new:
                        folder.rmdir()
            os.close(descriptor)  # frees the locks


def _lock(descriptor: int, record: int, work: Callable[[int], str], wait: bool) -> None:
    start = record * RECORD_BYTES
    try:
        fcntl.fcntl(descriptor, _LOCK, _range(start))
    except (BlockingIOError, PermissionError):  # POSIX leaves the choice of the two
        process = _process(descriptor, start)
        if not wait:
            raise WorkError(f"{process} is {work(record)}: wait for it or stop it") from None
        log.info("waiting for %s that is %s", process, work(record))
        fcntl.fcntl(descriptor, _LOCK_AND_WAIT, _range(start))
    os.pwrite(descriptor, _owner(), start)


@contextmanager
def unused(lock_file: Path, what: str) -> Iterator[None]:
    """Hold all records of `lock_file`, so that no process works on `what` meanwhile.

    Raises WorkError, which names the process, if one holds any of the records. The file is made if
    needed, as `claimed` makes it.
    """
    descriptor = _opened(lock_file)
    try:
        try:
            fcntl.fcntl(descriptor, _LOCK, _range(0, _TO_THE_END))
        except (BlockingIOError, PermissionError):
            process = _holder(descriptor) or "another process"
            raise WorkError(f"{process} is working on {what}: wait for it or stop it") from None
        os.pwrite(descriptor, _owner(), 0)
        yield
    finally:
        os.close(descriptor)


def holder(lock_file: Path) -> str | None:
    """Return which process holds a record of `lock_file`, in words; None if none does."""
    try:
        descriptor = os.open(lock_file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _holder(descriptor)
    finally:
        os.close(descriptor)


def hold(lock_file: Path) -> int | None:
    """Return a descriptor that holds `lock_file`, made if needed, until the descriptor is closed.

    Returns None if another process holds the lock or has just removed the file, which the holder
    of such a lock may do.
    """
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o666)
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _lies_at(lock_file, descriptor):
            return descriptor
    os.close(descriptor)
    return None


def _lies_at(lock_file: Path, descriptor: int) -> bool:
    """Return whether an open file is still the one with this name."""
    try:
        return os.path.samestat(os.stat(lock_file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _opened(lock_file: Path) -> int:
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    try:  # never through a link, which may have come with somebody's archive
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(lock_file, flags, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise WorkError(f"{lock_file} is a symbolic link: remove it, locks are files") from error


def _owner() -> bytes:
    owner = f"{os.getpid()} on {socket.gethostname()}\n".encode()[:RECORD_BYTES]
    return owner.ljust(RECORD_BYTES, b"\0")


def _process(descriptor: int, start: int) -> str:
    """Return the process that last locked the record at byte `start`, in words."""
    owner = os.pread(descriptor, RECORD_BYTES, start).partition(b"\n")[0].strip(b"\0")
    return f"another process (pid {owner.decode('ascii', 'replace') or 'unknown'})"


def _holder(descriptor: int) -> str | None:
    """Return the process that holds a lock of the file, in words; None if none does."""
    answer = fcntl.fcntl(descriptor, _ASK, _range(0, _TO_THE_END))
    kind, start = _range_facts(answer)
    return None if kind == fcntl.F_UNLCK else _process(descriptor, start)


def _range(start: int, length: int = RECORD_BYTES) -> bytes:
    """`struct flock` for writing some bytes, those of one record unless `length` says more."""
    if hasattr(fcntl, "F_OFD_SETLK"):  # Linux
        return struct.pack(_LINUX, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    return struct.pack(_BSD, start, length, 0, fcntl.F_WRLCK, os.SEEK_SET)


def _range_facts(answer: bytes) -> tuple[int, int]:
    """Return (kind of lock, first byte) of a `struct flock`."""
    if hasattr(fcntl, "F_OFD_SETLK"):
        kind, _, start, *_ = struct.unpack(_LINUX, answer)
    else:
        start, _, _, kind, _ = struct.unpack(_BSD, answer)
    return kind, start
