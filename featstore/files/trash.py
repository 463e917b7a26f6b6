"""Removes a folder in two steps: one rename takes it out of sight, then its files are deleted."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from featstore.errors import WorkError
from featstore.files.durable import sync_folder
from featstore.files.scratch import ScratchFolder

TRASH_FOLDER: Final = ".trash"
"""Beside what is removed. A killed process leaves it, and the next removal beside it empties it."""


def remove_whole(path: Path, *notes: Path) -> None:
    """Remove the folder, file or link `path`, and then `notes` about it that lie beside it.

    Nothing is ever seen half removed. Links are removed, not followed. Raises WorkError if the
    folder `.trash` is a link or the files cannot be deleted after the rename, OSError if `path`
    cannot be renamed.
    """
    with _scratch(path.parent / TRASH_FOLDER) as trash:
        for each in (path, *filter(os.path.lexists, notes)):
            each.rename(trash / each.name)
        sync_folder(path.parent)
    if trash.exists():
        raise WorkError(
            f"{path} is removed, but its files cannot all be deleted: delete {trash} yourself"
        )
    empty_trash(path.parent)


def empty_trash(folder: Path) -> None:
    """Delete what killed removals left in `folder`."""
    if (folder / TRASH_FOLDER).is_dir():
        _scratch(folder / TRASH_FOLDER).close()
        with suppress(OSError):  # another process is removing something here
            (folder / TRASH_FOLDER).rmdir()


def _scratch(place: Path) -> ScratchFolder:
    if place.is_symlink():
        raise WorkError(f"{place} is a symbolic link: remove it, files are deleted only beside it")
    while True:
        with suppress(FileNotFoundError):  # another process has just removed the empty trash
            return ScratchFolder(place)
