from __future__ import annotations

import pytest

from featstore.format.schema import TARGET_CHUNK_BYTES, StoreSchema


def test_chunk_is_the_largest_divisor_within_the_target() -> None:
    schema = StoreSchema.create(tars=3, capacity=256, views=1, frames=32, dim=512)
    assert schema.chunk_rows == 32  # 32 KiB a row: 45 rows fit, 32 is the divisor below
    assert schema.chunk_rows * schema.row_bytes <= TARGET_CHUNK_BYTES


def test_a_row_larger_than_the_target_gets_its_own_chunk() -> None:
    assert StoreSchema.create(1, 7, 12, 64, 1024).chunk_rows == 1


def test_a_small_prime_capacity_is_one_chunk() -> None:
    assert StoreSchema.create(1, 13, 1, 4, 8).chunk_rows == 13


@pytest.mark.parametrize("name", ["tars", "capacity", "views", "frames", "dim"])
def test_sizes_must_be_positive(name: str) -> None:
    sizes = {"tars": 1, "capacity": 4, "views": 1, "frames": 2, "dim": 3} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        StoreSchema.create(**sizes)


def test_chunk_rows_must_divide_the_capacity() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        StoreSchema(1, 10, 1, 1, 1, chunk_rows=4)


def test_arrays_are_those_of_the_format() -> None:
    schema = StoreSchema(tars=5, capacity=8, views=2, frames=3, dim=7, chunk_rows=4)
    arrays = schema.arrays()
    facts = {n: (a.shape, a.dtype, a.chunks, a.shards) for n, a in arrays.items()}
    assert facts == {
        "features": ((40, 2, 3, 7), "float16", (4, 2, 3, 7), (8, 2, 3, 7)),
        "key": ((40,), "string", (8,), None),
        "reason": ((40,), "string", (8,), None),
        "label": ((40,), "int32", (8,), None),
        "num_frames": ((40,), "int32", (8,), None),
        "fps": ((40,), "float32", (8,), None),
        "status": ((40,), "uint8", (8,), None),
        "splits": ((40,), "uint32", (8,), None),
        "container_frames": ((40,), "int32", (8,), None),
        "damaged_packets": ((40,), "int32", (8,), None),
        "frame_index": ((40, 2, 3), "int32", (8, 2, 3), None),
        "pts": ((40, 2, 3), "float64", (8, 2, 3), None),
        "checksum": ((40,), "uint32", (8,), None),
        "chunk_checksum": ((5, 12), "uint32", (1, 12), None),
        "commit": ((5, 4), "uint64", (1, 4), None),
    }
    assert all(a.codecs[-1] == {"name": "crc32c"} for a in arrays.values())
    assert all(len(a.dimension_names) == len(a.shape) for a in arrays.values())
    assert arrays["pts"].units == "seconds"
