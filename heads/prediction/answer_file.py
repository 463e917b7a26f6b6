"""A file of predictions that grows video by video, and that a later run continues."""

from __future__ import annotations

import csv
import fcntl
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

from featstore.errors import UserError, WorkError, safe_text
from featstore.files.documents import parse_json
from featstore.files.durable import make_folder, write_bytes
from featstore.files.tables import plain_cell
from heads.prediction.answers import KEPT_COLUMNS, Answer, Form, Lines

# How the first line begins, also where a kill has torn it.
_BEGINNING: Final = {"csv": b"path,", "jsonl": b"{"}


@dataclass(frozen=True)
class _Row:
    """One whole line of the file; `window` is "K of N", or "" for a whole video."""

    line: bytes
    path: str
    stamp: tuple[str, str]
    failed: bool
    window: str
    settings: dict[str, str]
    classes: tuple[str, ...]
    """Names of the best classes, as `safe_text` writes them."""


class AnswerFile:
    """Predictions in a file of CSV or JSON lines, in the order in which they were made.

    Every video has the size and time of its file and the settings beside its classes, so that the
    file alone tells what is done. A video's lines are written at once; a torn last line, which a
    kill leaves, goes when the file is opened again. One process at a time writes it.
    """

    def __init__(self, path: Path, form: Form) -> None:
        self.path = path
        self.form = form
        self.done: dict[str, bool] = {}
        """Videos that need no prediction, by path as it is shown; whether they failed."""
        self._file: BinaryIO | None = None
        self._lines: Lines | None = None

    def begun_with(self) -> dict[str, str]:
        """Return the settings of the predictions in the file, {} if there are none yet.

        Raises UserError if the file holds something else.
        """
        rows = self._rows(self._read())
        return rows[0].settings if rows else {}

    def open(
        self, lines: Lines, stamps: Mapping[str, tuple[str, str]], names: Sequence[str] = ()
    ) -> None:
        """Begin or continue the file; `stamps` are those of the videos asked for, by their path.

        `names` are those of the classes, with which an error says how the classes differ.
        Afterwards `done` holds the videos that need not be predicted again. Rows of videos that
        changed or failed to be found leave the file, rows of videos not asked for stay. Raises
        UserError if the file was begun with other settings, WorkError if another process writes it.
        """
        assert lines.settings is not None
        make_folder(self.path.parent)
        self._lines, self._file = lines, self._locked()
        raw = self._read()
        rows = self._rows(raw)
        for row in rows:
            if row.settings != lines.settings:
                self._refuse(rows, row.settings, lines.settings, names)
        asked = {safe_text(path): stamp for path, stamp in stamps.items()}
        counts: dict[tuple[str, tuple[str, str]], int] = {}
        for row in rows:
            counts[row.path, row.stamp] = counts.get((row.path, row.stamp), 0) + 1

        def stays(row: _Row) -> bool:
            total = int(row.window.rpartition(" ")[2]) if row.window else 1
            whole = counts[row.path, row.stamp] == total
            found = row.stamp[0] != ""  # a file that was not there may be there now
            return whole and (row.path not in asked or (found and row.stamp == asked[row.path]))

        kept = [row for row in rows if stays(row)]
        content = lines.header.encode() + b"".join(row.line for row in kept)
        if content != raw:
            previous = self._file
            write_bytes(self.path, content)
            self._file = self._locked()
            previous.close()
        failed = {row.path: row.failed for row in kept if row.path in asked}
        self.done = {p: failed[safe_text(p)] for p in stamps if safe_text(p) in failed}

    def add(self, answer: Answer) -> None:
        """Write the lines of an answer; they are in the system's hands when this returns."""
        assert self._file is not None
        assert self._lines is not None
        self._file.write(self._lines.of(answer).encode())
        self._file.flush()

    def close(self) -> None:
        """Bring the file to the disk, close it, and let other processes write it."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()

    def _locked(self) -> BinaryIO:
        while True:
            file = self.path.open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.stat(self.path), os.fstat(file.fileno())):
                    return file
            except BlockingIOError:
                file.close()
                raise WorkError(
                    f"another process is writing {self.path}: wait for it, or name another file"
                ) from None
            file.close()  # another process has just put a new file into its place

    def _read(self) -> bytes:
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"--out {self.path} is no file: name a new file, or one to continue")
        return self.path.read_bytes() if self.path.exists() else b""

    def _rows(self, raw: bytes) -> list[_Row]:
        """Read the whole lines of the file. Raises UserError if it is no file of predictions."""
        whole = raw[: raw.rfind(b"\n") + 1]
        beginning = _BEGINNING[self.form]
        known = beginning.startswith(raw[: len(beginning)])
        rows: list[_Row | None] = []
        try:
            lines = [line.decode() for line in whole.splitlines(keepends=True)]
            if self.form == "jsonl":
                rows = [_json_row(line) for line in lines]
            elif lines:
                columns = next(csv.reader(lines[:1]))
                known &= columns[-len(KEPT_COLUMNS) :] == list(KEPT_COLUMNS)
                rows = [_csv_row(columns, line) for line in lines[1:]] if known else []
        except (UnicodeDecodeError, csv.Error):
            known = False
        if not known or (rows and not any(rows)):
            raise UserError(
                f"{self.path} exists and holds no {self.form} predictions of `mote-cli predict "
                "--out`: name another file"
            )
        return [row for row in rows if row is not None]

    def _refuse(
        self,
        rows: Sequence[_Row],
        begun: Mapping[str, str],
        now: Mapping[str, str],
        names: Sequence[str],
    ) -> NoReturn:
        differing = [name for name in {**now, **begun} if begun.get(name) != now.get(name)]
        said = {
            name: f"{name} {begun.get(name, 'none')}, now {now.get(name, 'none')}"
            for name in differing
        }
        if "sentences" in said:  # a hash, which tells people nothing
            known = {safe_text(name) for name in names}
            here = dict.fromkeys(name for row in rows for name in row.classes)
            if strange := next((name for name in here if name not in known), ""):
                said["sentences"] = f"class {strange!r} is in the file and not named now"
            elif "classes" in said:
                del said["sentences"]
            else:
                said["sentences"] = "other class names, another order or other sentences for them"
        raise UserError(
            f"{self.path} was begun with other settings ({'; '.join(said.values())}): use those, "
            "or name another file"
        )


def _json_row(line: str) -> _Row | None:
    try:
        value: Any = parse_json(line)
        settings = value["settings"]
        return _Row(
            line.encode(),
            safe_text(value["path"]),
            (value["size"], value["modified"]),
            "error" in value,
            "",
            {str(name): str(text) for name, text in settings.items()},
            tuple(safe_text(found["class_name"]) for found in value["predictions"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _csv_row(columns: list[str], line: str) -> _Row | None:
    cells = next(csv.reader([line], strict=True), [])
    if len(cells) != len(columns):
        return None
    value = dict(zip(columns, map(plain_cell, cells), strict=True))
    pairs = [pair.partition("=") for pair in value["settings"].split("; ")]
    window = value.get("window", "")
    if window and not window.rpartition(" ")[2].isdecimal():
        return None
    return _Row(
        line.encode(),
        value["path"],
        (value["size"], value["modified"]),
        bool(value["error"]),
        window,
        {name: text for name, _, text in pairs},
        tuple(text for name, text in value.items() if name.startswith("class_") and text),
    )
