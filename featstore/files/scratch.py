"""Folders for what is fetched or staged: a cache that stays, scratch that goes with its process."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from featstore.errors import UserError, WorkError

log = logging.getLogger(__name__)

CACHE_VARIABLE = "MOTE_CACHE"
# File systems get slow and other programs fail before the last byte is taken.
SPARE_BYTES = 64 * 2**20


def cache_folder() -> Path:
    """The folder that `MOTE_CACHE` names, or the user's cache folder (XDG base directories)."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "mote"
    except RuntimeError as error:
        raise UserError(
            f"there is no home folder to keep fetched files in: set {CACHE_VARIABLE} to a folder"
        ) from error


def has_room(folder: Path, size: int) -> bool:
    """Whether `size` bytes and a little to spare fit on the disk of `folder`."""
    return shutil.disk_usage(folder).free >= size + SPARE_BYTES


def require_room(folder: Path, size: int, what: str) -> None:
    """WorkError unless `size` bytes of `what` fit on the disk of `folder`."""
    if not has_room(folder, size):
        free = shutil.disk_usage(folder).free
        raise WorkError(
            f"{what} takes {size / 2**20:.0f} MiB and the disk of {folder} has {free / 2**20:.0f} "
            f"MiB free: make room, or set {CACHE_VARIABLE} to a folder on a larger disk"
        )


class ScratchFolder:
    """A new folder that goes when it is closed, or when its process ends.

    After a kill -9 the next ScratchFolder made beside it removes it: each has a lock file beside
    it that the kernel frees with its process.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """Make one in `parent`, by default `scratch` in the cache folder."""
        parent = parent or cache_folder() / "scratch"
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        self.path = parent / uuid.uuid4().hex
        descriptor = _locked(self.path.with_suffix(".lock"))
        self.path.mkdir()
        self._finalizer = weakref.finalize(self, _remove, self.path, descriptor, os.getpid())

    def close(self) -> None:
        """Remove the folder and all that is in it; nothing happens the second time."""
        self._finalizer()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.close()


@contextmanager
def one_at_a_time(lock_file: Path, work: str) -> Iterator[None]:
    """Wait until no other process or thread holds `lock_file`, then hold it.

    `work` is what they do with it, for the log.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that is %s", work)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _locked(lock: Path) -> int:
    """A descriptor that holds the new lock file, which no sweep has taken meanwhile."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(lock), os.fstat(descriptor)):
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(descriptor)


def _remove(folder: Path, descriptor: int, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked child's copy
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".lock").unlink(missing_ok=True)
    os.close(descriptor)


def _sweep(parent: Path) -> None:
    """Remove folders whose process is gone."""
    for lock in parent.glob("*.lock"):
        try:
            descriptor = os.open(lock, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
