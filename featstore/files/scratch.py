"""Folders for fetched and unfinished files: a lasting cache, scratch that ends with a process."""

from __future__ import annotations

import os
import shutil
import uuid
import weakref
from pathlib import Path

from featstore.errors import UserError, WorkError
from featstore.files.disk import free_bytes, has_room
from featstore.files.locks import hold

CACHE_VARIABLE = "MOTE_CACHE"


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


def require_room(folder: Path, size: int, what: str) -> None:
    """Raise WorkError unless `size` bytes of `what` fit on the disk of `folder`."""
    if not has_room(folder, size):
        free = free_bytes(folder)
        raise WorkError(
            f"{what} takes {size / 2**20:.0f} MiB and the disk of {folder} has {free / 2**20:.0f} "
            f"MiB free: make room, or set {CACHE_VARIABLE} to a folder on a larger disk"
        )


class ScratchFolder:
    """A new folder that is removed when it is closed, or when its process ends.

    After a kill -9, the next ScratchFolder made beside it removes it: each has a lock file beside
    it, and the kernel frees the lock when the process ends.
    """

    def __init__(self, parent: Path | None = None) -> None:
        """Make one in `parent`, by default `scratch` in the cache folder."""
        parent = parent or cache_folder() / "scratch"
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        self.path = parent / uuid.uuid4().hex
        while (descriptor := hold(self.path.with_suffix(".lock"))) is None:
            pass  # a sweep of another process has just taken it
        self.path.mkdir()
        self._finalizer = weakref.finalize(self, _remove, self.path, descriptor, os.getpid())

    def close(self) -> None:
        """Remove the folder and all that is in it; nothing happens the second time."""
        self._finalizer()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self.close()


def _remove(folder: Path, descriptor: int, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked child's copy
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".lock").unlink(missing_ok=True)
    os.close(descriptor)


def _sweep(parent: Path) -> None:
    """Remove folders whose process is gone."""
    for lock in parent.glob("*.lock"):
        descriptor = hold(lock)
        if descriptor is not None:
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
            os.close(descriptor)
