"""Small stores of sequences with known content."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featstore import StoreSchema
from featstore.format.gaps import Gap
from featstore.writing.partition import SequencePartition, SomeFrames
from tests.support.stores.sample_stores import init_store

Row = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]
"""Features [n, ...], seconds [n] and frame numbers [n] of a row."""


def sequence_schema(
    tars: int,
    capacity: int,
    *,
    crops: int = 1,
    dim: int = 16,
    block: int = 7,
    room: int = 20,
    **more: Any,
) -> StoreSchema:
    """Blocks of `block` frames, `room` of them in a partition."""
    return StoreSchema(*(tars, capacity, crops, 1, dim, block), frame_capacity=block * room, **more)


def make_rows(schema: StoreSchema, lengths: Sequence[int], seed: int = 0) -> list[Row]:
    """Random rows of these lengths, with ascending times."""
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for n in lengths:
        features = rng.standard_normal((n, *schema.row_shape)).astype(schema.dtype)
        steps = rng.choice([0.0, 0.04, 0.25, 7.0], n)
        rows.append((features, np.cumsum(steps), np.arange(n, dtype=np.int32) * 3))
    return rows


def sequence_partition(
    tar: int, rows: Sequence[Row], *, portion: int = 5, **changes: Any
) -> SequencePartition:
    """A partition of these rows; those without frames failed."""
    n = len(rows)
    length = np.array([len(row[0]) for row in rows], np.int64)

    def frames() -> Iterator[SomeFrames]:
        for row in rows:
            for at in range(0, len(row[0]), portion):
                yield SomeFrames(*(array[at : at + portion] for array in row))

    fields: dict[str, Any] = {
        "key": [f"tar{tar}/long {i} é" for i in range(n)],
        "label": np.arange(n, dtype=np.int32) % 3,
        "num_frames": length.astype(np.int32) * 3,
        "fps": np.full(n, 25, np.float32),
        "status": np.where(length > 0, 1, 2).astype(np.uint8),
        "splits": np.full(n, 1, np.uint32),
        "container_frames": np.zeros(n, np.int32),
        "damaged_packets": np.zeros(n, np.int32),
        "reason": ["" if size else "no video stream" for size in length],
        "length": length,
        "gaps": [(Gap(1.5, 2.5, "damaged"),) if i == 0 else () for i in range(n)],
        "frames": frames,
    }
    return SequencePartition(**(fields | changes))


def make_sequence_store(
    path: Path,
    lengths: Sequence[Sequence[int]] = ((9, 0, 23), (4,)),
    *,
    seed: int = 0,
    **sizes: Any,
) -> list[list[Row]]:
    """A finished store whose tars hold rows of these lengths; returns the rows."""
    capacity = max(len(of_tar) for of_tar in lengths)
    schema = sequence_schema(len(lengths), capacity, **sizes)
    writer = init_store(path, schema, [len(of_tar) for of_tar in lengths], sampling="fps:4")
    rows = [make_rows(schema, of_tar, seed + tar) for tar, of_tar in enumerate(lengths)]
    with writer.claim():
        for tar, of_tar in enumerate(rows):
            writer.write_partition(tar, sequence_partition(tar, of_tar))
    return rows
