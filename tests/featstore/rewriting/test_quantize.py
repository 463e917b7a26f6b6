"""Stores with compressed or int8 features: the same numbers, or a measured difference."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore import StoreSchema, StoreWriter, UserError, WorkError, open_store, verify
from featstore.batches.loader import resident
from featstore.format.checksums import crc32c
from featstore.format.int8 import dequantise, quantise, scale_of
from featstore.format.metadata import attributes_checksum
from featstore.format.schema import CODECS
from featstore.rewriting.convert import convert
from featstore.rewriting.quantize import QUANTISED, quantize
from featstore.rewriting.source import SourceStore
from tests.support.stores.action_store import action_store
from tests.support.stores.growing_stores import all_features, make_small_store, same_partitions
from tests.support.stores.sample_stores import init_store, make_partition, make_store

CODED = CODECS[1:]  # "none" comes first


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two partitions of 8 and 3 rows, inner chunks of 4 rows, one failed row in each."""
    path = tmp_path / "s.zarr"
    make_store(path, rows=(8, 3))
    return path


# convert


@pytest.mark.parametrize("codec", CODED)
def test_a_compressed_store_holds_the_same(store: Path, tmp_path: Path, codec: str) -> None:
    made = tmp_path / "c.zarr"
    converted = convert(store, made, codec)
    sizes = [
        sum(file.stat().st_size for file in (path / "features" / "c").rglob("0") if file.is_file())
        for path in (store, made)
    ]
    assert [converted.bytes_before, converted.bytes_after] == sizes
    same_partitions(store, made, {0: 0, 1: 1})
    report = verify(made, deep=True)
    assert (report.ok, report.rows_ok, report.rows_failed) == (True, 9, 2)
    opened = open_store(made)
    for reader in (opened, open_store(made, mapped=False), pickle.loads(pickle.dumps(opened))):
        assert reader.features(reader.rows).tobytes() == all_features(store)
    rows, frames = opened.rows[[9, 2, 2]], [3, 0]
    expected = open_store(store).features(rows, frames)
    assert opened.features(rows, frames).tobytes() == expected.tobytes()
    assert resident(opened, opened.rows).numpy().tobytes() == all_features(store)
    back = tmp_path / "back.zarr"
    convert(made, back, "none")
    for tar in (0, 1):
        plain = SourceStore(store).shard(tar).read_bytes()
        assert SourceStore(back).shard(tar).read_bytes() == plain


@pytest.mark.parametrize("codec", CODED)
def test_plain_zarr_reads_a_compressed_store(store: Path, tmp_path: Path, codec: str) -> None:
    convert(store, tmp_path / "c.zarr", codec)
    group = zarr.open_group(tmp_path / "c.zarr", mode="r")
    opened = open_store(store)
    assert group["features"][:][opened.rows].tobytes() == all_features(store)


def test_features_that_compress_take_less(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    action_store(store, samples=64, dim=64, noise=0.0)
    for codec in CODED:
        converted = convert(store, tmp_path / f"{codec}.zarr", codec)
        assert converted.bytes_after < converted.bytes_before / 4


def test_opening_says_that_nothing_is_mapped(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(store, tmp_path / "c.zarr", "zstd")
    with caplog.at_level("INFO", "featstore"):
        open_store(tmp_path / "c.zarr")
    assert "features are float16, zstd and decoded on reading" in caplog.text


def test_a_compressed_store_can_be_continued(store: Path, tmp_path: Path) -> None:
    made = tmp_path / "c.zarr"
    (store / "commit" / "c" / "1" / "0").unlink()
    convert(store, made, "zstd")
    writer = StoreWriter.open(made)
    assert writer.pending() == [1]
    with writer.claim([1]):
        writer.write_partition(1, make_partition(writer.schema, 1, 3, failed=[1]))
    assert verify(made, deep=True).ok


@pytest.mark.parametrize("at", [20, 200, -30])
def test_a_flipped_bit_is_found(store: Path, tmp_path: Path, at: int) -> None:
    made = tmp_path / "c.zarr"
    convert(store, made, "zstd")
    shard = SourceStore(made).shard(0)
    raw = bytearray(shard.read_bytes())
    raw[at] ^= 4
    shard.write_bytes(raw)
    report = verify(made, deep=True)
    assert [d.partition for d in report.damaged] == [0]
    with pytest.raises(WorkError, match="partition 0"):
        open_store(made).features(np.arange(8))
    assert np.isfinite(open_store(made).features([8])).all()


def test_a_chunk_that_announces_a_gigabyte_is_refused(store: Path, tmp_path: Path) -> None:
    made = tmp_path / "c.zarr"
    convert(store, made, "zstd")
    source = SourceStore(made)
    shard, schema = source.shard(0), source.metadata.schema
    raw = bytearray(shard.read_bytes())
    at = len(raw) - schema.sharded["features"].index_bytes
    offset, length = struct.unpack_from("<QQ", raw, at)
    raw[offset + 4 : offset + 8] = (2**30).to_bytes(4, "little")
    body = bytes(raw[offset : offset + length - 4])
    raw[offset + length - 4 : offset + length] = crc32c(body).to_bytes(4, "little")
    shard.write_bytes(raw)
    with pytest.raises(WorkError, match="announces an impossible length"):
        open_store(made).features([0])


def test_what_convert_refuses(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="codec 'gzip' is unknown: choose one of none, zstd, lz4"):
        convert(store, tmp_path / "c.zarr", "gzip")
    with pytest.raises(UserError, match="exists already"):
        convert(store, store, "zstd")
    with (
        StoreWriter.open(store).claim([0]),
        pytest.raises(WorkError, match="is writing partition 0"),
    ):
        convert(store, tmp_path / "c.zarr", "zstd")
    shard = SourceStore(store).shard(1)
    raw = bytearray(shard.read_bytes())
    raw[0] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(WorkError, match="partition 1"):
        convert(store, tmp_path / "c.zarr", "zstd")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.zarr", "s.zarr.lock"]


# quantize


def test_int8_features_and_what_they_cost(tmp_path: Path) -> None:
    store, made = tmp_path / "s.zarr", tmp_path / "q.zarr"
    original = action_store(store, samples=40, dim=32)
    quantised = quantize(store, made)
    assert 0.45 < quantised.bytes_after / quantised.bytes_before < 0.55
    report = verify(made, deep=True)
    assert (report.ok, report.rows_ok, report.rows_failed) == (True, 39, 1)
    opened = open_store(made)
    assert opened.provenance.quantised == QUANTISED
    assert opened.schema.storage == "int8 per dimension"
    before, after = (s.features(s.rows) for s in (original, opened))
    assert after.dtype == np.float16
    np.testing.assert_array_equal(np.isnan(after), np.isnan(before))
    ok = opened.status == 1
    one, two = before[ok].astype(np.float64), after[ok].astype(np.float64)
    largest = np.abs(one).max((0, 1, 2))
    assert np.all(np.abs(one - two) <= largest / 127 / 2 + np.abs(one) / 1000)
    cosine = (one * two).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(two, axis=-1)
    assert quantised.cosine_error_mean == pytest.approx((1 - cosine).mean(), rel=1e-6)
    assert quantised.cosine_error_max == pytest.approx((1 - cosine).max(), rel=1e-6)
    text = opened.class_text("mote28").embeddings
    answers = []
    for features in (one, two):
        unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
        answers.append((unit.mean((1, 2)) @ text.T).argmax(-1))
    (agreement,) = quantised.agreement
    assert agreement.agreement == pytest.approx(100 * (answers[0] == answers[1]).mean())
    assert agreement.top1_float16 == pytest.approx(100 * (answers[0] == opened.labels[ok]).mean())
    assert agreement.top1_int8 == pytest.approx(100 * (answers[1] == opened.labels[ok]).mean())
    assert agreement.agreement > 95


def test_plain_zarr_reads_int8_with_its_scale(store: Path, tmp_path: Path) -> None:
    quantize(store, tmp_path / "q.zarr")
    group = zarr.open_group(tmp_path / "q.zarr", mode="r")
    stored, scale = group["features"][:], group["feature_scale"][:]
    features = (stored * scale).astype(np.float16)
    opened = open_store(tmp_path / "q.zarr")
    ok = opened.rows[opened.status == 1]
    np.testing.assert_array_equal(features[ok], opened.features(ok))
    assert np.all(stored[opened.rows[opened.status == 2]] == -128)


def test_heads_get_batches_of_an_int8_store(store: Path, tmp_path: Path) -> None:
    quantize(store, tmp_path / "q.zarr")
    opened = open_store(tmp_path / "q.zarr")
    ok = opened.rows[opened.status == 1]
    features = resident(opened, ok)
    assert features.numpy().tobytes() == opened.features(ok).tobytes()
    views, frames = np.ones(len(ok), np.int64), np.tile([3, 1], (len(ok), 1))
    assert (opened.clips(ok, views, frames) == opened.features(ok)[:, 1, [3, 1]]).all()


def test_int8_and_a_codec_together(store: Path, tmp_path: Path) -> None:
    quantize(store, tmp_path / "q.zarr")
    convert(tmp_path / "q.zarr", tmp_path / "qz.zarr", "zstd")
    assert all_features(tmp_path / "qz.zarr") == all_features(tmp_path / "q.zarr")
    assert open_store(tmp_path / "qz.zarr").schema.storage == "int8 per dimension, zstd"
    assert verify(tmp_path / "qz.zarr", deep=True).ok


def test_a_damaged_scale_is_found(store: Path, tmp_path: Path) -> None:
    made = tmp_path / "q.zarr"
    quantize(store, made)
    scale = made / "feature_scale" / "c" / "0"
    raw = bytearray(scale.read_bytes())
    raw[3] ^= 1
    scale.write_bytes(raw)
    assert not verify(made, deep=True).ok
    with pytest.raises(WorkError, match="scale of the int8 features"):
        open_store(made).features([0])


def test_what_quantize_refuses(store: Path, tmp_path: Path) -> None:
    quantize(store, tmp_path / "q.zarr")
    with pytest.raises(UserError, match="quantised already"):
        quantize(tmp_path / "q.zarr", tmp_path / "qq.zarr")
    (store / "commit" / "c" / "1" / "0").unlink()
    with pytest.raises(WorkError, match="lacks 1 of 2 partitions"):
        quantize(store, tmp_path / "qq.zarr")
    nothing = tmp_path / "n.zarr"
    make_store(nothing, rows=(2,), failed=(0, 1))
    with pytest.raises(UserError, match="no row that is ok"):
        quantize(nothing, tmp_path / "qq.zarr")
    assert not (tmp_path / "qq.zarr").exists()


def test_features_of_one_kind_are_not_added_to_the_other(store: Path, tmp_path: Path) -> None:
    quantize(store, tmp_path / "q.zarr")
    one, two = (SourceStore(p).store.provenance for p in (store, tmp_path / "q.zarr"))
    assert two.differences(one) == ["quantised: store has int8 per dimension, asked for none"]


@settings(max_examples=6, deadline=None)
@given(
    capacity=st.integers(1, 9),
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 5, 16])),
    failed=st.sets(st.integers(0, 8)),
    codec=st.sampled_from(CODED),
)
def test_any_sizes(
    tmp_path_factory: pytest.TempPathFactory,
    capacity: int,
    rows: list[int],
    shape: tuple[int, int, int],
    failed: set[int],
    codec: str,
) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    listed = [min(n, capacity) for n in rows]
    bad = sorted(i for i in failed if 0 < i < min(listed))
    make_store(folder / "s.zarr", listed, capacity=capacity, row_shape=shape, failed=bad)
    convert(folder / "s.zarr", folder / "c.zarr", codec)
    assert all_features(folder / "c.zarr") == all_features(folder / "s.zarr")
    quantize(folder / "s.zarr", folder / "q.zarr")
    for name in ("c.zarr", "q.zarr"):
        assert verify(folder / name, deep=True).ok


@given(st.lists(st.floats(-60000, 60000, width=16), min_size=1, max_size=40))
def test_rounding_is_within_half_a_step_and_stable(values: list[float]) -> None:
    features = np.array(values, np.float16)[:, None]
    scale = scale_of(np.abs(features).max(0).astype(np.float64))
    stored = quantise(features, scale)
    read = dequantise(stored, scale)
    assert np.isfinite(read).all()
    error = np.abs(read.astype(np.float64) - features.astype(np.float64))
    half = float(np.float16(1)) * float(scale[0]) / 2
    assert np.all(error <= half * 1.01 + np.abs(features.astype(np.float64)) / 1024 + 1e-7)
    np.testing.assert_array_equal(quantise(read, scale), stored)


def test_a_dimension_of_zeros_and_missing_rows() -> None:
    features = np.array([[0.0, 2.0], [np.nan, np.nan]], np.float16)
    scale = scale_of(np.nanmax(np.abs(features), 0))
    assert scale.tolist()[0] == 1
    read = dequantise(quantise(features, scale), scale)
    np.testing.assert_array_equal(read, features)


def test_an_unknown_codec_in_a_store_is_refused(tmp_path: Path) -> None:
    make_small_store(tmp_path / "s.zarr")
    path = tmp_path / "s.zarr" / "zarr.json"
    node = json.loads(path.read_text())
    node["attributes"]["schema"]["codec"] = "pickle"
    node["attributes"]["checksum"] = attributes_checksum(node["attributes"])
    path.write_text(json.dumps(node))
    with pytest.raises(UserError, match="codec 'pickle': this version knows"):
        open_store(tmp_path / "s.zarr")


def test_an_embedding_of_zeros_turns_by_nothing(tmp_path: Path) -> None:
    """And dimensions that are always zero, or always the same, cost nothing."""
    schema = StoreSchema.create(1, 4, 1, 2, 16)
    writer = init_store(tmp_path / "s.zarr", schema, (4,))
    partition = make_partition(schema, 0, 4, seed=3, failed=[1])
    assert isinstance(partition.features, np.ndarray)
    partition.features[0] = 0
    partition.features[2:, ..., 5] = 0
    partition.features[2:, ..., 6] = 3
    with writer.claim():
        writer.write_partition(0, partition)
    made = quantize(tmp_path / "s.zarr", tmp_path / "q.zarr")
    assert made.cosine_error_max < 1e-3
    assert made.agreement[0].agreement == 100
