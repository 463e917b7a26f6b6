"""The files of a store, for tests that compare two stores bit for bit."""

from __future__ import annotations

from pathlib import Path

# rows, checksum, bytes of the features; the time of writing and the chunk's own checksum follow.
COMMIT_WITHOUT_TIME = 3 * 8


def store_files(store: Path) -> dict[str, bytes]:
    """Every file by its name, commit entries without their time."""
    return {
        name: data[:COMMIT_WITHOUT_TIME] if name.startswith("commit/c/") else data
        for path in sorted(store.rglob("*"))
        if path.is_file()
        for name, data in [(str(path.relative_to(store)), path.read_bytes())]
    }


def committed(store: Path) -> set[str]:
    """Numbers of the partitions that have a commit entry."""
    return {path.parent.name for path in store.glob("commit/c/*/0")}
