"""Stores for tests of growing, merging and exporting them, and what must stay equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from featstore import (
    ClassText,
    Partition,
    StoreSchema,
    StoreWriter,
    open_store,
)
from featstore.format.metadata import StoreMetadata, TarEntry
from featstore.rewriting.grow import Grown
from featstore.rewriting.grow import add_tars as grow
from featstore.rewriting.source import SourceStore
from tests.support.stores.sample_stores import (
    CLASS_NAMES,
    SPLIT_NAMES,
    make_partition,
    make_provenance,
    make_store,
)

RAW_NAMES = ("brush_hair", "climb_stairs", "throw")
ROW_SHAPE = (1, 4, 16)


def make_small_store(path: Path, **provenance: Any) -> None:
    make_store(path, rows=(6, 3), capacity=6, row_shape=ROW_SHAPE, **provenance)


def unit_text(names: Sequence[str], seed: int = 5, hash: str = "cafe") -> ClassText:
    """Class texts whose rows depend on the class's name alone."""
    rows = [np.random.default_rng([seed, *name.encode()]).standard_normal(16) for name in names]
    rows = [row / np.linalg.norm(row) for row in rows]
    return ClassText(tuple(names), np.stack(rows).astype(np.float32), hash)


def other_text() -> ClassText:
    return unit_text(CLASS_NAMES)


def tar_entries(numbers: Sequence[int], rows: Sequence[int]) -> list[TarEntry]:
    """Tars as `sample_stores.init_store` lists them."""
    return [
        TarEntry(f"toy-{i:06d}.tar", n, 1000 + i, f"{i:064x}")
        for i, n in zip(numbers, rows, strict=True)
    ]


def add_tars(path: Path, tars: Sequence[TarEntry], **changes: Any) -> Grown:
    arguments: dict[str, Any] = {
        "class_names": CLASS_NAMES,
        "raw_class_names": RAW_NAMES,
        "split_names": SPLIT_NAMES,
        "dataset_fingerprint": "f00d",
    }
    return grow(path, tars=tars, **(arguments | changes))


def add_three_tars(path: Path) -> Grown:
    """A new tar comes first and two last, so that the earlier ones move."""
    return add_tars(path, tar_entries([7, 0, 1, 8, 9], [5, 6, 3, 6, 1]))


def make_other_store(
    path: Path,
    *,
    rows: Sequence[int] = (6, 2),
    capacity: int = 6,
    names: Sequence[str] = ("throw", "fly", "brush hair"),
    splits: Sequence[str] = ("test", "train"),
    prefix: str = "other",
    texts: Mapping[str, ClassText] | None = None,
    **provenance: Any,
) -> list[Partition]:
    """A store of another data set made the same way; returns its partitions."""
    schema = StoreSchema.create(len(rows), capacity, *ROW_SHAPE)
    made = make_provenance(16, **({"dataset": "other", "dataset_fingerprint": "beef"} | provenance))
    text = ClassText(tuple(names), np.eye(16, dtype=np.float32)[[2, 7, 0]], "f00d")
    writer = StoreWriter.init(
        path,
        StoreMetadata(
            schema,
            made,
            tuple(
                TarEntry(f"other-{i:06d}.tar", n, 1, f"{i + 50:064x}") for i, n in enumerate(rows)
            ),
            tuple(names),
            tuple(name.replace(" ", "_") for name in names),
            tuple(splits),
        ),
        {"mote28": text} if texts is None else texts,
    )
    partitions = []
    with writer.claim():
        for tar, n in enumerate(rows):
            made_rows = make_partition(schema, tar, n, seed=9, failed=[0])
            keys = [f"{prefix}/{key}" for key in made_rows.key]
            partitions.append(replace(made_rows, key=keys))
            writer.write_partition(tar, partitions[-1])
    return partitions


def same_partitions(one: Path, other: Path, places: Mapping[int, int]) -> None:
    """Partitions `places` of two stores hold the same, to the bit (class lists alike)."""
    # The first of a pair is a partition of `other`, the second its place in `one`.
    first, second = SourceStore(other), SourceStore(one)
    for tar, place in places.items():
        equal_partitions(first.partition(tar), second.partition(place))


def equal_partitions(one: Partition, other: Partition) -> None:
    for name in asdict(one):
        left, right = getattr(one, name), getattr(other, name)
        if left is None or isinstance(left, list):
            assert left == right, name
        else:
            assert left.dtype == right.dtype, name
            assert left.tobytes() == right.tobytes(), name


def all_features(path: Path) -> bytes:
    store = open_store(path)
    return store.features(store.rows).tobytes()
