"""Every file of a store holds the bytes that zarr writes for the same arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr

from featstore import StoreSchema, StoreWriter, open_store
from featstore.format.array_spec import ArraySpec
from featstore.format.int8 import quantise
from featstore.format.schema import FEATURE_SCALE, class_text_spec
from featstore.rewriting.convert import convert
from featstore.rewriting.quantize import quantize
from tests.support.stores.sample_stores import init_store, make_partition

ROWS = (6, 3)
SCHEMAS = {
    "embeddings": StoreSchema(2, 6, 2, 4, 16, chunk_rows=2),
    "zstd": StoreSchema(2, 6, 2, 4, 16, chunk_rows=2, codec="zstd"),
    "frames": StoreSchema(
        2, 6, 1, 2, 16, chunk_rows=3, feature_type="uint8", tier="frames", item=(4, 4, 3)
    ),
}


def zarr_writes(folder: Path, spec: ArraySpec, rows: slice, values: npt.NDArray[Any]) -> None:
    """Make an array with zarr itself and assign `values` to some of its rows."""
    folder.mkdir()
    (folder / "zarr.json").write_text(json.dumps(spec.metadata()))
    array = zarr.open_array(folder, mode="r+", zarr_format=3)
    array.with_config({"write_empty_chunks": True})[rows] = values


def padded(spec: ArraySpec, values: Any) -> npt.NDArray[Any]:
    kind = object if spec.dtype == "string" else spec.numpy_dtype
    chunk = np.full(spec.chunks, spec.missing, kind)
    chunk[: len(values)] = values
    return chunk


def equal_files(one: Path, two: Path, key: str) -> bool:
    return (one / key).read_bytes() == (two / key).read_bytes()


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_files_of_a_partition(tmp_path: Path, name: str) -> None:
    schema, path = SCHEMAS[name], tmp_path / "s.zarr"
    writer = init_store(path, schema, ROWS)
    partition = make_partition(schema, 1, ROWS[1], seed=4, failed=[1])
    with writer.claim():
        writer.write_partition(1, partition)
    store = open_store(path)
    first = schema.capacity
    specs = schema.arrays()
    compared = set()
    for array, spec in specs.items():
        ours, theirs = path / array, tmp_path / array
        key = spec.chunk_key(1)
        if array in ("chunk_checksum", "commit"):
            values = zarr.open_array(ours, mode="r")[1:2]
            rows = slice(1, 2)
        elif array == "features":
            values, rows = np.asarray(partition.features), slice(first, first + ROWS[1])
        elif array == "checksum":
            values, rows = zarr.open_array(ours, mode="r")[first:], slice(first, 2 * first)
        else:
            values, rows = padded(spec, getattr(partition, array)), slice(first, 2 * first)
        zarr_writes(theirs, spec, rows, values)
        assert equal_files(ours, theirs, key), array
        compared.add(array)
    assert compared == set(specs)
    text = store.class_text("mote28").embeddings
    spec = class_text_spec(*text.shape)
    zarr_writes(tmp_path / "text", spec, slice(None), text)
    assert equal_files(path / "class_text" / "mote28", tmp_path / "text", "c/0/0")


@pytest.mark.parametrize("codec", ["none", "lz4"])
def test_int8_features_and_their_scale(tmp_path: Path, codec: str) -> None:
    schema = SCHEMAS["embeddings"]
    writer = init_store(tmp_path / "s.zarr", schema, ROWS)
    partitions = [make_partition(schema, tar, n, failed=[1]) for tar, n in enumerate(ROWS)]
    with writer.claim():
        for tar, partition in enumerate(partitions):
            writer.write_partition(tar, partition)
    quantize(tmp_path / "s.zarr", tmp_path / "q.zarr")
    convert(tmp_path / "q.zarr", tmp_path / "c.zarr", codec)
    made = StoreWriter.open(tmp_path / "c.zarr")
    specs = made.schema.arrays()
    scale = zarr.open_array(made.path / FEATURE_SCALE, mode="r")[:]
    zarr_writes(tmp_path / "scale", specs[FEATURE_SCALE], slice(None), scale)
    assert equal_files(made.path / FEATURE_SCALE, tmp_path / "scale", "c/0")
    for tar, partition in enumerate(partitions):
        folder = tmp_path / f"features{tar}"
        first = tar * schema.capacity
        stored = quantise(np.asarray(partition.features), scale)
        zarr_writes(folder, specs["features"], slice(first, first + ROWS[tar]), stored)
        assert equal_files(made.path / "features", folder, specs["features"].chunk_key(tar))
