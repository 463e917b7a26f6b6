"""Finds the videos that a user means: files, folders, globs, and lists of them."""

from __future__ import annotations

import csv
import glob
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from featstore.errors import UserError, counted, one_line
from featstore.files.documents import parse_json
from featstore.files.tables import plain_cell
from pipeline.annotations.tables import TABLES
from pipeline.annotations.video_folder import VIDEO_EXTENSIONS, VideoFolder, extension

logger = logging.getLogger(__name__)

STDIN: Final = "-"
LIST_LIMIT: Final = 2**28  # bytes; a million paths of 200 bytes are 200 MB
_PATH_COLUMNS: Final = frozenset(TABLES["columns"]["path"])
_NO_FILE: Final = "is no file and no folder"
_NAMED: Final = 3  # the most names that a message shows


@dataclass(frozen=True)
class NamedVideo:
    """A path as it is shown; `problem` says why there is no video to predict, if there is none."""

    path: str
    problem: str = ""


def find_videos(
    words: Sequence[str | Path], lists: Sequence[str | Path] = ()
) -> tuple[NamedVideo, ...]:
    """Return the videos that `words` and the files `lists` name, each once, in this order.

    A word is a file, a folder (all videos in it and below, as `pack` finds them), a glob, or "-"
    for a list of paths from standard input. A list holds one path a line, is CSV with a column of
    paths, or JSON lines: a text, or an object with a path. Its paths are looked for from the
    current folder, then from the list's own. What names no video is returned with its problem;
    videos named again are logged. Raises UserError for a list that cannot be read, and if there is
    no video at all.
    """
    found = _Finder()
    for word in words:
        if str(word) == STDIN:
            found.add_list(STDIN)
        else:
            found.add(str(word))
    for file in lists:
        found.add_list(str(file))
    if found.again:
        logger.warning(
            "named more than once, predicted once: %s (%s)",
            counted(len(found.again), "video"),
            _some(found.again),
        )
    named = tuple(found.named)
    if not named:
        raise UserError(
            "no video is named: give VIDEO files, folders or quoted globs, --list FILE, or - to "
            "read paths from standard input"
        )
    problems = [video for video in named if video.problem]
    if len(problems) == len(named):
        first, more = problems[0], len(problems) - 1
        raise UserError(
            f"{first.path} {first.problem}{f', and {more} more name no video' if more else ''}: "
            "predict takes video files, folders of videos and quoted globs"
        )
    return named


class _Finder:
    """Collects videos; a file is the same however the path of its folder is written."""

    def __init__(self) -> None:
        self.named: list[NamedVideo] = []
        self.again: list[str] = []
        self._seen: set[str] = set()

    def add(self, word: str, folder: Path | None = None) -> None:
        """Add what `word` means; a relative path may also start from `folder`."""
        path = Path(word)
        if folder is not None and not path.exists():
            path = folder / path if (folder / path).exists() else path
        try:
            if path.is_dir():
                self._add_folder(path)
            elif path.is_file():
                self._add_file(path)
            elif path.exists():
                self._refuse(word, _NO_FILE)
            elif glob.has_magic(word):
                self._add_matches(word)
            else:
                self._refuse(word, "does not exist")
        except (OSError, ValueError) as error:  # a name with a null character, a loop of links
            self._refuse(word, f"cannot be read ({one_line(error, 80)})")

    def add_list(self, name: str) -> None:
        """Add what a list of paths names; `name` is its file, or "-" for standard input."""
        where = "standard input" if name == STDIN else name
        words = list(_listed(_read(name, where), where))
        if not words:
            raise UserError(f"{where} lists no videos: write one path a line")
        folder = None if name == STDIN else Path(name).parent
        for word in words:
            self.add(word, folder)

    def _add_file(self, path: Path) -> None:
        # A link is a video of its own; a folder is the same whatever link leads to it.
        real = os.path.join(os.path.realpath(path.parent), path.name)
        if real in self._seen:
            self.again.append(str(path))
            return
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            self._refuse(str(path), _NO_FILE)
            return
        self._seen.add(real)
        self.named.append(NamedVideo(str(path)))

    def _add_folder(self, folder: Path) -> None:
        found = VideoFolder(folder)
        files = found.files
        if files and (said := found.left_out.line):
            logger.info("left out of %s: %s", folder, said)
        for file in files:
            self._add_file(folder / file)
        if not files:
            self._refuse(str(folder), f"is a folder without videos ({_extensions()})")

    def _add_matches(self, pattern: str) -> None:
        matches = sorted(glob.glob(pattern, recursive=True))
        videos = [match for match in matches if extension(match) in VIDEO_EXTENSIONS]
        folders = [match for match in matches if match not in videos and os.path.isdir(match)]
        for match in videos:
            self.add(match)
        # Folders that `**` found are seen through their files, which it finds as well.
        for folder in folders if "**" not in pattern else ():
            self._add_folder(Path(folder))
        if not videos and (not folders or "**" in pattern):
            what = f"fits {len(matches)} files, none with the name of a video" if matches else ""
            self._refuse(pattern, f"{what or 'fits no file'} ({_extensions()})")

    def _refuse(self, name: str, problem: str) -> None:
        video = NamedVideo(name, problem)
        if video in self.named:
            self.again.append(name)
        else:
            self.named.append(video)


def _read(name: str, where: str) -> str:
    """Return a list's text; bytes that are no UTF-8 stay in it, since paths may have them."""
    try:
        if name == STDIN:
            raw = sys.stdin.buffer.read(LIST_LIMIT + 1)
        else:
            with open(name, "rb") as file:
                raw = file.read(LIST_LIMIT + 1)
    except OSError as error:
        raise UserError(
            f"the list {where} cannot be read ({error.strerror}): name a text file"
        ) from error
    if len(raw) > LIST_LIMIT:
        raise UserError(f"{where} has more than {LIST_LIMIT} bytes: name folders, or split it")
    return os.fsdecode(raw.removeprefix(b"\xef\xbb\xbf"))


def _listed(text: str, where: str) -> Iterable[str]:
    """Yield the paths of a list; `find -print0` separates them by null characters."""
    if "\0" in text:
        return filter(None, text.split("\0"))
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[0].lstrip().startswith(("{", '"')) and not _header(lines[0]):
        return [_path_in_json(line, f"{where} line {n}") for n, line in enumerate(lines, 1)]
    separator = _header(lines[0]) if lines else ""
    if not separator:
        return [line.strip() for line in lines]
    rows = list(csv.reader(lines, delimiter=separator, skipinitialspace=True))
    place = _path_column(rows[0])
    short = next((number for number, row in enumerate(rows, 1) if len(row) <= place), None)
    if short is not None:
        raise UserError(f"{where} row {short} has no column {rows[0][place]!r}: complete it")
    return [plain_cell(row[place].strip()) for row in rows[1:] if row[place].strip()]


def _header(line: str) -> str:
    """Return the separator of the columns if the line names one of paths, else ""."""
    for separator in (",", ";", "\t"):
        row = next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
        if _path_column(row) >= 0:
            return separator
    return ""


def _path_column(row: Sequence[str]) -> int:
    words = [cell.strip().lower() for cell in row]
    return next((place for place, word in enumerate(words) if word in _PATH_COLUMNS), -1)


def _path_in_json(line: str, where: str) -> str:
    try:
        value = parse_json(line, foreign=True)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({one_line(error, 80)}): correct it") from error
    if isinstance(value, dict):
        key = next((key for key in value if key.lower() in _PATH_COLUMNS), "path")
        value = value.get(key)
    if not isinstance(value, str) or not value:
        raise UserError(f'{where} names no path: write {{"path": "clip.mp4"}} or "clip.mp4"')
    return value


def _extensions() -> str:
    return ", ".join(TABLES["videos"]["extensions"][:5]) + ", ..."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
