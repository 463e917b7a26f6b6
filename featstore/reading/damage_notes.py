"""Damage that was found, noted beside the store so that the next extraction repairs it.

The note is `STORE.damaged.json`: by partition the reason and the commit entry as it was found. A
finding holds as long as the partition has that entry; writing the partition again changes the
entry. `StoreWriter.done` reads the note, so that `mote-cli extract` does damaged partitions again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from featstore.errors import UserError
from featstore.files.bounded import read_bounded
from featstore.files.durable import sync_folder, write_json
from featstore.reading.chunk_files import ChunkFiles

NOTE_LIMIT: Final = 16 * 2**20
_ENTRY_LIMIT: Final = 256


def note_path(store: Path) -> Path:
    """Where damage of a store is noted."""
    return store.with_name(f"{store.name}.damaged.json")


class DamageNote:
    """The findings that are noted beside a store, as they are when this is made."""

    def __init__(self, files: ChunkFiles) -> None:
        """Read the note; UserError when it is not one of ours."""
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
            found: dict[str, dict[str, Any]] = json.loads(raw)["partitions"]
            for tar, finding in found.items():
                if 0 <= int(tar) < files.schema.tars:
                    self._found[int(tar)] = str(finding["reason"]), finding["commit"]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{note} is not a note of `mote-cli verify` ({error}): delete it and verify again"
            ) from error

    def reason(self, tar: int) -> str | None:
        """The damage of a partition; None if none was found or it was written again since."""
        reason, commit = self._found.get(tar, (None, None))
        return reason if commit == _entry(self._files, tar) else None

    def reasons(self) -> dict[int, str]:
        """Reason by partition of the findings that still hold."""
        found = {tar: self.reason(tar) for tar in self._found}
        return {tar: reason for tar, reason in found.items() if reason is not None}


def note_damage(files: ChunkFiles, reasons: Mapping[int, str]) -> Path | None:
    """Note the findings in place of earlier ones; without findings the note is removed.

    Returns the note's path, None without findings. OSError where it cannot be written.
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
    """The commit entry's bytes as they lie on the disk, in hexadecimal; "" when there is none."""
    try:
        return read_bounded(files.path("commit", tar), _ENTRY_LIMIT).hex()
    except (OSError, ValueError):  # UserError for a link, too
        return ""
