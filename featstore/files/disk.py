"""Free room on disks, and numbers of bytes in words."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

# File systems get slow and other programs fail before the last byte is taken.
SPARE_BYTES: Final = 64 * 2**20


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that holds, or will hold, `path`."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def has_room(path: Path, size: int) -> bool:
    """Return whether `size` bytes, and a little to spare, fit on the disk of `path`."""
    return free_bytes(path) >= size + SPARE_BYTES


def folder_bytes(folder: Path) -> int:
    """Return the sizes of all files in `folder`, added up; 0 if it does not exist.

    Links are not followed, a file with several names counts once, and what this user may not read
    is left out.
    """
    total, seen, left = 0, set(), [os.fspath(folder)]
    while left:
        with suppress(OSError), os.scandir(left.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    left.append(entry.path)
                    continue
                found = entry.stat(follow_symlinks=False)
                if found.st_nlink == 1 or (found.st_dev, found.st_ino) not in seen:
                    seen.add((found.st_dev, found.st_ino))
                    total += found.st_size
    return total


def in_bytes(count: int) -> str:
    """Write a number of bytes in kB, MB or GB."""
    if count < 1e5:
        return f"{count / 1e3:.2f} kB"
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
