"""Stores of frames and tokens: the same format and commits around rows of another shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featstore import (
    Partition,
    Provenance,
    StoreSchema,
    StoreWriter,
    UserError,
    WorkError,
    Workspace,
    open_store,
    verify,
)
from featstore.batches.loader import FeatureLoader, MappedFeatures, StreamedFeatures, resident
from featstore.format.metadata import attributes_checksum, read_metadata
from featstore.format.tiers import Tier
from featstore.reading.repair import repair_command
from featstore.rewriting.convert import convert
from featstore.rewriting.export import export
from featstore.rewriting.grow import add_class_text
from featstore.rewriting.merge import merge
from featstore.rewriting.quantize import quantize
from featstore.writing.shard_rows import FeatureRows
from tests.support.stores.sample_stores import (
    init_store,
    make_partition,
    make_provenance,
    make_store,
)
from tests.support.stores.store_files import store_files

FRAMES = StoreSchema.create(2, 6, 2, 4, 16, tier="frames", item=(8, 10, 3))
TOKENS = StoreSchema.create(2, 6, 1, 4, 16, tier="tokens:7", item=(5, 12))
BOTH = pytest.mark.parametrize("schema", [FRAMES, TOKENS], ids=["frames", "tokens"])


def filled(path: Path, schema: StoreSchema, rows: tuple[int, ...] = (6, 4)) -> list[Partition]:
    """A finished store whose rows were put one by one, in a shuffled order."""
    writer = init_store(path, schema, rows)
    partitions = [make_partition(schema, tar, n, failed=[1]) for tar, n in enumerate(rows)]
    with writer.claim():
        for tar, partition in enumerate(partitions):
            put(writer, tar, partition)
    return partitions


def put(writer: StoreWriter, tar: int, partition: Partition) -> None:
    with writer.feature_rows(tar) as features:
        for i in np.random.default_rng(tar).permutation(np.flatnonzero(partition.status == 1)):
            features.put(int(i), np.asarray(partition.features)[i])
        writer.write_partition(tar, replace(partition, features=features))


def features_of(partitions: list[Partition]) -> Any:
    return np.concatenate([np.asarray(partition.features) for partition in partitions])


def test_names_of_tiers() -> None:
    assert [Tier.parse(text).text for text in ("embeddings", "frames", "tokens:11")] == [
        *("embeddings", "frames", "tokens:11")
    ]
    for text in (
        "",
        "frame",
        "frames:1",
        "tokens",
        "tokens:",
        "tokens:-1",
        "tokens:01",
        "tokens:x",
    ):
        with pytest.raises(UserError, match="counted from 0"):
            Tier.parse(text)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tier": "frames", "item": (8, 8, 3)}, "frames are not stored as float16"),
        ({"tier": "frames", "item": (8, 8), "feature_type": "uint8"}, "height"),
        ({"tier": "frames", "item": (8, 8, 4), "feature_type": "uint8"}, "4 channels"),
        ({"tier": "tokens:1", "item": (8, 0)}, "must be"),
        ({"tier": "tokens:1", "item": (8, 2**21)}, "must be"),
        ({"tier": "tokens:1", "item": (8, 8), "feature_type": "int8"}, "not stored as int8"),
        ({"tier": "tokens"}, "not one this version knows"),
        ({"tier": 7}, "not one this version knows"),
        ({"item": (8,)}, "class texts 16 wide"),
        ({"feature_type": "uint8"}, "embeddings are not stored as uint8"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StoreSchema(1, 4, 1, 2, 16, 2, **changes)


def test_a_store_of_embeddings_says_nothing_of_tiers(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr")
    node = json.loads((tmp_path / "s.zarr/zarr.json").read_text())
    assert set(node["attributes"]["schema"]) == {
        *("tars", "capacity", "views", "frames", "dim", "chunk_rows")
    }
    assert "tier" not in node["attributes"]["provenance"]
    assert open_store(tmp_path / "s.zarr").tier == "embeddings"
    made = make_provenance()
    assert Provenance.from_json(made.to_json()) == made
    other = make_provenance(tier="frames")
    assert Provenance.from_json(other.to_json()) == other
    assert made.differences(other) == ["tier: store has embeddings, asked for frames"]
    assert other.differences(made) == ["tier: store has frames, asked for embeddings"]


@BOTH
@pytest.mark.parametrize("mapped", [True, False])
def test_rows_come_back_as_they_were_put(tmp_path: Path, schema: StoreSchema, mapped: bool) -> None:
    expected = features_of(filled(tmp_path / "s.zarr", schema))
    store = open_store(tmp_path / "s.zarr", mapped=mapped)
    assert (store.tier, store.schema) == (schema.tier, schema)
    found = store.features(store.rows)
    assert found.dtype == schema.dtype
    np.testing.assert_array_equal(found, expected)
    assert (store.status == 2).tolist() == [i in (1, 7) for i in range(10)]
    failed = store.features([1])
    assert (failed == 0).all() if schema.tier == "frames" else np.isnan(failed).all()
    frames = [[2, 0], [3, 3], [1, 2]]
    np.testing.assert_array_equal(
        store.features(store.rows[[9, 0, 4]], frames),
        np.stack([expected[i][:, f] for i, f in zip((9, 0, 4), frames, strict=True)]),
    )
    np.testing.assert_array_equal(
        store.clips(store.rows[[9, 0, 4]], [schema.views - 1] * 3, frames),
        np.stack([expected[i][-1, f] for i, f in zip((9, 0, 4), frames, strict=True)]),
    )
    assert list(store.partitions()) == [0, 1]
    assert verify(store.path, deep=True).ok


@BOTH
def test_the_shard_is_the_one_that_zarr_writes(tmp_path: Path, schema: StoreSchema) -> None:
    partitions = filled(tmp_path / "put.zarr", schema)
    writer = init_store(tmp_path / "zarr.zarr", schema, (6, 4))
    with writer.claim():
        for tar, partition in enumerate(partitions):
            writer.write_partition(tar, partition)
    assert store_files(tmp_path / "put.zarr") == store_files(tmp_path / "zarr.zarr")
    group = zarr.open_group(tmp_path / "put.zarr", mode="r")
    rows = open_store(tmp_path / "put.zarr").rows
    np.testing.assert_array_equal(group["features"][:][rows], features_of(partitions))


sizes = st.integers(1, 4)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_item_shape_comes_back(tmp_path: Path, data: st.DataObject) -> None:
    tier = data.draw(st.sampled_from(["frames", "tokens:0", "embeddings"]))
    dim = data.draw(st.integers(3, 9))
    pair = (data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7)))
    item = {"frames": (*pair, 3), "tokens:0": pair, "embeddings": (dim,)}[tier]
    capacity = data.draw(st.integers(1, 6))
    divisors = [n for n in range(1, capacity + 1) if capacity % n == 0]
    schema = replace(
        StoreSchema.create(
            *(2, capacity, data.draw(sizes), data.draw(sizes), dim), tier=tier, item=item
        ),
        chunk_rows=data.draw(st.sampled_from(divisors)),
    )
    rows = tuple(data.draw(st.integers(1, capacity)) for _ in range(2))
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.zarr"
    writer = init_store(path, schema, rows)
    expected = []
    for tar, n in enumerate(rows):
        failed = data.draw(st.sets(st.integers(0, n - 1)))
        partition = make_partition(schema, tar, n, failed=sorted(failed))
        put(writer, tar, partition)
        expected.append(partition)
    assert read_metadata(path).schema == schema
    wanted = features_of(expected)
    for mapped in (True, False):
        store = open_store(path, mapped=mapped)
        np.testing.assert_array_equal(store.features(store.rows), wanted)
    assert verify(path, deep=True).ok


@BOTH
def test_a_flipped_bit_is_found(tmp_path: Path, schema: StoreSchema) -> None:
    filled(tmp_path / "s.zarr", schema)
    shard = StoreWriter.open(tmp_path / "s.zarr").file("features", 1)
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 3] ^= 4
    shard.write_bytes(raw)
    report = verify(tmp_path / "s.zarr", deep=True)
    assert [finding.partition for finding in report.damaged] == [1]
    for mapped in (True, False):
        store = open_store(tmp_path / "s.zarr", mapped=mapped)
        with pytest.raises(WorkError, match="partition 1"):
            store.features(store.rows)
        store.features(store.rows[:6])


def test_what_is_not_placed_is_removed_and_what_was_killed_is_swept(tmp_path: Path) -> None:
    writer = init_store(tmp_path / "s.zarr", FRAMES, (6, 4))
    partition = make_partition(FRAMES, 0, 6, failed=[1])

    def partial() -> list[Path]:
        return list(tmp_path.rglob("*.partial"))

    with writer.claim(), writer.feature_rows(0) as features:
        features.put(0, np.asarray(partition.features)[0])
        assert len(partial()) == 1
        with pytest.raises(ValueError, match="for all ok samples"):
            replace(partition, features=features)
    assert partial() == []
    left = writer.feature_rows(0)  # by a process that is killed
    assert len(partial()) == 1
    with writer.claim([1]):
        assert len(partial()) == 1  # another's, perhaps at work
    with writer.claim([0]):
        assert partial() == []
    left.close()
    assert writer.pending() == [0, 1]


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    writer = init_store(tmp_path / "s.zarr", TOKENS, (6, 4))
    row = np.ones(TOKENS.row_shape, np.float16)
    with writer.feature_rows(0) as features:
        with pytest.raises(ValueError, match="not finite"):
            features.put(0, np.where(np.arange(12) == 3, np.float16(np.inf), row))
        with pytest.raises(ValueError, match="must be float16"):
            features.put(0, row.astype(np.float32))
        with pytest.raises(ValueError, match="must be float16"):
            features.put(0, row[:, :1])
        assert not features.written.any()
    uint8 = StoreSchema.create(2, 6, 1, 4, 16, tier="frames", item=(2, 2, 3))
    with pytest.raises(ValueError, match="has rows"):
        writer.write_partition(0, make_partition(uint8, 0, 6))
    tokens = make_partition(TOKENS, 0, 6)
    with pytest.raises(ValueError, match="has uint8, the store has float16"):
        writer.write_partition(
            0, replace(tokens, features=np.zeros((6, *TOKENS.row_shape), np.uint8))
        )
    with pytest.raises(ValueError, match="written as a whole"):
        FeatureRows(tmp_path / "x", replace(TOKENS, codec="zstd").sharded["features"], 6)


@BOTH
def test_batches_are_those_of_memory(tmp_path: Path, schema: StoreSchema) -> None:
    filled(tmp_path / "s.zarr", schema)
    store = open_store(tmp_path / "s.zarr")
    rows = store.rows[store.status == 1]
    labels = store.labels[store.status == 1]
    held = resident(store, rows)
    options: dict[str, Any] = {"batch_size": 3, "frames": 2, "seed": 5}
    batches = list(FeatureLoader(held, labels, **options).epoch(0))
    assert batches[0].features.shape == (3, 2, *schema.item)
    assert batches[0].features.numpy().dtype == schema.dtype
    mapped = FeatureLoader(MappedFeatures(store, rows), labels, **options).epoch(0)
    for batch, other in zip(batches, mapped, strict=True):
        assert torch.equal(batch.features, other.features)
    small = StreamedFeatures(store, rows, memory=4 * schema.row_bytes)
    assert small.pool_rows == 2
    stored = {row: held[i] for i, row in enumerate(rows.tolist())}
    seen = []
    for batch in FeatureLoader(small, labels, **options).epoch(0):
        for clip, row in zip(batch.features, batch.rows.tolist(), strict=True):
            seen.append(row)
            views = stored[row].flatten(0, 1)
            assert all((frame == views).flatten(1).all(1).any() for frame in clip)
    assert sorted(seen) == rows.tolist()


@BOTH
def test_what_the_store_commands_do_with_tiers(tmp_path: Path, schema: StoreSchema) -> None:
    path = tmp_path / "s.zarr"
    expected = features_of(filled(path, schema))
    with pytest.raises(UserError, match="only embeddings can be quantised"):
        quantize(path, tmp_path / "q.zarr")
    convert(path, tmp_path / "z.zarr", "zstd")
    small = open_store(tmp_path / "z.zarr")
    np.testing.assert_array_equal(small.features(small.rows), expected)
    assert verify(small.path, deep=True).ok
    with pytest.raises(UserError, match="extracted uncompressed"):
        StoreWriter.open(small.path).feature_rows(0)
    export(path, tmp_path / "npy", "npy", rows_per_file=3)
    parts = [np.load(file) for file in sorted((tmp_path / "npy").glob("features-*.npy"))]
    np.testing.assert_array_equal(np.concatenate(parts), expected[[0, *range(2, 7), 8, 9]])
    export(path, tmp_path / "safe", "safetensors")
    store = open_store(path)
    text = replace(store.class_text("mote28"), sentences_hash="other")
    assert add_class_text(path, "video", text)
    unfinished = init_store(tmp_path / "u.zarr", schema, (6, 4))
    put(unfinished, 0, make_partition(schema, 0, 6))
    with pytest.raises(WorkError, match="before you compress it"):
        convert(unfinished.path, tmp_path / "c.zarr", "zstd")
    make_store(tmp_path / "e.zarr", row_shape=(schema.views, 4, 16))
    with pytest.raises(UserError, match=f"has {schema.tier}"):
        merge([path, tmp_path / "e.zarr"], tmp_path / "m.zarr", prefix_keys=True)


def test_parquet_of_frames(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    expected = features_of(filled(tmp_path / "s.zarr", FRAMES))
    export(tmp_path / "s.zarr", tmp_path / "out", "parquet")
    (file,) = (tmp_path / "out").glob("*.parquet")
    table = parquet.read_table(file)
    shape = json.loads(table.schema.metadata[b"mote"])["shapes"]["features"]
    assert shape == list(FRAMES.row_shape)
    found = table["features"].combine_chunks().flatten().to_numpy().reshape(-1, *shape)
    np.testing.assert_array_equal(found, expected[[0, *range(2, 7), 8, 9]])


def test_the_workspace_gives_heads_embeddings_only(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    names = {"encoder": "vit", "sampling": "uniform:4"}
    paths = {
        tier: workspace.store_path("toy", **names, tier=tier)
        for tier in ("embeddings", "frames", "tokens:7")
    }
    assert [path.name for path in paths.values()] == [
        *("vit--uniform-4.zarr", "vit--uniform-4--frames.zarr", "vit--uniform-4--tokens-7.zarr")
    ]
    filled(paths["frames"], FRAMES)
    filled(paths["tokens:7"], TOKENS)
    with pytest.raises(UserError, match="holds frames, not the embeddings that heads work on"):
        workspace.opened("toy").choose()
    assert workspace.opened("toy").default_split(["val"]) is None
    make_store(paths["embeddings"])
    assert workspace.opened("toy").choose().path == paths["embeddings"]
    assert workspace.opened("toy").default_split(["val"]) == "val"
    with pytest.raises(UserError, match="holds tokens:7, not the embeddings that heads work on"):
        workspace.opened("toy").choose(name="vit--uniform-4--tokens-7")
    for path in (paths["frames"], paths["tokens:7"]):
        with pytest.raises(UserError, match="choose or extract a store without --tier"):
            open_store(path).require_embeddings()
    command = repair_command(paths["tokens:7"], read_metadata(paths["tokens:7"]))
    assert "--tier tokens:7" in command
    assert "--split" not in command


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("tier", "tokens:9", "the provenance has tier tokens:7"),
        ("tier", "depth", "not one this version knows"),
        ("item", [5, 13], "features of .*: chunk_grid is"),
        ("item", [5], "must be"),
        ("item", 5, "do not fit together"),
        ("item", ["5", 12], "must be"),
        ("feature_type", "uint8", "not stored as uint8"),
    ],
)
def test_a_changed_schema_is_refused(tmp_path: Path, entry: str, value: Any, words: str) -> None:
    filled(tmp_path / "s.zarr", TOKENS)
    node = json.loads((tmp_path / "s.zarr/zarr.json").read_text())
    node["attributes"]["schema"][entry] = value
    node["attributes"]["checksum"] = attributes_checksum(node["attributes"])
    (tmp_path / "s.zarr/zarr.json").write_text(json.dumps(node))
    with pytest.raises(UserError, match=words):
        open_store(tmp_path / "s.zarr")
