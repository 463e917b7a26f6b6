"""Compute the crc32c of bytes, and of joined pieces from the checksums of the pieces.

Every row of features has a checksum, and the rows of a chunk lie one after another. So the checksum
of a whole chunk follows from the checksums of its rows, and one fast pass over a megabyte proves
that every row in it is the committed one. The checksum that is stored after the chunk cannot prove
this, because it would also agree in a shard of another partition.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np
import numpy.typing as npt

from featstore.files.bounded import read_bounded
from featstore.format.array_spec import CRC_BYTES

Checksums = npt.NDArray[np.uint32]


# If data is checked piece by piece while it is read, it is still in the core's own cache: twice as
# fast as from memory. In pieces of some megabytes, data that is not in the page cache is read half
# as fast and is cached in smaller parts, which slows later reads by a third (Linux 6.18, ext4).
PIECE_BYTES: Final = 512 * 2**10


def crc32c(data: bytes | npt.NDArray[Any], before: int = 0) -> int:
    """Return the crc32c of bytes or a C-contiguous array; `before` is the crc of earlier bytes."""
    return int(google_crc32c.extend(before, data))


class MissingFile(ValueError):
    """There is no file of this name."""


def read_checked(path: Path, limit: int) -> tuple[bytes, int]:
    """Return the content of a chunk file and the checksum at its end.

    Raises ValueError if it cannot be read, has more than `limit` bytes or fails its checksum.
    """
    try:
        raw = read_bounded(path, limit)
    except FileNotFoundError as error:
        raise MissingFile("is missing") from error
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    if len(raw) <= CRC_BYTES:
        raise ValueError(f"has {len(raw)} bytes")
    body, crc = raw[:-CRC_BYTES], int.from_bytes(raw[-CRC_BYTES:], "little")
    if crc32c(body) != crc:
        raise ValueError("fails its checksum")
    return body, crc


def chunk_checksums(checksums: Checksums, chunk_rows: int, row_bytes: int) -> Checksums:
    """Compute the checksum of each chunk from those of its listed rows: uint32 [n] -> [chunks].

    Chunks hold `chunk_rows` rows of `row_bytes` bytes; the last chunk may hold fewer.
    """
    whole, rest = divmod(len(checksums), chunk_rows)
    pieces = np.zeros((whole + (rest > 0), chunk_rows), np.uint32)
    pieces[:whole] = checksums[: whole * chunk_rows].reshape(whole, chunk_rows)
    if rest:
        pieces[whole, -rest:] = checksums[-rest:]
    return joined(pieces, row_bytes)


def joined(checksums: Checksums, piece_bytes: int) -> Checksums:
    """Compute the checksum of joined pieces from the checksum of each: uint32 [..., n] -> [...].

    All pieces have `piece_bytes` bytes; leading zeros mean "no piece".
    """
    count = checksums.shape[-1]
    padding = (1 << (count - 1).bit_length()) - count if count else 1
    widths = [(0, 0)] * (checksums.ndim - 1) + [(padding, 0)]
    # The checksum of no bytes is 0, so leading zeros change nothing.
    sums = np.pad(checksums.astype(np.uint32), widths)
    doublings = 0
    while sums.shape[-1] > 1:
        tables = _tables(piece_bytes, doublings)
        left, right = sums[..., 0::2], sums[..., 1::2]
        sums = right.copy()
        for byte, table in enumerate(tables):
            sums ^= table[left >> np.uint32(8 * byte) & np.uint32(0xFF)]
        doublings += 1
    return sums[..., 0]


@lru_cache(maxsize=64)
def _tables(length: int, doublings: int) -> Checksums:
    """Return how length * 2**doublings more bytes change a checksum, by byte, uint32 [4, 256]."""
    columns = _columns(length, doublings)
    values = np.arange(256, dtype=np.uint32)
    return np.stack([_apply(columns, values << np.uint32(8 * byte)) for byte in range(4)])


@lru_cache(maxsize=64)
def _columns(length: int, doublings: int) -> Checksums:
    """Return how length * 2**doublings more bytes change a checksum, by bit, uint32 [32].

    A checksum is linear over GF(2): crc(A + B) = M crc(A) ^ crc(B), where M depends only on the
    length of B. The library itself computes the columns of M, with zeros for B.
    """
    if doublings:
        half = _columns(length, doublings - 1)
        return _apply(half, half)
    zeros = bytes(length)
    nothing = google_crc32c.extend(0, zeros)
    columns = [google_crc32c.extend(1 << bit, zeros) ^ nothing for bit in range(32)]
    return np.array(columns, np.uint32)


def _apply(columns: Checksums, values: Checksums) -> Checksums:
    """Multiply the matrix that has these columns by each value, over GF(2)."""
    bits = values[..., None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)
    result: Checksums = np.bitwise_xor.reduce(bits * columns, axis=-1)
    return result
