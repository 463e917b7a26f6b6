"""Feature shards that are compressed or int8: read chunk by chunk, decoded to float16.

A plain shard is mapped (`featstore.reading.chunk_files.MappedShard`). These answer to the same
calls; what they announce about their length is held against the schema before anything is decoded,
so that a small file cannot fill the memory.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Final, overload

import numpy as np
import numpy.typing as npt

from featstore.errors import WorkError
from featstore.format.finite import not_finite
from featstore.format.int8 import dequantise
from featstore.format.schema import (
    BLOSC_HEADER_BYTES,
    CRC_BYTES,
    FEATURE_SCALE,
    STATUS_OK,
    FeatureArray,
    FloatArray,
)
from featstore.reading.chunk_files import ChunkFiles, Commit, crc32c

_ABSENT: Final = 2**64 - 1
# Of decoded chunks that are kept, of all stores together (the last one whatever its size).
# Neighbouring rows are mostly asked for one after the other.
_KEPT_BYTES: Final = 50_000_000


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


class CodedShard(Sequence[FeatureArray]):
    """The features shard of a committed partition; a sequence of its inner chunks, float16.

    Safe to share between threads. WorkError, when opened or read, for what is damaged.
    """

    def __init__(self, files: ChunkFiles, tar: int, commit: Commit) -> None:
        self._files, self._tar = files, tar
        self._path: Path = files.check_shard(tar, commit)
        self._schema = files.schema
        self._scale = read_scale(files)
        self._entries = self._read_index(-(-commit.rows // files.schema.chunk_rows))
        self._serial = next(_serials)

    @property
    def chunks(self) -> Sequence[FeatureArray]:
        """The inner chunks, each float16 [chunk_rows, V, F, D], decoded when asked for."""
        return self

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, number: int) -> FeatureArray: ...
    @overload
    def __getitem__(self, number: slice) -> list[FeatureArray]: ...
    def __getitem__(self, number: int | slice) -> FeatureArray | list[FeatureArray]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        return _kept.get((self._serial, range(len(self))[number]), self._decode)

    def rows(self, start: int, stop: int) -> FeatureArray:
        """Rows start..stop (positions in the partition) of one inner chunk, read-only."""
        chunk, first = divmod(start, self._schema.chunk_rows)
        return self[chunk][first : first + stop - start]

    def chunk_is_intact(self, number: int) -> bool:
        """Whether an inner chunk agrees with the checksum stored behind it."""
        try:
            body = self._read(number)
        except ValueError:
            return False
        return crc32c(body[:-CRC_BYTES]) == int.from_bytes(body[-CRC_BYTES:], "little")

    def _read_index(self, chunks: int) -> list[tuple[int, int]]:
        try:
            with open(self._path, "rb") as file:
                start = os.fstat(file.fileno()).st_size - self._schema.index_bytes
                file.seek(max(start, 0))
                raw = file.read(self._schema.index_bytes)
        except OSError as error:
            raise self._files.damaged(
                self._tar, f"the features shard cannot be read ({error.strerror})"
            ) from error
        index, crc = raw[:-CRC_BYTES], int.from_bytes(raw[-CRC_BYTES:], "little")
        if start < 0 or crc32c(index) != crc:
            raise self._files.damaged(self._tar, "the index of the shard fails its checksum")
        entries = np.frombuffer(index, "<u8").reshape(-1, 2)[:chunks].tolist()
        most = self._schema.chunk_bytes + BLOSC_HEADER_BYTES + CRC_BYTES
        for number, (offset, length) in enumerate(entries):
            fits = CRC_BYTES < length <= most and offset + length <= start
            if offset == _ABSENT or not fits:
                raise self._files.damaged(
                    self._tar, f"chunk {number} of the shard is absent or misplaced"
                )
        return [(offset, length) for offset, length in entries]

    def _read(self, number: int) -> bytes:
        """Bytes of an inner chunk with its checksum; ValueError when the file is shorter now."""
        offset, length = self._entries[number]
        try:
            with open(self._path, "rb") as file:
                file.seek(offset)
                body = file.read(length)
        except OSError as error:
            raise ValueError(f"the features shard cannot be read ({error.strerror})") from error
        if len(body) != length:
            raise ValueError(f"chunk {number} ends early")
        return body

    def _decode(self, number: int) -> FeatureArray:
        schema = self._schema
        try:
            body = self._read(number)
            data, crc = body[:-CRC_BYTES], int.from_bytes(body[-CRC_BYTES:], "little")
            if crc32c(data) != crc:
                raise ValueError(f"features chunk {number} fails its checksum")
            plain = data if schema.codec == "none" else _decompressed(data, schema.chunk_bytes)
            if len(plain) != schema.chunk_bytes:
                raise ValueError(f"features chunk {number} has {len(plain)} bytes")
        except (ValueError, RuntimeError, MemoryError) as error:
            raise self._files.damaged(self._tar, str(error)) from error
        shape = (schema.chunk_rows, *schema.row_shape)
        if self._scale is None:
            features: FeatureArray = np.frombuffer(plain, schema.dtype.newbyteorder("<"))
            features = features.reshape(shape)
        else:
            features = dequantise(np.frombuffer(plain, np.int8).reshape(shape), self._scale)
        features.flags.writeable = False
        return features


def wrong_coded_features(
    files: ChunkFiles,
    tar: int,
    commit: Commit,
    status: npt.NDArray[np.uint8],
    checksums: npt.NDArray[np.uint32],
) -> str:
    """What is wrong with the compressed or int8 features of a partition; "" when nothing is.

    `status` and `checksums` [rows] are those of the partition. WorkError for a damaged file.
    """
    shard = CodedShard(files, tar, commit)
    for number in range(len(shard)):
        if not shard.chunk_is_intact(number):
            return f"features chunk {number} fails its checksum"
    for position in range(commit.rows):
        row = shard.rows(position, position + 1)[0]
        if crc32c(row) != int(checksums[position]):
            return f"features of row {position} fail their checksum"
        if row.dtype.kind == "f" and not_finite(row[None])[0] == (status[position] == STATUS_OK):
            return f"features of row {position} contradict its status"
    return ""


def _decompressed(data: bytes, length: int) -> bytes:
    """Decode a Blosc chunk that announces exactly `length` bytes; ValueError otherwise.

    Its header (c-blosc, README_CHUNK_FORMAT): bytes 4-7 the decoded, 12-15 the encoded length.
    """
    # Imported here, as `featstore.reading.chunk_files` does: a store opens faster without it.
    from numcodecs.blosc import decompress

    announced = int.from_bytes(data[4:8], "little")
    encoded = int.from_bytes(data[12:16], "little")
    if len(data) < BLOSC_HEADER_BYTES or announced != length or encoded != len(data):
        raise ValueError("a features chunk announces an impossible length")
    plain: bytes = decompress(data)
    return plain


class _KeptChunks:
    """The chunks decoded last, by (shard, number)."""

    def __init__(self) -> None:
        self._chunks: OrderedDict[tuple[int, int], FeatureArray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int], decode: Callable[[int], FeatureArray]) -> FeatureArray:
        with self._lock:
            found = self._chunks.get(key)
            if found is not None:
                self._chunks.move_to_end(key)
                return found
        decoded = decode(key[1])  # outside the lock: threads decode side by side
        with self._lock:
            if key not in self._chunks:  # another thread may have decoded it too
                self._chunks[key] = decoded
                self._bytes += decoded.nbytes
            while self._bytes > _KEPT_BYTES and len(self._chunks) > 1:
                self._bytes -= self._chunks.popitem(last=False)[1].nbytes
        return decoded


_serials = count()
_kept = _KeptChunks()
