"""How one array of a store is described: its metadata, and the sizes of its shards if it has any.

The first axis of an array counts *lines*, which is cut into one file per tar: rows, or frames of a
store of sequences. The arithmetic of shards, which readers and writers share, is the same for both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

CRC_BYTES: Final = 4
# The offset and the length of an inner chunk that a shard does not hold (Zarr v3 sharding).
ABSENT: Final = 2**64 - 1
# Blosc adds a header of 16 bytes to a chunk it cannot compress.
BLOSC_HEADER_BYTES: Final = 16


BYTES_CODEC: Final[dict[str, Any]] = {"name": "bytes", "configuration": {"endian": "little"}}
SINGLE_BYTES_CODEC: Final[dict[str, Any]] = {"name": "bytes"}
CRC_CODEC: Final[dict[str, Any]] = {"name": "crc32c"}
VLEN_CODEC: Final[dict[str, Any]] = {"name": "vlen-utf8", "configuration": {}}
ZSTD_CODEC: Final[dict[str, Any]] = {
    "name": "zstd",
    "configuration": {"level": 3, "checksum": False},
}


@dataclass(frozen=True)
class ArraySpec:
    """One array of the store, with everything that its `zarr.json` needs.

    `chunks` is the shape that one file holds. If `shards` is given, a file holds that shape instead
    and `chunks` is the shape of an inner chunk. `dtype` is the Zarr v3 data type name. `fill` is
    the fill value in JSON, so NaN is the string "NaN".
    """

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None
    fill: int | str
    codecs: tuple[dict[str, Any], ...]
    dimension_names: tuple[str, ...]
    units: str

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The little-endian numpy type of a numeric array; ValueError for strings."""
        if self.dtype == "string":
            raise ValueError("a string array has no fixed-width numpy type")
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def file_bytes(self) -> int:
        """The size of a chunk file of a numeric array that is neither sharded nor compressed."""
        return math.prod(self.chunks) * self.numpy_dtype.itemsize + CRC_BYTES

    @property
    def missing(self) -> float | str:
        """The value of rows that were not written: the fill value as a number or a text."""
        return float("nan") if self.fill == "NaN" else self.fill

    def metadata(self, attributes: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the array's `zarr.json` (Zarr v3 core specification) as a JSON-ready dict."""
        codecs: list[dict[str, Any]] = [dict(codec) for codec in self.codecs]
        if self.shards is not None:
            codecs = [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": list(self.chunks),
                        "codecs": codecs,
                        "index_codecs": [BYTES_CODEC, CRC_CODEC],
                        "index_location": "end",
                    },
                }
            ]
        units = {"units": self.units} if self.units else {}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": list(self.shards or self.chunks)},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": self.fill,
            "codecs": codecs,
            "attributes": units | (attributes or {}),
            "dimension_names": list(self.dimension_names),
            "storage_transformers": [],
        }

    def chunk_key(self, tar: int) -> str:
        """Return the key, relative to the array, of the one file that belongs to `tar`."""
        return "/".join(["c", str(tar), *["0"] * (len(self.shape) - 1)])


@dataclass(frozen=True)
class ShardShape:
    """`tars` shards of up to `lines` lines [*row_shape] of the type `stored`.

    An inner chunk has `chunk_rows` lines, a divisor of `lines`, and is compressed by `codec`.
    `fill` stands in lines that were not written, as JSON says it.
    """

    tars: int
    lines: int
    chunk_rows: int
    row_shape: tuple[int, ...]
    stored: str
    codec: str
    fill: int | str

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The little-endian type of the numbers as they are stored."""
        return np.dtype(self.stored).newbyteorder("<")

    @property
    def missing(self) -> float:
        """The value of lines that were not written."""
        return float("nan") if self.fill == "NaN" else float(self.fill)

    @cached_property
    def row_bytes(self) -> int:
        """The size in bytes of a line as stored, before compression."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """The size in bytes of an inner chunk as stored, before compression."""
        return self.chunk_rows * self.row_bytes

    @property
    def chunks_per_shard(self) -> int:
        """The number of inner chunks that a shard has room for."""
        return self.lines // self.chunk_rows

    @property
    def index_bytes(self) -> int:
        """The size of a shard's index: offset and length (u8) per inner chunk, then its crc32c."""
        return 16 * self.chunks_per_shard + CRC_BYTES

    def chunks(self, lines: int) -> int:
        """Return how many inner chunks hold the first `lines` lines of a shard."""
        return -(-lines // self.chunk_rows)

    def shard_bytes(self, lines: int) -> int:
        """Return the size in bytes of a shard of `lines` lines; with a codec, the largest one.

        Inner chunks that hold no line are absent from the shard.
        """
        header = 0 if self.codec == "none" else BLOSC_HEADER_BYTES
        chunk = self.chunk_bytes + header + CRC_BYTES
        return self.chunks(lines) * chunk + self.index_bytes

    def shard_can_have(self, size: int, lines: int) -> bool:
        """Return whether the file of a shard of `lines` lines can have this size in bytes."""
        most = self.shard_bytes(lines)
        exact = self.codec == "none" or not lines
        return size == most if exact else self.index_bytes < size <= most
