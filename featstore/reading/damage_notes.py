"""Note damage in a file beside the store, so that the next extraction repairs it.

The note is `STORE.damaged.json`: for each damaged partition, the reason and the commit entry that
was found. A finding is valid as long as the partition has that entry; writing the partition again
changes it. `StoreWriter.done` reads the note, so `mote-cli extract` redoes damaged partitions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from featstore.errors import UserError
from featstore.files.bounded import read_bounded
from featstore.files.documents import parse_json
from featstore.files.durable import sync_folder, write_json
from featstore.reading.chunk_files import ChunkFiles

NOTE_LIMIT: Final = 16 * 2**20
_ENTRY_LIMIT: Final = 256


def note_path(store: Path) -> Path:
    """Return the path of the file in which damage of a store is noted."""
    return store.with_name(f"{store.name}.damaged.json")


class DamageNote:
    """The findings that are noted beside a store; they are read once, when this object is made."""

    def __init__(self, files: ChunkFiles) -> None:
        """Read the note; UserError if it cannot be read or mote did not write it."""
        self._files = files
        self._found: dict[int, tuple[str, str]] = {}  # reason and commit entry by partition
        note = note_path(files.store)
        try:
            raw = read_bounded(note, NOTE_LIMIT)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"{note} cannot be read ({why}): delete it and verify again with --deep"
            ) from error
        try:
            found: dict[str, dict[str, Any]] = parse_json(raw)["partitions"]
            for tar, finding in found.items():
                if 0 <= int(tar) < files.schema.tars:
                    self._found[int(tar)] = str(finding["reason"]), finding["commit"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{note} is not a note of `mote-cli verify` ({error}): delete it and verify again"
            ) from error

    def reason(self, tar: int) -> str | None:
        """Return the damage of a partition; None if it has none or was written again since."""
        reason, commit = self._found.get(tar, (None, None))
        return reason if commit == _entry(self._files, tar) else None

    def reasons(self) -> dict[int, str]:
        """Return the findings that are still valid: partition number to reason."""
        found = {tar: self.reason(tar) for tar in self._found}
        return {tar: reason for tar, reason in found.items() if reason is not None}


def note_damage(files: ChunkFiles, reasons: Mapping[int, str]) -> Path | None:
    """Replace the earlier note by these findings; without findings, remove the note.

    Returns the path of the note, or None without findings. Raises OSError if it cannot be written.
    """
    note = note_path(files.store)
    if not reasons:
        if note.exists():
            note.unlink()
            sync_folder(note.parent)
        return None
    partitions = {
        str(tar): {"reason": reason, "commit": _entry(files, tar)}
        for tar, reason in sorted(reasons.items())
    }
    write_json(note, {"partitions": partitions})
    return note


def _entry(files: ChunkFiles, tar: int) -> str:
    """Return the bytes of the commit entry's file in hexadecimal; "" if there is none."""
    try:
        return read_bounded(files.path("commit", tar), _ENTRY_LIMIT).hex()
    except (OSError, ValueError):  # UserError, which a symbolic link raises, is a ValueError
        return ""
