"""Files that are either complete under their final name or absent, also after a power cut.

A write goes to `<name>.<unique>.partial` beside its target, is synced, renamed, and the folder is
synced (zarr-python renames but does not sync, so a power cut can leave a zero-byte shard).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL_SUFFIX = ".partial"
# Errors of file systems that cannot link two files: another disk, no links, too many, forbidden.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EACCES, errno.ENOSYS)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut (no-op where folders cannot be synced)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents so that they too survive a power cut."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears as `path` only when the block ends without an error."""
    with durable_path(path) as partial, open(partial, "wb") as file:
        yield file


@contextmanager
def durable_path(path: Path) -> Iterator[Path]:
    """Yield a place for a file that appears as `path` only if the block ends without an error.

    The file has the mode that the umask gives, whatever the block makes it with: libraries such as
    safetensors make files that only their owner may read.
    """
    make_folder(path.parent)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        partial.unlink()
        yield partial
        with open(partial, "rb") as file:
            if os.fstat(file.fileno()).st_mode != mode:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and str(error.filename) == str(partial):
            error.filename = str(path)  # the name that the user knows
        with suppress(OSError):  # the folder may have gone, or allow nothing
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def new_folders(staging: Path, *targets: Path) -> Iterator[list[Path]]:
    """Fill one new folder per target; they appear together when the block ends without an error.

    They are filled under `staging` (same file system, removed afterwards), so that nothing
    unfinished is ever seen under a final name. Raises FileExistsError when a target exists.
    """
    shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed
    placed: list[Path] = []
    try:
        folders = [staging / str(number) for number in range(len(targets))]
        for folder in folders:
            make_folder(folder)
        yield folders
        for folder, target in zip(folders, targets, strict=True):
            make_folder(target.parent)
            if target.exists():
                raise FileExistsError(f"{target} exists already")
            folder.rename(target)
            placed.append(target)
            sync_folder(target.parent)
    except BaseException:
        for target in placed:
            shutil.rmtree(target, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if the file system cannot link.

    A linked file must never be changed in place; every write of a store is a new file and a
    rename. `target` appears complete or not at all. Raises FileExistsError if it exists already.
    """
    make_folder(target.parent)
    if target.exists():
        raise FileExistsError(f"{target} exists already")
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        with open(source, "rb") as original, durable_file(target) as copy:
            shutil.copyfileobj(original, copy, 2**24)
    sync_folder(target.parent)


def write_bytes(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write `data` to `path`, complete or not at all."""
    with durable_file(path) as file:
        file.write(data)


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Write `value` as strict JSON (NaN and infinity are refused), complete or not at all."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def sweep_partials(folder: Path) -> int:
    """Delete files that interrupted writes left anywhere under `folder`; return how many."""
    leftovers = list(folder.rglob(f"*{PARTIAL_SUFFIX}")) if folder.is_dir() else []
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return len(leftovers)
