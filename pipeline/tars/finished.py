"""Records of finished tars, and of what a list left out, which packing keeps between runs."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from featstore.commands import PACKING_FOLDER as RECORDS_FOLDER
from featstore.errors import counted
from featstore.files.documents import LISTS_LIMIT, found_object
from featstore.files.durable import write_json
from featstore.files.key_lists import Excluded
from pipeline.tars.plan import PlannedTar

__all__ = ["RECORDS_FOLDER", "HashingStream", "TarRecord", "VideoOutcome", "read_record"]

_EXCLUDED_FILE: Final = "excluded.json"


class VideoOutcome(NamedTuple):
    """The outcome for one video: the hash of its content if read, and a reason if it failed."""

    key: str
    sha256: str | None
    reason: str


@dataclass(frozen=True)
class TarRecord:
    """A finished tar: its size and hash, and the outcome of each of its videos in order."""

    bytes: int
    sha256: str
    videos: tuple[VideoOutcome, ...]

    def write(self, path: Path) -> None:
        """Write the record, complete or not at all."""
        write_json(path, vars(self), indent=None)


def read_record(path: Path, tar: PlannedTar) -> TarRecord | None:
    """Return the record of a finished tar, or None if it is missing or lists other videos."""
    try:
        value = found_object(path) or {}
        outcomes = tuple(VideoOutcome(*outcome) for outcome in value["videos"])
        record = TarRecord(int(value["bytes"]), str(value["sha256"]), outcomes)
    except (KeyError, TypeError, ValueError):
        return None
    same = [outcome.key for outcome in outcomes] == [video.key for video in tar.videos]
    return record if same else None


def read_outcomes(records_dir: Path, file: str) -> tuple[VideoOutcome, ...]:
    """Return the outcomes of the tar `file` from its record; () if there is none."""
    value = found_object(records_dir / f"{file.removesuffix('.tar')}.json", LISTS_LIMIT) or {}
    return tuple(VideoOutcome(*outcome) for outcome in value.get("videos", ()))


def remember_excluded(records_dir: Path, excluded: Excluded | None) -> None:
    """Keep what a list left out of a data set; nothing without a list."""
    if excluded is not None:
        value = {**excluded.to_json(), "file": os.path.abspath(excluded.source)}
        path = records_dir / _EXCLUDED_FILE
        if found_object(path, LISTS_LIMIT) != value:
            write_json(path, value)


def excluded_before(records_dir: Path, keys: Collection[str]) -> str:
    """Say which list left out how many of these keys when the data set was packed; "" for none."""
    value = found_object(records_dir / _EXCLUDED_FILE, LISTS_LIMIT) or {}
    listed = value.get("keys")
    back = set(map(str, listed)).intersection(keys) if isinstance(listed, list) else ()
    if not back:
        return ""
    option = f"--exclude {shlex.quote(str(value.get('file')))}"
    return f"`{option}` left out {counted(len(back), 'video')} of these before"


class HashingStream:
    """A writable file that hashes the bytes written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write and hash `data`."""
        self.hash.update(data)
        return self._file.write(data)
