"""Builds folders beside their place, then moves them there by one rename or one exchange.

No reader ever sees a folder that is half old and half new, and no killed process leaves one.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from featstore.errors import UserError, WorkError
from featstore.files.durable import PARTIAL_SUFFIX, make_folder, sync_folder
from featstore.files.locks import exclusive

log = logging.getLogger(__name__)

_AT_FDCWD: Final = -100  # linux/fcntl.h
_RENAME_EXCHANGE: Final = 2  # linux/fs.h
_SCHEME: Final = re.compile(r"[a-z0-9]{2,}:/")
_UNSUPPORTED: Final = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


@contextmanager
def new_folder(target: Path, *, store: bool = True) -> Iterator[Path]:
    """Yield a path to make a folder at; the folder becomes `target` if the block succeeds.

    The path lies in a staging folder beside `target`, which is removed however the block ends; the
    next call removes what a killed process left. Raises WorkError while another process makes the
    same target, UserError if the target exists or no folder can or should be made there. The lock
    file beside the target stays if the target is a `store` and was made.
    """
    _require_place(target)
    make_folder(target.parent)
    lock = target.with_name(f"{target.name}.lock")
    with exclusive(lock, f"making {target}", keep=lambda: store and target.exists()):
        _require_absent(target)  # another process may have made it by now
        with staging(target) as place:
            yield place
            place.rename(target)
            sync_folder(target.parent)


def _require_place(target: Path) -> None:
    if _SCHEME.match(str(target)):  # a Path has lost the second "/"
        raise UserError(f"{target} looks like a URL: --out takes a folder of this machine")
    if target.name in ("", ".."):
        raise UserError(f"{target} is not the name of a new folder: choose another --out")
    _require_absent(target)
    for folder in target.absolute().parents:
        if (folder / "zarr.json").is_file():
            raise UserError(
                f"{target} would lie inside the store {folder}, where only its own files may be: "
                "choose another --out"
            )
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file, so {target} cannot be made: choose another --out")


def _require_absent(target: Path) -> None:
    if os.path.lexists(target):
        raise UserError(f"{target} exists already: remove it, or choose another --out")


@contextmanager
def replacement(target: Path) -> Iterator[Path]:
    """Yield a path to build a folder at, which replaces `target` if the block succeeds.

    If the system can exchange two folders in one step (Linux), `target` exists at every moment.
    On other systems it is missing between two renames; `recover` puts it back after a kill. The
    caller must hold the lock of the folder.
    """
    with staging(target) as place:
        yield place
        if not _exchanged(place, target):
            kept = _previous(target)
            target.rename(kept)
            place.rename(target)
            sync_folder(target.parent)
            shutil.rmtree(kept, ignore_errors=True)
        sync_folder(target.parent)


def sweep(target: Path) -> None:
    """Remove staging folders that killed processes left; the caller must have locked `target`."""
    for leftover in target.parent.glob(f"{glob.escape(target.name)}.*{PARTIAL_SUFFIX}"):
        shutil.rmtree(leftover, ignore_errors=True)


def recover(target: Path) -> None:
    """Undo or finish a replacement that was killed between its two renames."""
    kept = _previous(target)
    if not kept.is_dir():
        return
    if target.exists():  # both renames were done
        shutil.rmtree(kept, ignore_errors=True)
    else:
        kept.rename(target)
        sync_folder(target.parent)
        log.warning("%s was put back: a command that changed it was killed", target)


def _previous(target: Path) -> Path:
    return target.with_name(f"{target.name}.previous")


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` to build something at; it is removed however the block ends.

    Leftovers of earlier calls are removed too, so the caller must have locked `target`. Raises
    WorkError if the disk is full.
    """
    sweep(target)
    folder = target.with_name(f"{target.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        make_folder(folder)
        yield folder / "new"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise WorkError(
            f"no room is left on the disk of {target}, and what was begun there is removed: make "
            "room and run the same command again"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where system or file system cannot."""
    try:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux, or a C library before 2018
        return False
    paths = (os.fsencode(one), os.fsencode(other))
    if exchange(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(other))
