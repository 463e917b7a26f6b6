"""The files of a store, for tests that compare two stores bit for bit."""

from __future__ import annotations

from pathlib import Path

from featstore.files.locks import RECORD_BYTES

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


def ray_workers(store: Path) -> list[int]:
    """Living workers of the Ray engine that have claimed partitions, by the lock file's records."""
    lock = store.with_name(f"{store.name}.lock")
    records = lock.read_bytes()[RECORD_BYTES:] if lock.exists() else b""
    owners = {
        int(owner.partition(b" ")[0])
        for start in range(0, len(records), RECORD_BYTES)
        if (owner := records[start : start + RECORD_BYTES].strip(b"\0"))
    }
    return sorted(filter(_is_ray_worker, owners))


def _is_ray_worker(pid: int) -> bool:
    """Records stay when their process has ended, and another may have got its number."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::TarWorker")
    except OSError:
        return False
