"""Checksums of joined pieces from those of the pieces, against the checksum of the bytes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from featstore.format.checksums import chunk_checksums, crc32c, joined


@given(data=st.binary(max_size=600), cut=st.integers(0, 600))
def test_a_checksum_can_be_continued(data: bytes, cut: int) -> None:
    assert crc32c(data[cut:], crc32c(data[:cut])) == crc32c(data)


def test_known_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C (RFC 3720, B.4)


@given(
    rows=st.integers(1, 40),
    chunk_rows=st.integers(1, 12),
    row_bytes=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
)
def test_chunks_from_rows(rows: int, chunk_rows: int, row_bytes: int, seed: int) -> None:
    data = np.random.default_rng(seed).integers(0, 256, (rows, row_bytes), np.uint8)
    of_rows = np.array([crc32c(row) for row in data], np.uint32)
    of_chunks = [crc32c(data[at : at + chunk_rows]) for at in range(0, rows, chunk_rows)]
    assert chunk_checksums(of_rows, chunk_rows, row_bytes).tolist() == of_chunks
    assert int(joined(of_rows, row_bytes)) == crc32c(data)
