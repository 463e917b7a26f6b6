"""Small stores with known content, for every test that reads or writes one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featstore import ClassText, Partition, Provenance, StoreSchema, StoreWriter
from featstore.format.metadata import StoreMetadata, TarEntry
from featstore.opening import AnyWriter, StorePlace, new_writer

CLASS_NAMES = ("brush hair", "climb stairs", "throw")
SPLIT_NAMES = ("train", "val")


def make_provenance(dim: int = 16, **changes: Any) -> Provenance:
    fields: dict[str, Any] = {
        "encoder": "ViT-B-32/random",
        "encoder_fingerprint": "0123456789abcdef0123456789abcdef",
        "dim": dim,
        "logit_scale": 100.0,
        "precision": "fp32",
        "sampling": "uniform:4",
        "crops": 1,
        "preprocessing": {"size": 224, "mean": [0.48, 0.46, 0.41]},
        "decoder": "pyav",
        "versions": {"mote-video": "0.1.0"},
        "dataset": "toy",
        "dataset_fingerprint": "feed",
    }
    return Provenance(**(fields | changes))


def make_partition(
    schema: StoreSchema, tar: int, rows: int, *, seed: int = 0, failed: Sequence[int] = ()
) -> Partition:
    """Random content fixed by (seed, tar); the positions in `failed` are failed samples."""
    rng = np.random.default_rng((seed, tar))
    shape = (rows, schema.views, schema.frames)
    if schema.dtype == np.uint8:
        features = rng.integers(0, 256, (*shape, *schema.item), np.uint8)
    else:
        features = rng.standard_normal((*shape, *schema.item)).astype(np.float16)
    frame_index = rng.integers(0, 300, shape).astype(np.int32)
    pts = rng.random(shape)
    status = np.ones(rows, np.uint8)
    bad = list(failed)
    frame_index[bad], pts[bad], status[bad] = -1, np.nan, 2
    features[bad] = schema.missing
    return Partition(
        key=[f"tar{tar}/clip {i} é" for i in range(rows)],
        label=rng.integers(0, len(CLASS_NAMES), rows).astype(np.int32),
        num_frames=rng.integers(1, 300, rows).astype(np.int32),
        fps=np.full(rows, 29.97, np.float32),
        status=status,
        splits=rng.integers(1, 4, rows).astype(np.uint32),
        container_frames=rng.integers(0, 300, rows).astype(np.int32),
        damaged_packets=rng.integers(0, 3, rows).astype(np.int32),
        reason=["no video stream" if i in bad else "" for i in range(rows)],
        frame_index=frame_index,
        pts=pts,
        features=features,
    )


def make_class_text(dim: int = 16) -> ClassText:
    embeddings = np.zeros((len(CLASS_NAMES), dim), np.float32)
    embeddings[range(len(CLASS_NAMES)), np.arange(len(CLASS_NAMES)) % dim] = 1
    return ClassText(CLASS_NAMES, embeddings, "beef")


def init_store(
    path: Path, schema: StoreSchema, rows: Sequence[int], **provenance: Any
) -> StoreWriter:
    """An empty store whose tars list `rows` samples."""
    writer = init_store_at(path, schema, rows, **provenance)
    assert isinstance(writer, StoreWriter)
    return writer


def init_store_at(
    place: StorePlace, schema: StoreSchema, rows: Sequence[int], **provenance: Any
) -> AnyWriter:
    """The same in a folder or at a URL."""
    metadata = StoreMetadata(
        schema,
        make_provenance(schema.dim, **{"tier": schema.tier, **provenance}),
        tuple(TarEntry(f"toy-{i:06d}.tar", n, 1000 + i, f"{i:064x}") for i, n in enumerate(rows)),
        CLASS_NAMES,
        ("brush_hair", "climb_stairs", "throw"),
        SPLIT_NAMES,
    )
    return new_writer(place, metadata, {"mote28": make_class_text(schema.dim)})


def make_store(
    path: Path,
    rows: Sequence[int] = (8, 3),
    *,
    capacity: int = 8,
    row_shape: tuple[int, int, int] = (2, 4, 16),
    failed: Sequence[int] = (1,),
    **provenance: Any,
) -> list[Partition]:
    """A finished store; returns the partitions it holds."""
    schema = StoreSchema.create(len(rows), capacity, *row_shape)
    writer = init_store(path, schema, rows, **provenance)
    partitions = [make_partition(schema, tar, n, failed=failed) for tar, n in enumerate(rows)]
    with writer.claim():
        for tar, partition in enumerate(partitions):
            writer.write_partition(tar, partition)
    return partitions
