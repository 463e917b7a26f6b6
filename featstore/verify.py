"""Checking a store against what was recorded when it was written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featstore.chunks import ChunkFiles, Commit, MappedShard, crc32c, read_class_text
from featstore.coded_shards import wrong_coded_features
from featstore.errors import UserError, WorkError, one_line
from featstore.metadata import prompt_set_names, read_metadata
from featstore.progress import ProgressSink, no_progress
from featstore.schema import CLASS_TEXT_GROUP, SMALL_ARRAYS, STATUS_FAILED, STATUS_OK


@dataclass(frozen=True)
class Damage:
    """One finding: the partition's number, or the name of what belongs to none, and why."""

    partition: int | str
    reason: str


@dataclass(frozen=True)
class Report:
    """What a check found: committed partitions, rows by status, damage, partitions not yet done.

    `ok` says that nothing is damaged; an unfinished store is not damaged.
    """

    ok: bool
    partitions: int
    rows_ok: int
    rows_failed: int
    damaged: tuple[Damage, ...]
    pending: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dict."""
        return asdict(self)


def verify(
    store_path: str | Path, deep: bool = False, progress: ProgressSink = no_progress
) -> Report:
    """Check the store: commit entries, sizes and statuses; `deep` reads every byte it holds.

    Deep also checks every chunk's and every row's checksum, and that rows are finite exactly
    where their status is ok. Raises UserError when the store's metadata cannot be used at all.
    """
    path = Path(store_path)
    metadata = read_metadata(path)
    files = ChunkFiles(path, metadata)
    damaged: list[Damage] = []
    pending: list[int] = []
    partitions = rows_ok = rows_failed = 0
    for tar in range(metadata.schema.tars):
        try:
            commit = files.commit(tar)
            if commit is None:
                pending.append(tar)
                continue
            partitions += 1
            files.check_shard(tar, commit)
            status = files.numbers("status", tar)[: commit.rows]
            rows_ok += int(np.count_nonzero(status == STATUS_OK))
            rows_failed += int(np.count_nonzero(status == STATUS_FAILED))
            if deep:
                _check_bytes(files, tar, commit)
            else:
                for name in SMALL_ARRAYS:
                    if not files.path(name, tar).is_file():
                        raise files.damaged(tar, f"{name} chunk is missing")
        except (WorkError, UserError) as error:
            damaged.append(Damage(tar, one_line(error)))
        progress(tar + 1, metadata.schema.tars, damaged=len(damaged))
    for prompt_set in prompt_set_names(path):
        try:
            read_class_text(path, prompt_set, metadata.schema.dim)
        except (WorkError, UserError) as error:
            damaged.append(Damage(f"{CLASS_TEXT_GROUP}/{prompt_set}", one_line(error)))
    return Report(not damaged, partitions, rows_ok, rows_failed, tuple(damaged), tuple(pending))


def _check_bytes(files: ChunkFiles, tar: int, commit: Commit) -> None:
    """Read all chunks of a committed partition; WorkError at the first that is wrong."""
    for name in SMALL_ARRAYS:
        if files.specs[name].dtype == "string":
            files.texts(name, tar)
        else:
            files.numbers(name, tar)
    status = files.numbers("status", tar)[: commit.rows]
    checksums = files.numbers("checksum", tar)[: commit.rows]
    if crc32c(np.ascontiguousarray(checksums)) != commit.checksum_crc32c:
        raise files.damaged(tar, "row checksums are not those of the commit entry")
    if not files.schema.mappable:
        wrong = wrong_coded_features(files, tar, commit, status, checksums)
        if wrong:
            raise files.damaged(tar, wrong)
        return
    try:
        shard = MappedShard(files.path("features", tar), files.schema, commit.rows)
    except ValueError as error:
        raise files.damaged(tar, str(error)) from error
    for number in range(len(shard.chunks)):
        if not shard.chunk_is_intact(number):
            raise files.damaged(tar, f"features chunk {number} fails its checksum")
    for position in range(commit.rows):
        row = shard.rows(position, position + 1)[0]
        if crc32c(row) != int(checksums[position]):
            raise files.damaged(tar, f"features of row {position} fail their checksum")
        if bool(np.isfinite(row).all()) != (status[position] == STATUS_OK):
            raise files.damaged(tar, f"features of row {position} contradict its status")
