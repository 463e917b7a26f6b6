"""Features that are not mapped: compressed or int8 ones, and any where the system cannot map.

zarr reads and decodes them. What a compressed chunk announces about its length is held against the
schema before it is decoded, so that a small file cannot fill the memory.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any, Final

import numpy as np

from featstore.errors import WorkError
from featstore.format.int8 import dequantise
from featstore.format.schema import CRC_BYTES, FEATURE_SCALE, FeatureArray, FloatArray
from featstore.reading.chunk_files import ChunkFiles, Commit
from featstore.reading.shards import Bytes, chunk_entries

_HEADER: Final = np.dtype([("flags", "<u4"), ("decoded", "<u4"), ("block", "<u4"), ("all", "<u4")])
"""Of a Blosc chunk (c-blosc, README_CHUNK_FORMAT): bytes 4-7 say its decoded length, bytes 12-15
its encoded one."""


def read_scale(files: ChunkFiles) -> FloatArray | None:
    """The scale of the store's int8 features, float32 [D]; None where they are float16.

    WorkError when it is damaged.
    """
    if not files.schema.quantised:
        return None
    try:
        scale: FloatArray = files.numbers(FEATURE_SCALE, 0)
        if np.all(np.isfinite(scale) & (scale > 0)):
            return scale
        reason = "is not positive and finite"
    except WorkError as error:
        reason = f"cannot be read ({error})"
    raise WorkError(
        f"the scale of the int8 features of {files.store} {reason}: make the store again with "
        "`mote-cli store quantize`"
    )


class CodedFeatures:
    """The features of a store, read through zarr. Safe to share between threads."""

    def __init__(self, files: ChunkFiles) -> None:
        self._files = files

    def read(self, tar: int, commit: Commit, first: int, out: FeatureArray) -> None:
        """Fill `out` [n, V, F, D] with rows first, first + 1, ... of a partition.

        They must lie in one inner chunk. ValueError for a chunk that cannot be read, WorkError
        for a shard of another size and a damaged scale.
        """
        schema = self._files.schema
        number = first // schema.chunk_rows
        if not schema.mappable:
            self._check_chunk(tar, commit, number)
        begin = tar * schema.capacity + first
        try:
            stored = self._array[begin : begin + len(out)]
        except (ValueError, RuntimeError, MemoryError, OSError) as error:
            found = "fails its checksum" if "checksum" in str(error) else "cannot be decoded"
            raise ValueError(f"features chunk {number} {found}") from error
        out[:] = stored if self._scale is None else dequantise(stored, self._scale)

    def _check_chunk(self, tar: int, commit: Commit, number: int) -> None:
        """ValueError unless an inner chunk is where it must be and announces its true length."""
        schema = self._files.schema
        start = commit.features_bytes - schema.index_bytes
        with open(self._files.check_shard(tar, commit), "rb", buffering=0) as file:
            index: Bytes = np.frombuffer(os.pread(file.fileno(), schema.index_bytes, start), "u1")
            if len(index) < schema.index_bytes:
                raise ValueError("the features shard ends too early")
            offset, length = chunk_entries(index, schema, commit.rows, start)[number]
            header = os.pread(file.fileno(), _HEADER.itemsize, offset)
        if schema.codec != "none":
            announced = np.frombuffer(header, _HEADER)[0]
            if (announced["decoded"], announced["all"]) != (schema.chunk_bytes, length - CRC_BYTES):
                raise ValueError("a features chunk announces an impossible length")

    @cached_property
    def _scale(self) -> FloatArray | None:
        return read_scale(self._files)

    @cached_property
    def _array(self) -> Any:
        # Imported here: it takes longer than opening a store, and most stores are read without.
        import zarr

        return zarr.open_array(
            zarr.storage.LocalStore(self._files.store, read_only=True),
            path="features",
            mode="r",
            zarr_format=3,
        )
