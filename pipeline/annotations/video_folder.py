"""Indexes a videos folder and finds the file that a list means, whatever the copy's layout."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from featstore.errors import UserError
from featstore.remote.urls import is_url, parsed_file
from featstore.spelling import comparable, same_letters
from pipeline.annotations.file_signs import holds_video
from pipeline.annotations.left_out import LeftOut
from pipeline.annotations.listing import split_from_folder
from pipeline.annotations.tables import TABLES

USUAL_EXTENSIONS = frozenset(TABLES["videos"]["extensions"])
VIDEO_EXTENSIONS = USUAL_EXTENSIONS | frozenset(TABLES["videos"]["further"])
_DEEPEST = 64  # folders of videos are a handful of levels deep


class VideoFolder:
    """All video files under a folder: `files` are sorted relative paths with slashes.

    A file without an extension is one if it begins as a video does. `folders` are the relative
    paths of all folders, empty ones too. Links are followed (CVDF's arrange script for Kinetics
    makes some), except a link back to a parent folder. Hidden files are left out, and so is a
    folder that holds `leave_out`, where the output goes. `left_out` counts what was passed over.
    Without `scan` nothing is looked for, and only paths that are listed exactly are found.
    Raises UserError when the folder, or one in it, is missing or cannot be read.
    """

    def __init__(self, root: Path, *, leave_out: Path | None = None, scan: bool = True) -> None:
        self.root = root
        self.files: list[str] = []
        self.folders: list[str] = []
        self.left_out = LeftOut()
        self._leave_out = leave_out.resolve() if leave_out is not None else None
        if not root.exists():
            raise UserError(f"videos folder {str(root)!r} does not exist: give --videos a folder")
        if not root.is_dir():
            raise UserError(f"{str(root)!r} is not a folder: give --videos a folder of videos")
        if scan:
            self._scan(root, "", frozenset())
        for found in (self.files, self.folders, self.left_out.loops, self.left_out.empty):
            found.sort()

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
                self.left_out.loops.append(prefix.rstrip("/"))
                self.left_out.links -= 1
                self.folders.remove(prefix.rstrip("/"))
                return
            with os.scandir(folder) as entries:
                found = list(entries)
        except OSError as error:
            raise UserError(
                f"cannot read folder {str(folder)!r}: {error.strerror}; make it readable or "
                "move it away"
            ) from error
        if not found and prefix:
            self.left_out.empty.append(prefix.rstrip("/"))
        for entry in found:
            if entry.name.startswith("."):
                self.left_out.hidden += 1
                continue
            is_link = entry.is_symlink() and os.path.exists(entry.path)
            if _is_folder(entry):
                if self._holds_output(Path(entry.path)):
                    continue
                self.left_out.links += is_link
                self.folders.append(prefix + entry.name)
                self._scan(Path(entry.path), f"{prefix}{entry.name}/", parents | {identity})
                continue
            end = extension(entry.name)
            if end in VIDEO_EXTENSIONS or (not end and holds_video(Path(entry.path))):
                self.left_out.links += is_link
                self.files.append(prefix + entry.name)
            else:
                self.left_out.files[end] += 1

    def _holds_output(self, folder: Path) -> bool:
        return self._leave_out is not None and self._leave_out.is_relative_to(folder.resolve())

    def _by(self, form: Callable[[str], str]) -> dict[str, list[str]]:
        """Index the files by a form of their paths; previews do not count beside a video."""
        index: dict[str, list[str]] = defaultdict(list)
        for path in self.files:
            index[form(path_stem(path))].append(path)
        return {
            key: [path for path in paths if not may_be_preview(path)] or paths
            for key, paths in index.items()
        }

    @cached_property
    def _by_path_stem(self) -> dict[str, list[str]]:
        return self._by(same_letters)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        return self._by(lambda stem: same_letters(posixpath.basename(stem)))

    @cached_property
    def _by_form(self) -> dict[str, list[str]]:
        return self._by(lambda stem: comparable(posixpath.basename(stem)))

    def with_stem(self, stem: str) -> list[str]:
        """Return files in any folder whose name without extension has the `same_letters`."""
        return self._by_stem.get(same_letters(stem), [])

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
        class folders); a name that is `comparable` to it (spaces for underscores). Letter case and
        Unicode's ways to compose letters do not count where no file has the exact name. A name in
        another class's folder is never taken.
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
            same = self._by_path_stem.get(same_letters(path_stem(tail)), [])
            exact = [path for path in same if path_stem(path) == path_stem(tail)]
            if len(exact or same) == 1:
                return (exact or same)[0], ""
        stem = posixpath.basename(path_stem(path))
        folder = parts[-2] if len(parts) > 1 else ""
        found: list[str] = []
        for alike in (self.with_stem(stem), self._by_form.get(comparable(stem), [])):
            found = found or [
                candidate
                for candidate in alike
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


def may_be_preview(path: str) -> bool:
    """Whether the file has an extension that only counts where no other video has its name."""
    return extension(path) not in USUAL_EXTENSIONS and bool(extension(path))


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


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
