"""What packing remembers between runs: the record of every finished tar, and who is at work."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from featstore.files.durable import write_json
from featstore.files.locks import exclusive
from pipeline.tars.plan import PlannedTar

RECORDS_FOLDER = ".packing"
_LOCK_FILE = "lock"


@dataclass(frozen=True, slots=True)
class VideoOutcome:
    """What became of one video: the hash of its content if it was read, a reason if it failed.

    `sample` is what goes into the tar; it is not kept in records.
    """

    key: str
    sha256: str | None
    reason: str
    sample: dict[str, str | bytes] | None = None


@dataclass(frozen=True, slots=True)
class TarRecord:
    """A finished tar: its size and hash, and the outcome of each of its videos in order."""

    bytes: int
    sha256: str
    outcomes: tuple[VideoOutcome, ...]


def read_record(path: Path, tar: PlannedTar) -> TarRecord | None:
    """The record of a finished tar; None when there is none, or it belongs to other videos."""
    try:
        value = json.loads(path.read_bytes())
        outcomes = tuple(
            VideoOutcome(key, sha256, reason) for key, sha256, reason in value["videos"]
        )
        record = TarRecord(int(value["bytes"]), str(value["sha256"]), outcomes)
    except (OSError, KeyError, TypeError, ValueError):
        return None
    if [outcome.key for outcome in outcomes] != [video.key for video in tar.videos]:
        return None
    return record


def write_record(path: Path, record: TarRecord) -> None:
    """Write the record, complete or not at all."""
    write_json(
        path,
        {
            "bytes": record.bytes,
            "sha256": record.sha256,
            "videos": [[video.key, video.sha256, video.reason] for video in record.outcomes],
        },
        indent=None,
    )


class HashingStream:
    """A file to write to that counts and hashes what goes through."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        """Write, count and hash `data`."""
        self._hash.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def sha256(self) -> str:
        """Hash of all that was written."""
        return self._hash.hexdigest()


def packing_lock(dataset_dir: Path) -> AbstractContextManager[None]:
    """Hold the lock of a data set's folder; WorkError names the process which holds it."""
    return exclusive(dataset_dir / RECORDS_FOLDER / _LOCK_FILE, f"packing into {dataset_dir}")
