"""Read the files of feature shards in large pieces, or map all of them into one range of memory.

An uncompressed shard is a dense array, followed by an index with a checksum of its own (Zarr v3
sharding, index at the end). Nothing here compares the features with the checksums of their rows;
`featstore.reading.features` does that.

Dimension letters: V views, F frames, D dim (in other tiers the item).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from featstore.format.array_spec import ABSENT, BLOSC_HEADER_BYTES, CRC_BYTES, ShardShape
from featstore.format.checksums import PIECE_BYTES, crc32c
from featstore.format.schema import FeatureArray

if TYPE_CHECKING:
    from torch import Tensor

Bytes = npt.NDArray[np.uint8]

_MAP_FIXED: Final = 0x10  # Linux and macOS; Python's mmap has no name for it


class ShardFile:
    """One shard, opened for reading; a context manager that closes it. A row may be a frame."""

    def __init__(self, path: Path, shape: ShardShape, rows: int) -> None:
        """Open the shard of a partition that lists `rows` samples and check its index.

        Raises ValueError if it cannot be read, has the wrong size or a wrong index.
        """
        self._chunk_rows = shape.chunk_rows
        self._row_bytes = shape.row_bytes
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"the features shard cannot be read ({error.strerror})") from error
        try:
            size = os.fstat(self.descriptor).st_size
            if not shape.shard_can_have(size, rows):
                raise ValueError(f"the features shard has {size} bytes: it was cut or replaced")
            self._read_index(shape, rows, size - shape.index_bytes)
        except BaseException:
            self.close()
            raise

    def read(self, first: int, out: FeatureArray, check: bool = False) -> list[int]:
        """Fill `out` [n, V, F, D] with rows first, first + 1, ...

        If `check`, returns a crc32c for each inner chunk that it read from, otherwise []. Raises
        ValueError if the file cannot be read.
        """
        target = out.reshape(-1).view(np.uint8)
        chunk, row = divmod(first, self._chunk_rows)
        begin = 0
        checksums: list[int] = []
        while begin < len(target):
            offset = self.offsets[chunk] + row * self._row_bytes
            end = min(len(target), begin + (self._chunk_rows - row) * self._row_bytes)
            checksum = 0
            for at in range(begin, end, PIECE_BYTES):
                piece = target[at : min(at + PIECE_BYTES, end)]
                self._fill(piece, offset + at - begin)
                if check:
                    checksum = crc32c(piece, checksum)
            if check:
                checksums.append(checksum)
            begin, chunk, row = end, chunk + 1, 0
        return checksums

    def chunk(self, number: int) -> Bytes:
        """Return an inner chunk as it is stored, uint8; errors as `read`, or a wrong checksum."""
        stored: Bytes = np.empty(self._lengths[number], np.uint8)
        self._fill(stored, self.offsets[number])
        body = stored[:-CRC_BYTES]
        if crc32c(body) != int(stored[-CRC_BYTES:].view("<u4")[0]):
            raise ValueError(f"features chunk {number} fails its checksum")
        return body

    def recorded_checksum(self, chunk: int) -> int:
        """Return the checksum that is stored after an inner chunk; errors as `read`."""
        stored: Bytes = np.empty(CRC_BYTES, np.uint8)
        self._fill(stored, self.offsets[chunk] + self._chunk_rows * self._row_bytes)
        return int(stored.view("<u4")[0])

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read_index(self, shape: ShardShape, rows: int, start: int) -> None:
        """Read offset and length of each inner chunk with listed rows from the index at `start`.

        Raises ValueError if the index fails its checksum, or a chunk has an impossible place or
        length.
        """
        index: Bytes = np.empty(shape.index_bytes, np.uint8)
        self._fill(index, start)
        if crc32c(index[:-CRC_BYTES]) != int(index[-CRC_BYTES:].view("<u4")[0]):
            raise ValueError("the index of the shard fails its checksum")
        entries = index[:-CRC_BYTES].view("<u8").reshape(-1, 2)[: -(-rows // shape.chunk_rows)]
        least = most = shape.chunk_bytes + CRC_BYTES
        if shape.codec != "none":
            least, most = BLOSC_HEADER_BYTES + CRC_BYTES, most + BLOSC_HEADER_BYTES
        self.offsets, self._lengths = entries.T.tolist()
        for number, (offset, length) in enumerate(entries.tolist()):
            if offset == ABSENT or not least <= length <= most or offset + length > start:
                raise ValueError(f"chunk {number} of the shard is absent or misplaced")

    def _fill(self, out: Bytes, offset: int) -> None:
        """Fill `out` with the bytes that begin at `offset`."""
        try:
            got = os.preadv(self.descriptor, [out], offset)  # type: ignore[list-item]
        except OSError as error:
            raise ValueError(f"the features shard cannot be read ({error.strerror})") from error
        if not got:
            raise ValueError("the features shard ends too early")
        if got < len(out):
            self._fill(out[got:], offset + got)


class ShardMap:
    """All features shards of a store in one range of addresses, each mapped when it is needed.

    With one range, a single `index_select` gathers any rows and frames of the whole store; a map
    per shard would cost a call per shard and batch. Addresses cost nothing, and the addresses of
    shards that are not mapped cannot be read. A map needs no open file; a large store may have
    more shards than a process may have open files.
    """

    def __init__(self, shape: ShardShape) -> None:
        """Reserve the addresses; OSError if the process may not have that many."""
        self._shape = shape
        page = mmap.ALLOCATIONGRANULARITY
        self._span = -(-shape.shard_bytes(shape.lines) // page) * page
        size = self._span * shape.tars
        # The range and the maps of all shards are freed with the last array that views it.
        self._range = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON, prot=0)
        self._address = np.frombuffer(self._range, np.uint8).ctypes.data
        # torch warns about read-only memory. This memory is read-only, and nobody writes to it; but
        # made from the address, it looks writeable. `owner` keeps the map alive.
        memory = (ctypes.c_uint8 * size).from_address(self._address)
        memory.owner = self._range  # type: ignore[attr-defined]
        self._width = shape.dtype.itemsize
        self._numbers: FeatureArray = np.ctypeslib.as_array(memory)[
            : size // self._width * self._width
        ].view(shape.dtype)
        self._windows: dict[int, Tensor] = {}
        # Where each inner chunk begins, counted in numbers from the range's start; -1: not mapped.
        self.starts = np.full(shape.tars * shape.chunks_per_shard, -1, np.int64)

    def add(self, tar: int, path: Path, rows: int) -> None:
        """Map the shard of a partition that lists `rows` samples; errors as `ShardFile`."""
        with ShardFile(path, self._shape, rows) as file:
            start = tar * self._span
            length = self._shape.shard_bytes(rows)
            _map_over(self._address + start, length, file.descriptor)
        first = tar * self._shape.chunks_per_shard
        offsets = np.array(file.offsets, np.int64)
        if np.any(offsets % self._width):
            raise ValueError("a chunk of the shard begins at an odd byte")
        self.starts[first : first + len(offsets)] = (start + offsets) // self._width

    def chunk(self, number: int, rows: int) -> FeatureArray:
        """Return a read-only view of the first rows of an inner chunk (counted over all shards)."""
        start = int(self.starts[number])
        size = rows * self._shape.row_bytes // self._width
        view: FeatureArray = self._numbers[start : start + size].reshape(
            rows, *self._shape.row_shape
        )
        view.flags.writeable = False
        return view

    def windows(self, width: int) -> Tensor:
        """Return [numbers - width + 1, width]: row i holds the `width` numbers from index i."""
        import torch

        found = self._windows.get(width)
        if found is None:
            numbers = torch.from_numpy(self._numbers)
            found = numbers.as_strided((len(numbers) - width + 1, width), (1, 1))
            self._windows[width] = found
        return found


def _map_over(address: int, length: int, descriptor: int) -> None:
    """Map a file read-only at an address inside a range that we reserved."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_long,
    )
    flags = mmap.MAP_SHARED | _MAP_FIXED
    if libc.mmap(address, length, mmap.PROT_READ, flags, descriptor, 0) != address:
        raise ValueError(f"the features shard cannot be mapped ({os.strerror(ctypes.get_errno())})")
