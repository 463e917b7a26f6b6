"""Decode features that are not mapped: compressed or int8 ones, or all if the system cannot map.

They are decoded one inner chunk at a time; zarr would return the same in twice the time. The length
that a compressed chunk announces is compared with the schema before decoding, so that a small file
cannot fill the memory.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Final

import numpy as np

from featstore.errors import WorkError
from featstore.format.checksums import crc32c
from featstore.format.int8 import dequantise
from featstore.format.schema import FEATURE_SCALE, FeatureArray, FloatArray
from featstore.reading.chunk_files import ChunkFiles, Commit
from featstore.reading.repair import repair_command
from featstore.reading.shards import ShardFile

_HEADER: Final = np.dtype([("flags", "<u4"), ("decoded", "<u4"), ("block", "<u4"), ("all", "<u4")])
"""The header of a Blosc chunk (c-blosc, README_CHUNK_FORMAT): bytes 4-7 hold the decoded length,
bytes 12-15 the encoded length."""

_KEPT_BYTES: Final = 50_000_000
"""The most recently decoded chunks of a store are kept in memory, up to about this many bytes."""


def read_scale(files: ChunkFiles) -> FloatArray | None:
    """Return the scale of the store's int8 features, float32 [D]; None if they are not int8.

    Raises WorkError if the scale is damaged.
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
        f"`{repair_command(files.store, files.metadata)}`"
    )


class CodedFeatures:
    """Decodes the features of a store. Safe to share between threads."""

    def __init__(self, files: ChunkFiles) -> None:
        self._files = files
        # A whole chunk is decoded for each row, and the next row is often in the same chunk.
        chunk_bytes = files.schema.chunk_rows * files.schema.row_bytes
        self._chunk = lru_cache(max(1, _KEPT_BYTES // chunk_bytes))(self._decoded)

    def read(
        self, tar: int, commit: Commit, first: int, out: FeatureArray, check: bool = False
    ) -> list[int]:
        """Fill `out` [n, V, F, D] with rows first, first + 1, ... of one inner chunk.

        Returns the same as `ShardFile.read`. Raises ValueError for a chunk that cannot be read,
        WorkError for a shard of the wrong size and for a damaged scale.
        """
        number, row = divmod(first, self._files.schema.chunk_rows)
        out[:] = self._chunk(tar, commit, number)[row : row + len(out)]
        return [crc32c(out)] if check else []

    def _decoded(self, tar: int, commit: Commit, number: int) -> FeatureArray:
        """Decode an inner chunk, [chunk_rows, V, F, D]; errors as `read`."""
        schema = self._files.schema
        with ShardFile(
            self._files.check_shard(tar, commit), self._files.shape, commit.lines
        ) as file:
            data = file.chunk(number)
        if schema.codec != "none":
            announced = np.frombuffer(data[: _HEADER.itemsize], _HEADER)[0]
            if (announced["decoded"], announced["all"]) != (schema.chunk_bytes, len(data)):
                raise ValueError("a features chunk announces an impossible length")
            # Imported here because it takes longer than opening a store, and most do not need it.
            from numcodecs.blosc import decompress

            try:
                data = decompress(data)
            except (ValueError, RuntimeError, MemoryError) as error:
                raise ValueError(f"features chunk {number} cannot be decoded") from error
        stored: FeatureArray = np.frombuffer(data, self._files.specs["features"].numpy_dtype)
        stored = stored.reshape(schema.chunk_rows, *schema.row_shape)
        return stored if self._scale is None else dequantise(stored, self._scale)

    @cached_property
    def _scale(self) -> FloatArray | None:
        return read_scale(self._files)
