"""The files of a partition: chunks of the small arrays, and a features shard written row by row.

A row of frames or tokens takes megabytes, and their partition hundreds of megabytes, while a row of
embeddings takes kilobytes. A plain shard is dense, so the place of a row in it is known before any
other row is written, and the checksum of a chunk follows from the checksums of its rows. Rows are
therefore written straight into the file that becomes the shard: memory holds one row, and nothing
is written twice. The file is not memory-mapped, because a full disk is then an error, while with a
map it kills the process.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.files.durable import PARTIAL_SUFFIX, make_folder, sync_folder, write_bytes
from featstore.format.array_checks import not_finite
from featstore.format.array_spec import ABSENT, CRC_BYTES, ArraySpec, ShardShape
from featstore.format.checksums import Checksums, chunk_checksums, crc32c
from featstore.format.schema import FeatureArray, StoreSchema


def write_chunk(path: Path, spec: ArraySpec, values: Any) -> int:
    """Write a file of an array that is not sharded; return the checksum at the file's end.

    `values` (an array or texts) begin the chunk; the rest of it holds the fill value. The bytes
    are the same as zarr would have written.
    """
    if spec.dtype == "string":
        # Imported here: it takes longer than opening a store, and readers do not need it.
        from numcodecs import VLenUTF8, Zstd

        texts = np.full(spec.chunks, spec.missing, object)
        texts[: len(values)] = values
        zstd = next(codec["configuration"] for codec in spec.codecs if codec["name"] == "zstd")
        content = bytes(Zstd(**zstd).encode(VLenUTF8().encode(texts)))
    else:
        chunk = np.full(spec.chunks, spec.missing, spec.numpy_dtype)
        chunk[: len(values)] = values
        content = chunk.tobytes()
    checksum = crc32c(content)
    write_bytes(path, content + checksum.to_bytes(CRC_BYTES, "little"))
    return checksum


def shard_index(shape: ShardShape, starts: Sequence[int]) -> bytes:
    """Return the index of a shard whose chunks begin at `starts`; the last one is their end."""
    index = np.full((shape.chunks_per_shard, 2), ABSENT, "<u8")
    index[: len(starts) - 1, 0] = starts[:-1]
    index[: len(starts) - 1, 1] = np.diff(np.array(starts, np.uint64))
    return index.tobytes() + crc32c(index).to_bytes(CRC_BYTES, "little")


def compressed_shard(schema: StoreSchema, features: FeatureArray) -> bytes:
    """Return the bytes of a features file, encoded by zarr, for a store with a codec."""
    import zarr  # it takes longer than opening a store, and only codecs need it
    from zarr.core.buffer.cpu import Buffer

    spec = schema.arrays()["features"]
    alone = replace(spec, shape=spec.shards or spec.chunks)  # an array with a single shard
    held: dict[str, Any] = {"zarr.json": Buffer.from_bytes(json.dumps(alone.metadata()).encode())}
    array = zarr.open_array(zarr.storage.MemoryStore(held), mode="r+", zarr_format=3)
    # The default leaves out a chunk that holds fill values only.
    array.with_config({"write_empty_chunks": True})[: len(features)] = features
    encoded: bytes = held[alone.chunk_key(0)].to_bytes()
    return encoded


class FeatureRows(AbstractContextManager["FeatureRows"]):
    """The features shard of one partition, written row by row; acts as [rows, V, F, *item].

    It is a context manager: at the end it removes the file if the file was not placed. After a
    kill -9, the next claim of the partition removes the file.
    """

    def __init__(self, path: Path, shape: ShardShape, rows: int) -> None:
        """Begin a shard of `rows` samples, which `place` moves to `path`.

        Raises OSError if the file cannot be made, ValueError if the store's shards are not plain.
        """
        if shape.codec != "none":
            raise ValueError(f"features with codec {shape.codec} are written as a whole")
        self.shape: tuple[int, ...] = (rows, *shape.row_shape)
        self.dtype = np.dtype(shape.stored)
        self.written = np.zeros(rows, np.bool_)
        self._checksums: Checksums = np.zeros(rows, np.uint32)
        self._shape = shape
        self._row_bytes = shape.row_bytes
        self._path = path
        make_folder(path.parent)
        self._partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
        self._file = open(self._partial, "xb", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._file.truncate(shape.shard_bytes(rows))

    def put(self, position: int, row: FeatureArray) -> None:
        """Write one row [V, F, *item]; raises ValueError if its shape, type or values are wrong."""
        if (row.shape, row.dtype) != (self.shape[1:], self.dtype):
            raise ValueError(
                f"row is {row.dtype} {list(row.shape)}: it must be {self.dtype} "
                f"{list(self.shape[1:])}"
            )
        row = np.ascontiguousarray(row, self.dtype.newbyteorder("<"))
        if not_finite(row[None]).any():
            raise ValueError("row is not finite")
        self._write(row, self._place(position))
        self._checksums[position] = crc32c(row)
        self.written[position] = True

    def put_all(self, rows: FeatureArray) -> None:
        """Write all rows [rows, V, F, *item] as they will be read, including the failed ones."""
        rows = np.ascontiguousarray(rows, self.dtype.newbyteorder("<"))
        for first in range(0, len(rows), self._shape.chunk_rows):
            self._write(rows[first : first + self._shape.chunk_rows], self._place(first))
        self._checksums[:] = [crc32c(row) for row in rows]
        self.written[:] = True

    def finish(self) -> Checksums:
        """Fill rows that were not put, write checksums and index, sync; return checksums [rows]."""
        shape, rows = self._shape, len(self.written)
        chunks = shape.chunks(rows)
        empty = np.full(shape.row_shape, shape.missing, shape.dtype)
        written = np.pad(self.written, (0, chunks * shape.chunk_rows - rows))
        padded = np.full(len(written), crc32c(empty), np.uint32)
        padded[written] = self._checksums[self.written]
        # Parts of the file that were never written read as zeros.
        for position in np.flatnonzero(~written).tolist() if shape.missing != 0 else ():
            self._write(empty, self._place(position))
        body = shape.chunk_bytes
        for number, checksum in enumerate(
            chunk_checksums(padded, shape.chunk_rows, self._row_bytes)
        ):
            self._write(np.array([checksum], "<u4"), number * (body + CRC_BYTES) + body)
        starts = [number * (body + CRC_BYTES) for number in range(chunks + 1)]
        self._write(np.frombuffer(shard_index(shape, starts), np.uint8), starts[-1])
        os.fsync(self._file.fileno())
        return padded[:rows]

    def place(self) -> None:
        """Move the finished file into its place as the shard; an earlier one must be gone."""
        self._partial.replace(self._path)
        self._file.close()
        sync_folder(self._path.parent)

    def close(self) -> None:
        """Remove the file unless it was placed."""
        if not self._file.closed:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def __exit__(self, *error: object) -> None:
        self.close()

    def _place(self, position: int) -> int:
        chunk, row = divmod(position, self._shape.chunk_rows)
        begin = chunk * (self._shape.chunk_bytes + CRC_BYTES)
        return begin + row * self._row_bytes

    def _write(self, data: npt.NDArray[Any], offset: int) -> None:
        left = data.reshape(-1).view(np.uint8).data
        while left:
            done = os.pwrite(self._file.fileno(), left, offset)
            left, offset = left[done:], offset + done
