"""Checking a store against what was recorded when it was written; nothing in it is changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from featstore.errors import UserError, WorkError, one_line
from featstore.format.array_checks import not_finite, wrong_labels
from featstore.format.checksums import PIECE_BYTES, Checksums, chunk_checksums, crc32c
from featstore.format.class_texts import read_class_text
from featstore.format.metadata import prompt_set_names, read_metadata, wrong_attributes
from featstore.format.schema import (
    CLASS_TEXT_GROUP,
    SPANS,
    STATUS_FAILED,
    STATUS_OK,
    FeatureArray,
)
from featstore.progress import Outcome, ProgressSink, no_progress
from featstore.reading.chunk_files import ChunkFiles, Commit, DamagedPartition
from featstore.reading.coded_shards import CodedFeatures
from featstore.reading.damage_notes import DamageNote, note_damage, note_path
from featstore.reading.features import FeatureFiles
from featstore.reading.shards import ShardFile
from featstore.reading.store import Store

logger = logging.getLogger(__name__)

# Cosine of every frame that is encoded again with the one stored. Features are equal bit for bit on
# the same machine; another processor adds in another order, in the precision's own rounding.
REENCODE_COSINE: Final = {"fp32": 0.99999, "bf16": 0.999, "fp16": 0.999}


@dataclass(frozen=True)
class Damage:
    """One finding: the partition's number, or the name of a part outside partitions, and why."""

    partition: int | str
    reason: str


@dataclass(frozen=True)
class Report(Outcome):
    """What a check found: committed partitions, rows by status, damage, partitions not yet done.

    `ok` is true if nothing is damaged; an unfinished store is not damaged. `deep` is true if every
    byte was read.
    """

    ok: bool
    deep: bool
    partitions: int
    rows_ok: int
    rows_failed: int
    damaged: tuple[Damage, ...]
    pending: tuple[int, ...]


def verify(
    store_path: str | Path, deep: bool = False, progress: ProgressSink = no_progress
) -> Report:
    """Check the store: metadata, commit entries, sizes of all files; `deep` reads every byte.

    A deep check compares the checksum of every chunk and every row, and finds rows of floating
    point numbers that contradict their status: finite if failed, or not finite if ok. Any other
    check repeats what an earlier deep check noted beside the store, unless it was repaired. Raises
    UserError if the store's metadata cannot be used at all.
    """
    path = Path(store_path)
    metadata = read_metadata(path)
    files = ChunkFiles(path, metadata)
    noted = {} if deep else DamageNote(files).reasons()
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
                _check_bytes(files, tar, commit, status)
            else:
                files.check_small_sizes(tar)
            if tar in noted:
                damaged.append(Damage(tar, f"{noted[tar]} (found by an earlier deep check)"))
        except (WorkError, UserError) as error:
            what = error.what if isinstance(error, DamagedPartition) else error
            damaged.append(Damage(tar, one_line(what)))
        progress(tar + 1, metadata.schema.tars, damaged=len(damaged))
    damaged += [
        Damage(f"{name}/zarr.json", reason) for name, reason in wrong_attributes(path, metadata)
    ]
    for prompt_set in prompt_set_names(path):
        try:
            read_class_text(path, prompt_set, metadata.provenance, metadata.class_names)
        except (WorkError, UserError) as error:
            damaged.append(Damage(f"{CLASS_TEXT_GROUP}/{prompt_set}", one_line(error)))
    return Report(
        not damaged, deep, partitions, rows_ok, rows_failed, tuple(damaged), tuple(pending)
    )


def note_partitions(path: Path, deep: bool, damaged: Mapping[int, str]) -> Path | None:
    """Note beside the store what a check found, so that `extract` does those partitions again.

    `damaged` holds the reason by partition. Returns the note's path, or None if there is no
    finding or the note cannot be written, which is logged with a remedy.
    """
    files = ChunkFiles(path, read_metadata(path))
    # Findings of a deep check stay noted, in the same words, until they are repaired.
    noted = {} if deep else DamageNote(files).reasons()
    try:
        return note_damage(files, {**damaged, **noted})
    except OSError as error:
        where = ", ".join(str(path / "commit" / "c" / str(tar)) for tar in sorted(damaged))
        logger.warning(
            "%s cannot be written (%s), so extract will not know of the damage: delete %s before "
            "you run extract",
            *(note_path(path), error.strerror, where or "that file"),
        )
        return None


def _check_bytes(
    files: ChunkFiles, tar: int, commit: Commit, status: npt.NDArray[np.uint8]
) -> None:
    """Read all chunks of a committed partition; raise WorkError at the first wrong one."""
    classes = len(files.metadata.class_names)
    for name in files.schema.small_arrays:
        if files.specs[name].dtype == "string":
            texts = files.texts(name, tar)[: commit.rows]
            if name == "key" and len(set(texts)) != len(texts):
                raise files.damaged(tar, "two samples have the same key")
            if name == SPANS:
                files.spans(tar, commit.rows)
        elif name not in ("status", "checksum"):  # read before and after
            values = files.numbers(name, tar)[: commit.rows]
            multi_label = files.schema.multi_label
            if name == "label" and wrong_labels(values, classes, multi_label):
                raise files.damaged(tar, f"a label lies outside 0..{classes - 1}")
    if ((status != STATUS_OK) & (status != STATUS_FAILED)).any():
        raise files.damaged(tar, "a listed sample is neither ok nor failed")
    checksums = files.checksums(tar, commit)
    if files.schema.sequences:
        _check_sequences(files, tar, commit)
        return
    if wrong := _wrong_features(files, tar, commit, status, checksums):
        raise files.damaged(tar, wrong)


def _check_sequences(files: ChunkFiles, tar: int, commit: Commit) -> None:
    """Read all frames of a partition of sequences, block by block; WorkError as `_check_bytes`."""
    edges = files.lengths(tar, commit)
    files.gaps(tar, commit.rows)
    size = files.shape.chunk_rows
    for name, shape in files.schema.sharded.items():
        # A new reader, so that every block is compared, in whole and with its recorded checksum.
        reader = FeatureFiles(files, {tar: commit}, lambda row: "", mapped=False, array=name)
        before = -np.inf
        try:
            with ShardFile(files.path(name, tar), shape, commit.lines) as shard:
                for number in range(shape.chunks(commit.lines)):
                    shard.chunk(number)
                    block, first = reader.block(tar, number), number * size
                    if name == "features" and not_finite(block).any():
                        raise ValueError(f"features of block {number} are not finite")
                    if name == "pts":
                        steps = np.diff(block, prepend=before)
                        begun = edges[:-1][np.diff(edges) > 0] - first
                        steps[begun[(begun >= 0) & (begun < len(block))]] = 0
                        if not np.isfinite(block).all() or (steps < 0).any():
                            raise ValueError(f"the times of block {number} descend")
                        before = block[-1]
        except ValueError as error:
            raise files.damaged(tar, str(error)) from error


def _wrong_features(
    files: ChunkFiles,
    tar: int,
    commit: Commit,
    status: npt.NDArray[np.uint8],
    checksums: Checksums,
) -> str:
    """Return what is wrong with the features of a partition, or "" if nothing is.

    Raises WorkError if the scale of int8 features is damaged.
    """
    schema, rows = files.schema, commit.rows
    expected = chunk_checksums(checksums, schema.chunk_rows, schema.row_bytes).tolist()
    step = max(1, PIECE_BYTES // schema.row_bytes)
    buffer: FeatureArray = np.empty((step, *schema.row_shape), schema.dtype)
    wrong = np.zeros(rows, np.bool_)
    coded = CodedFeatures(files)
    try:
        with ExitStack() as stack:
            shard = None
            if schema.mappable:
                path = files.path("features", tar)
                shard = stack.enter_context(ShardFile(path, files.shape, rows))
            for number, first in enumerate(range(0, rows, schema.chunk_rows)):
                last, end = min(first + schema.chunk_rows, rows), first + schema.chunk_rows
                checksum = 0
                for at in range(first, last, step):
                    piece = buffer[: last - at]
                    if shard is None:
                        coded.read(tar, commit, at, piece)
                    else:
                        shard.read(at, piece)
                    checksum = crc32c(piece, checksum)
                    wrong[at : at + len(piece)] = not_finite(piece)
                if shard is not None:
                    unlisted = np.empty((end - last, *schema.row_shape), schema.dtype)
                    shard.read(last, unlisted)  # only the checksum of the chunk covers these
                    if crc32c(unlisted, checksum) != shard.recorded_checksum(number):
                        return f"features chunk {number} fails its checksum"
                if checksum != expected[number]:
                    return f"features of rows {first} to {last - 1} fail their checksums"
        contradicting = np.flatnonzero(wrong != (status != STATUS_OK))
        # Zeros of whole numbers may be a failed row or a black picture.
        if len(contradicting) and schema.dtype.kind == "f":
            return f"features of row {contradicting[0]} contradict its status"
    except ValueError as error:
        return str(error)
    return ""


EncodeRow = Callable[[int, str], "npt.NDArray[Any] | str"]
"""Encodes the video of an array row, given the row and its key. Returns float32 [V, F, D] (or the
items of another tier in its type), or the reason why the video cannot be decoded."""


@dataclass(frozen=True)
class ReencodedRow:
    """One row encoded again: the smallest cosine of its frames and the largest difference.

    If the row could not be encoded, `reason` says why and `cosine` is 0.
    """

    key: str
    partition: int
    cosine: float
    max_abs: float
    equal: bool
    reason: str = ""


@dataclass(frozen=True)
class Reencoding(Outcome):
    """Rows encoded again and compared; `ok` is true if every cosine reaches `tolerance`."""

    ok: bool
    tolerance: float
    equal: int
    rows: tuple[ReencodedRow, ...]


def reencode(
    store: Store,
    count: int,
    encode: EncodeRow,
    *,
    seed: int = 0,
    progress: ProgressSink = no_progress,
) -> Reencoding:
    """Encode `count` ok rows again, drawn without repeats by `seed`, and compare.

    Raises UserError if the store has no ok row or holds sequences, and whatever `encode` raises.
    """
    store.require_fixed_rows()
    usable = np.flatnonzero(store.status == STATUS_OK)
    if not len(usable):
        raise UserError(f"{store.path} has no row that is ok: there is nothing to encode again")
    drawn = np.random.default_rng(seed).permutation(usable)[:count]
    tolerance = REENCODE_COSINE.get(store.provenance.precision, min(REENCODE_COSINE.values()))
    if store.provenance.quantised:
        tolerance = min(REENCODE_COSINE.values())
    rows = []
    for done, position in enumerate(np.sort(drawn).tolist(), start=1):
        row, key = int(store.rows[position]), store.keys[position]
        stored = store.features([row])[0]
        again = encode(row, key)
        if store.provenance.of_views and not isinstance(again, str):
            # What rounding left is a row of its own there: only all of a view has a direction.
            stored, again = (array.reshape(len(array), 1, -1) for array in (stored, again))
        rows.append(_compared(key, row // store.schema.capacity, stored, again))
        progress(done, len(drawn))
    return Reencoding(
        ok=all(row.cosine >= tolerance for row in rows),
        tolerance=tolerance,
        equal=sum(row.equal for row in rows),
        rows=tuple(rows),
    )


def _compared(
    key: str, partition: int, stored: FeatureArray, encoded: npt.NDArray[Any] | str
) -> ReencodedRow:
    if isinstance(encoded, str):
        return ReencodedRow(key, partition, 0.0, 0.0, False, one_line(encoded))
    with np.errstate(over="ignore"):
        again = encoded.astype(stored.dtype)
    if again.shape != stored.shape:
        reason = f"{list(again.shape)} numbers come out, {list(stored.shape)} are stored"
        return ReencodedRow(key, partition, 0.0, 0.0, False, reason)
    # An item of a tier is one vector; equal black pictures have no direction.
    flat = (*stored.shape[:2], -1)
    a, b = (array.reshape(flat).astype(np.float64) for array in (stored, again))
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    alike = (a == b).all(-1).astype(np.float64)
    cosines = np.divide((a * b).sum(-1), lengths, out=alike, where=lengths > 0)
    smallest = float(np.nan_to_num(cosines, nan=0.0).min())
    largest = float(np.nan_to_num(np.abs(a - b), nan=float(np.finfo(np.float16).max)).max())
    return ReencodedRow(key, partition, smallest, largest, bool(np.array_equal(stored, again)))
