"""Indexes a videos folder and finds the file that a list means, whatever the copy's layout."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from featstore.errors import UserError
from featstore.remote.urls import is_url, parsed_file
from pipeline.annotations.class_names import comparable
from pipeline.annotations.listing import split_from_folder
from pipeline.annotations.tables import TABLES

VIDEO_EXTENSIONS = frozenset(TABLES["videos"]["extensions"])
_DEEPEST = 64  # folders of videos are a handful of levels deep


class VideoFolder:
    """All video files under a folder: `files` are sorted relative paths with slashes.

    `folders` are the relative paths of all folders, empty ones too. Links are followed (CVDF's
    arrange script for Kinetics makes some), except a link back to a parent folder. Hidden files
    are left out, and so is a folder that holds `leave_out`, where the output goes. Without `scan`
    nothing is looked for, and only paths that are listed exactly are found.
    Raises UserError when the folder, or one in it, is missing or cannot be read.
    """

    def __init__(self, root: Path, *, leave_out: Path | None = None, scan: bool = True) -> None:
        self.root = root
        self.files: list[str] = []
        self.folders: list[str] = []
        self._leave_out = leave_out.resolve() if leave_out is not None else None
        if not root.exists():
            raise UserError(f"videos folder {str(root)!r} does not exist: give --videos a folder")
        if not root.is_dir():
            raise UserError(f"{str(root)!r} is not a folder: give --videos a folder of videos")
        if scan:
            self._scan(root, "", frozenset())
        self.files.sort()
        self.folders.sort()

    def _scan(self, folder: Path, prefix: str, parents: frozenset[tuple[int, int]]) -> None:
        if prefix.count("/") > _DEEPEST:
            raise UserError(
                f"{str(folder)!r} lies more than {_DEEPEST} folders deep in {str(self.root)!r}: "
                "give --videos a folder nearer to the videos"
            )
        try:
            status = folder.stat()
            identity = (status.st_dev, status.st_ino)
            if identity in parents:
                return
            with os.scandir(folder) as entries:
                found = list(entries)
        except OSError as error:
            raise UserError(
                f"cannot read folder {str(folder)!r}: {error.strerror}; make it readable or "
                "move it away"
            ) from error
        for entry in found:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if self._holds_output(Path(entry.path)):
                    continue
                self.folders.append(prefix + entry.name)
                self._scan(Path(entry.path), f"{prefix}{entry.name}/", parents | {identity})
            elif extension(entry.name) in VIDEO_EXTENSIONS:
                self.files.append(prefix + entry.name)

    def _holds_output(self, folder: Path) -> bool:
        return self._leave_out is not None and self._leave_out.is_relative_to(folder.resolve())

    @cached_property
    def _by_path_stem(self) -> dict[str, list[str]]:
        index: dict[str, list[str]] = defaultdict(list)
        for path in self.files:
            index[path_stem(path).lower()].append(path)
        return dict(index)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        index: dict[str, list[str]] = defaultdict(list)
        for path in self.files:
            index[posixpath.basename(path_stem(path)).lower()].append(path)
        return dict(index)

    def with_stem(self, stem: str) -> list[str]:
        """Return files in any folder whose name without extension is `stem`, in any letter case."""
        return self._by_stem.get(stem.lower(), [])

    def find_in_class(self, name: str, class_name: str) -> str | None:
        """Find the file `name` (extension and case may differ), preferably in its class's folder.

        Official HMDB51 and UCF101 names are unique in their sets, so a flat folder is as good.
        """

        def rank(path: str) -> tuple[bool, bool, int, bool, str]:
            parts = path.split("/")
            own = len(parts) > 1 and comparable(parts[-2]) == comparable(class_name)
            other_case = path_stem(parts[-1]) != path_stem(name)
            return (not own, extension(path) != extension(name), len(parts), other_case, path)

        return min(self.with_stem(path_stem(name)), key=rank, default=None)

    def has(self, path: str) -> bool:
        """Whether the relative path is a file here; its extension may be an unusual one."""
        if path in self._files:
            return True
        inside = not path.startswith(("/", "../")) and path not in ("", "..", ".")
        try:
            return inside and (self.root / path).is_file()
        except OSError:  # a name that no file system takes
            return False

    @cached_property
    def _files(self) -> frozenset[str]:
        return frozenset(self.files)

    def find_listed(self, listed: str, split: str = "") -> tuple[str | None, str]:
        """Return the file that a list's entry means, or (None, the reason why there is none).

        A URL of a file means itself. Tried in turn: the path as listed; the same with another
        extension or none; the path without its first folders (absolute paths, other roots); the
        file's name alone, where neither folder contradicts the other (a flat folder, a list without
        class folders, spaces for underscores). A name in another class's folder is never taken.
        """
        if is_url(listed):
            try:
                parsed_file(listed)
            except UserError as error:
                return None, str(error)
            return listed, ""
        path = normal_path(listed, self.root)
        if path.startswith("../") or path in ("..", ".", ""):
            return None, "the listed path leads outside the videos folder"
        parts = path.strip("/").split("/")
        for start in range(len(parts)):
            tail = "/".join(parts[start:])
            if self.has(tail):
                return tail, ""
            # A bare name is left to the search below, which looks in every folder.
            same = self._by_path_stem.get(path_stem(tail).lower(), [])
            exact = [path for path in same if path_stem(path) == path_stem(tail)]
            if len(exact or same) == 1:
                return (exact or same)[0], ""
        stem = posixpath.basename(path_stem(path))
        folder = parts[-2] if len(parts) > 1 else ""
        found = [
            candidate
            for candidate in self.with_stem(stem)
            if _splits_agree(parts[:-1], candidate, split) and _folders_agree(folder, candidate)
        ]
        if len(found) > 1:
            names = {file: posixpath.basename(file) for file in found}
            found = [file for file in found if names[file] == parts[-1]] or found
            found = [file for file in found if path_stem(names[file]) == stem] or found
        if len(found) == 1:
            return found[0], ""
        if found:
            return None, f"several files have this name: {found[0]} and {found[1]}"
        return None, "no such file in the videos folder"


def extension(path: str) -> str:
    """The extension in lower case without its dot; empty when there is none."""
    name = posixpath.basename(path)
    return name.rpartition(".")[2].lower() if "." in name[1:] else ""


def path_stem(path: str) -> str:
    """`path` without the extension of a video file; any other dot belongs to the name."""
    found = extension(path)
    return path[: -len(found) - 1] if found in VIDEO_EXTENSIONS else path


def normal_path(listed: str, root: Path) -> str:
    """A listed path with slashes, without doubled or dotted parts, relative where under `root`."""
    path = listed.strip().replace("\\", "/") if "/" not in listed else listed.strip()
    path = posixpath.normpath(path) if path else ""
    path = "/" + path.lstrip("/") if path.startswith("/") else path
    for base in (str(root), str(root.resolve()), str(root.absolute())):
        if path.startswith(base.rstrip("/") + "/"):
            return path[len(base.rstrip("/")) + 1 :]
    return path


def _splits_agree(listed_folders: list[str], candidate: str, split: str) -> bool:
    """Whether a file found by name alone does not lie in the folder of another split."""
    wanted = split.rstrip("0123456789") if split else first_split(listed_folders)
    there = first_split(candidate.split("/")[:-1])
    return wanted is None or there is None or wanted == there


def _folders_agree(folder: str, candidate: str) -> bool:
    """Whether a file found by name alone can be the one that the list puts into `folder`."""
    parts = candidate.split("/")[:-1]
    if not folder or not parts or split_from_folder(folder) or split_from_folder(parts[-1]):
        return True
    return comparable(parts[-1]) == comparable(folder)


def first_split(folders: list[str]) -> str | None:
    """The split of the first of the `folders` that is named after a split; None without one."""
    return next((split for part in folders if (split := split_from_folder(part))), None)
