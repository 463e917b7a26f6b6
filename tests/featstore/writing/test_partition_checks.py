"""What a writer refuses before it writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore import ClassText, Partition, StoreSchema, StoreWriter, UserError, WorkError
from featstore.format.metadata import StoreMetadata, TarEntry
from tests.support.stores.sample_stores import (
    CLASS_NAMES,
    init_store,
    make_partition,
    make_provenance,
)

SCHEMA = StoreSchema.create(2, 8, 2, 4, 16)


def changed(partition: Partition, **changes: Any) -> Partition:
    return dataclasses.replace(partition, **changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("label", np.zeros(7, np.int32)),
        ("label", np.zeros(8, np.int64)),
        ("pts", np.zeros((8, 2, 4), np.float32)),
        ("frame_index", np.zeros((8, 2, 3), np.int32)),
        ("features", np.zeros((8, 2, 4, 16), np.float32)),
    ],
)
def test_shapes_and_types(field: str, value: np.ndarray[Any, Any]) -> None:
    with pytest.raises(ValueError, match=f"{field} is .* it must be"):
        changed(make_partition(SCHEMA, 0, 8), **{field: value})


def test_duplicate_keys_and_wrong_statuses() -> None:
    partition = make_partition(SCHEMA, 0, 8)
    with pytest.raises(ValueError, match="distinct keys"):
        changed(partition, key=["a"] * 8)
    with pytest.raises(ValueError, match=r"ok \(1\) or failed \(2\)"):
        changed(partition, status=np.zeros(8, np.uint8))
    with pytest.raises(ValueError, match="features of a failed sample must be NaN"):
        changed(partition, status=np.full(8, 2, np.uint8))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_overflow_are_named(value: float) -> None:
    features = make_partition(SCHEMA, 0, 8).features.copy()
    features[5, 0, 1, 2] = value
    with pytest.raises(WorkError, match="features of tar0/clip 5 é are not finite"):
        changed(make_partition(SCHEMA, 0, 8), features=features)


def test_partition_must_fit_its_tar(tmp_path: Path) -> None:
    writer = init_store(tmp_path / "s.zarr", SCHEMA, [8, 3])
    with pytest.raises(ValueError, match="has 8 samples, but its tar lists 3"):
        writer.write_partition(1, make_partition(SCHEMA, 1, 8))
    with pytest.raises(ValueError, match="partition 2: the store has 0 to 1"):
        writer.write_partition(2, make_partition(SCHEMA, 1, 8))
    other = StoreSchema.create(2, 8, 2, 4, 8)
    with pytest.raises(ValueError, match=r"rows \[2, 4, 8\], the store has \[2, 4, 16\]"):
        writer.write_partition(0, make_partition(other, 0, 8))
    partition = make_partition(SCHEMA, 0, 8)
    with pytest.raises(ValueError, match=r"label outside 0\.\.2"):
        writer.write_partition(0, changed(partition, label=np.full(8, 3, np.int32)))
    with pytest.raises(ValueError, match="split beyond the 2"):
        writer.write_partition(0, changed(partition, splits=np.full(8, 4, np.uint32)))
    assert writer.pending() == [0, 1]


def test_class_texts_must_be_unit_rows_of_the_same_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="length 1"):
        ClassText(CLASS_NAMES, np.ones((3, 16), np.float32), "")
    with pytest.raises(ValueError, match="float32"):
        ClassText(CLASS_NAMES, np.eye(3, 16), "")
    unit = np.eye(3, 16, dtype=np.float32)
    names = (CLASS_NAMES, CLASS_NAMES, ())
    metadata = StoreMetadata(SCHEMA, make_provenance(), (TarEntry("a", 1, 1, ""),) * 2, *names)
    path = tmp_path / "s.zarr"
    texts = {"name": ClassText(CLASS_NAMES[::-1], unit, "")}
    with pytest.raises(UserError, match="class texts 'name' are for 3 classes"):
        StoreWriter.init(path, metadata, texts)
    texts = {"../name": ClassText(CLASS_NAMES, unit, "")}
    with pytest.raises(UserError, match="no name for a prompt set"):
        StoreWriter.init(path, metadata, texts)
    assert not path.exists()
