"""Stores of sequences are merged, converted, quantised, grown, exported and kept at a URL."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet
import pytest
from safetensors.numpy import load_file

import featstore.rewriting.export
from featstore import UserError, open_store, verify
from featstore.batches.ragged import ragged_batches
from featstore.format.metadata import attributes_checksum
from featstore.reading.store import Store
from featstore.rewriting.convert import convert
from featstore.rewriting.export import export
from featstore.rewriting.grow import add_tars
from featstore.rewriting.merge import merge
from featstore.rewriting.quantize import quantize
from tests.support.stores.sample_stores import init_store_at, make_store
from tests.support.stores.sequence_stores import (
    make_rows,
    make_sequence_store,
    sequence_partition,
    sequence_schema,
)


def held(store: Store) -> list[tuple[bytes, bytes, bytes]]:
    return [
        (
            store.sequence(row).tobytes(),
            store.sequence_times(row).tobytes(),
            store.sequence_frames(row).tobytes(),
        )
        for row in store.rows.tolist()
    ]


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_another_codec_and_back_is_equal_to_the_bit(tmp_path: Path, codec: str) -> None:
    make_sequence_store(tmp_path / "s.zarr", crops=3)
    convert(tmp_path / "s.zarr", tmp_path / "z.zarr", codec)
    convert(tmp_path / "z.zarr", tmp_path / "b.zarr", "none")
    expected = held(open_store(tmp_path / "s.zarr"))
    for name in ("z", "b"):
        assert held(open_store(tmp_path / f"{name}.zarr")) == expected
        assert verify(tmp_path / f"{name}.zarr", deep=True).ok
    for array in ("features", "pts", "frame_index", "checksum"):
        one, two = (sorted((tmp_path / s / array).rglob("c/**/*")) for s in ("s.zarr", "b.zarr"))
        assert [p.read_bytes() for p in one if p.is_file()] == [
            p.read_bytes() for p in two if p.is_file()
        ]


def test_merged_rows_are_those_of_both(tmp_path: Path) -> None:
    make_sequence_store(tmp_path / "a.zarr", seed=1)
    make_sequence_store(tmp_path / "b.zarr", [[70, 2]], seed=9, room=12)
    paths = [tmp_path / "a.zarr", tmp_path / "b.zarr"]
    with pytest.raises(UserError, match="--prefix-keys"):  # the keys of both are alike
        merge(paths, tmp_path / "m.zarr")
    convert(paths[1], tmp_path / "c.zarr", "none")
    node = json.loads((tmp_path / "c.zarr/zarr.json").read_text())
    node["attributes"]["provenance"]["dataset"] = "other"
    node["attributes"]["checksum"] = attributes_checksum(node["attributes"])
    (tmp_path / "c.zarr/zarr.json").write_text(json.dumps(node))
    merge([paths[0], tmp_path / "c.zarr"], tmp_path / "m.zarr", prefix_keys=True)
    merged = open_store(tmp_path / "m.zarr")
    assert held(merged) == held(open_store(paths[0])) + held(open_store(paths[1]))
    assert merged.keys[0].startswith("toy/")
    assert verify(tmp_path / "m.zarr", deep=True).ok


def test_quantised_sequences_are_near_and_verified(tmp_path: Path) -> None:
    make_sequence_store(tmp_path / "s.zarr", crops=3)
    made = quantize(tmp_path / "s.zarr", tmp_path / "q.zarr")
    one, two = open_store(tmp_path / "s.zarr"), open_store(tmp_path / "q.zarr")
    assert 0 < made.cosine_error_max < 0.01
    assert made.rows == 4
    for row in one.rows.tolist():
        np.testing.assert_allclose(two.sequence(row), one.sequence(row), atol=0.05)
        assert two.sequence_times(row).tolist() == one.sequence_times(row).tolist()
    assert verify(tmp_path / "q.zarr", deep=True).ok


def test_sequences_grow_by_tars(tmp_path: Path) -> None:
    make_sequence_store(tmp_path / "s.zarr")
    before = held(open_store(tmp_path / "s.zarr"))
    store = open_store(tmp_path / "s.zarr")
    new = replace(store.tars[1], file="toy-000002.tar", sha256="f" * 64)
    grown = add_tars(
        tmp_path / "s.zarr",
        tars=[*store.tars, new],
        class_names=store.class_names,
        raw_class_names=store.raw_class_names,
        split_names=store.split_names,
        dataset_fingerprint="new",
    )
    assert grown.pending == 1
    assert held(open_store(tmp_path / "s.zarr")) == before
    assert verify(tmp_path / "s.zarr", deep=True).ok


@pytest.mark.parametrize("format", ["safetensors", "npy", "parquet"])
def test_exported_pieces_give_every_frame_once(tmp_path: Path, format: str) -> None:
    make_sequence_store(tmp_path / "s.zarr", crops=3)
    store = open_store(tmp_path / "s.zarr")
    room = 10 * store.schema.row_bytes  # rows of 23 frames are cut
    with mock.patch.object(featstore.rewriting.export, "TARGET_FILE_BYTES", room):
        done = export(tmp_path / "s.zarr", tmp_path / "e", format)
    assert (done.rows, done.failed_left_out, done.files) == (3, 1, 4)
    found: dict[str, list[Any]] = {}
    for number in range(done.files):
        ending = f"{number:05d}-of-{done.files:05d}"
        if format == "parquet":
            table = pyarrow.parquet.read_table(tmp_path / f"e/features-{ending}.parquet")
            for piece in table.to_pylist():
                flat = np.array(piece["features"], np.float16).reshape(-1, 3, 16)
                assert len(flat) == piece["length"] == len(piece["pts"])
                found.setdefault(piece["key"], []).append(flat)
            continue
        if format == "safetensors":
            path = tmp_path / f"e/features-{ending}.safetensors"
            part: dict[str, Any] = load_file(path)
            header = path.read_bytes()
            size = int.from_bytes(header[:8], "little")
            texts = json.loads(header[8 : 8 + size])["__metadata__"]
            keys = json.loads(texts["key"])
        else:
            names = ("features", "pts", "frame_index")
            part = {name: np.load(tmp_path / f"e/{name}-{ending}.npy") for name in names}
            with open(tmp_path / f"e/rows-{ending}.csv", newline="") as file:
                rows = list(csv.DictReader(file))
            keys = [row["key"] for row in rows]
            part["length"] = np.array([int(row["length"]) for row in rows])
        assert len(part["features"]) == len(part["pts"]) == part["length"].sum() <= 10
        ends = np.cumsum(part["length"])
        for key, end, length in zip(keys, ends, part["length"], strict=True):
            found.setdefault(key, []).append(part["features"][end - length : end])
    for key, row in zip(store.keys, store.rows.tolist(), strict=True):
        expected = store.sequence(row)
        got = np.concatenate([np.zeros((0, 3, 16), np.float16), *found.get(key, [])])
        assert got.tobytes() == expected.tobytes()


def test_batches_of_rows_and_windows_have_their_lengths(tmp_path: Path) -> None:
    make_sequence_store(tmp_path / "s.zarr")
    store = open_store(tmp_path / "s.zarr")
    found = list(ragged_batches(store, 2))
    assert [batch.lengths.tolist() for batch in found] == [[9, 23], [4]]
    assert [batch.rows.tolist() for batch in found] == [[0, 2], [3]]
    padded, held_frames = found[0].padded()
    assert padded.shape == (2, 23, 16)
    assert padded[0][held_frames[0]].numpy().tobytes() == store.sequence(0).tobytes()
    assert not padded[0][9:].any()
    windows = list(store.windows(5, 2.5))
    for batch, window in zip(ragged_batches(store, 1, windows), windows, strict=True):
        expected = store.sequence(window.row, window.start_s, window.end_s)
        assert batch.features.numpy().tobytes() == expected.tobytes()
    with pytest.raises(ValueError, match="at least one"):
        next(ragged_batches(store, 0))


def test_a_store_at_a_url_is_that_of_a_folder(bucket: str, tmp_path: Path) -> None:
    url, schema = f"{bucket}/x.zarr", sequence_schema(2, 3)
    rows = [make_rows(schema, lengths) for lengths in ((9, 0, 23), (4,))]
    remote = init_store_at(url, schema, (3, 1), sampling="fps:4")
    for tar, of_tar in enumerate(rows):
        remote.write_partition(tar, sequence_partition(tar, of_tar))
    assert remote.pending() == []
    make_sequence_store(tmp_path / "s.zarr")
    with mock.patch.dict("os.environ", MOTE_CACHE=str(tmp_path / "cache")):
        store = open_store(url)
        assert store.lengths.tolist() == [9, 0, 23, 4]
        assert store.sequence(2).tobytes() == rows[0][2][0].tobytes()
        assert verify(store.path, deep=True).ok


def test_fixed_rows_and_sequences_are_not_merged(tmp_path: Path) -> None:
    make_sequence_store(tmp_path / "s.zarr")
    make_store(tmp_path / "f.zarr", row_shape=(1, 1, 16), sampling="fps:4")
    with pytest.raises(UserError, match=r"sequences: the first has True, the second has False"):
        merge([tmp_path / "s.zarr", tmp_path / "f.zarr"], tmp_path / "m.zarr")
