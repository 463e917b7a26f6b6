"""What is written is what is read, by every path, for any sizes."""

from __future__ import annotations

import json
import pickle
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore import Partition, StoreSchema, StoreWriter, UserError, WorkError, open_store, verify
from tests.support.stores.sample_stores import (
    CLASS_NAMES,
    init_store,
    make_class_text,
    make_partition,
    make_provenance,
    make_store,
)


def joined(partitions: list[Partition], name: str) -> Any:
    return np.concatenate([np.asarray(getattr(p, name)) for p in partitions])


def test_everything_comes_back(tmp_path: Path) -> None:
    partitions = make_store(tmp_path / "s.zarr")
    store = open_store(tmp_path / "s.zarr")
    assert len(store) == 11
    assert store.complete
    assert list(store.partitions()) == [0, 1]
    np.testing.assert_array_equal(store.rows, [*range(8), 8, 9, 10])
    assert store.keys == joined(partitions, "key").tolist()
    assert store.reasons == joined(partitions, "reason").tolist()
    for ours, theirs in [("labels", "label"), ("status", "status"), ("fps", "fps")]:
        np.testing.assert_array_equal(getattr(store, ours), joined(partitions, theirs))
    np.testing.assert_array_equal(store.num_frames, joined(partitions, "num_frames"))
    np.testing.assert_array_equal(store.features(store.rows), joined(partitions, "features"))
    np.testing.assert_array_equal(store.frame_index(store.rows), joined(partitions, "frame_index"))
    np.testing.assert_array_equal(store.pts(store.rows), joined(partitions, "pts"))
    assert store.class_names == list(CLASS_NAMES)
    assert store.raw_class_names == ["brush_hair", "climb_stairs", "throw"]
    assert store.provenance == make_provenance()
    assert store.schema == StoreSchema.create(2, 8, 2, 4, 16)
    assert store.tars[1].file == "toy-000001.tar"


def test_failed_samples_keep_their_place(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr", failed=(0, 2))
    store = open_store(tmp_path / "s.zarr")
    np.testing.assert_array_equal(np.flatnonzero(store.status == 2), [0, 2, 8, 10])
    assert [r for r in store.reasons if r] == ["no video stream"] * 4
    assert np.isnan(store.features([0, 10])).all()
    assert (store.frame_index([0]) == -1).all()


def test_partition_of_only_failed_samples(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr", rows=(8, 3), failed=range(3))
    schema = StoreSchema.create(1, 8, 2, 4, 16)
    writer = init_store(tmp_path / "f.zarr", schema, [5])
    writer.write_partition(0, make_partition(schema, 0, 5, failed=range(5)))
    store = open_store(tmp_path / "f.zarr")
    assert np.isnan(store.features(store.rows)).all()
    assert verify(tmp_path / "f.zarr", deep=True).rows_failed == 5


def test_splits_may_overlap(tmp_path: Path) -> None:
    partitions = make_store(tmp_path / "s.zarr")
    store = open_store(tmp_path / "s.zarr")
    masks = joined(partitions, "splits")
    assert np.any(masks == 3)
    np.testing.assert_array_equal(store.split("train"), store.rows[(masks & 1) != 0])
    np.testing.assert_array_equal(store.split("val"), store.rows[(masks & 2) != 0])
    with pytest.raises(UserError, match="no split 'test': choose one of train, val"):
        store.split("test")


def test_rows_by_key(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr")
    store = open_store(tmp_path / "s.zarr")
    assert store.row("tar1/clip 2 é") == 10
    with pytest.raises(UserError, match="no sample 'clip'"):
        store.row("clip")


@pytest.mark.parametrize("mapped", [True, False])
def test_rows_in_any_order_with_repeats_and_chosen_frames(tmp_path: Path, mapped: bool) -> None:
    partitions = make_store(tmp_path / "s.zarr")
    everything = joined(partitions, "features")
    store = open_store(tmp_path / "s.zarr", mapped=mapped)
    rows = np.array([10, 0, 0, 3, 4, 5, 9])
    np.testing.assert_array_equal(store.features(rows), everything[rows])
    np.testing.assert_array_equal(store.features(rows, [3, 0]), everything[rows][:, :, [3, 0]])
    frames = np.arange(14).reshape(7, 2) % 4
    expected = np.stack([everything[r][:, f] for r, f in zip(rows, frames, strict=True)])
    np.testing.assert_array_equal(store.features(rows, frames), expected)
    views = np.array([0, 1, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(store.clips(rows, views, frames), expected[np.arange(7), views])
    assert store.features([]).shape == (0, 2, 4, 16)


def test_rows_without_a_sample_are_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr")
    store = open_store(tmp_path / "s.zarr")
    for row in (11, 15, 16, -1):
        with pytest.raises(UserError, match=f"row {row} .*holds no sample"):
            store.features([0, row])
    with pytest.raises(IndexError, match="stores frames 0 to 3"):
        store.features([0], [4])


def test_class_texts(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr")
    store = open_store(tmp_path / "s.zarr")
    assert store.prompt_sets == ["mote28"]
    text = store.class_text("mote28")
    np.testing.assert_array_equal(text.embeddings, make_class_text().embeddings)
    assert (text.names, text.sentences_hash) == (CLASS_NAMES, "beef")
    with pytest.raises(UserError, match="prompt set 'video': it has mote28"):
        store.class_text("video")


def test_labels_and_texts_need_no_features(tmp_path: Path, monkeypatch: Any) -> None:
    make_store(tmp_path / "s.zarr")

    def forbidden(*args: object) -> None:
        raise AssertionError("features were read")

    monkeypatch.setattr("featstore.reading.features.ShardFile", forbidden)
    store = open_store(tmp_path / "s.zarr")
    assert len(store.labels) == len(store.keys) == 11
    assert len(store.split("train")) > 0
    assert store.class_text("mote28").names == CLASS_NAMES


def test_an_unfinished_store_shows_what_is_committed(tmp_path: Path) -> None:
    schema = StoreSchema.create(3, 4, 1, 2, 8)
    writer = init_store(tmp_path / "s.zarr", schema, [4, 2, 4])
    empty = open_store(tmp_path / "s.zarr")
    assert (len(empty), empty.keys, list(empty.labels), empty.complete) == (0, [], [], False)
    assert empty.split("train").tolist() == []
    writer.write_partition(1, make_partition(schema, 1, 2))
    assert writer.pending() == [0, 2]
    store = open_store(tmp_path / "s.zarr")
    assert (list(store.partitions()), store.rows.tolist()) == ([1], [4, 5])
    for tar in (0, 2):
        writer.write_partition(tar, make_partition(schema, tar, 4))
    assert writer.pending() == []
    assert open_store(tmp_path / "s.zarr").complete


def test_a_partition_can_be_redone(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr")
    writer = StoreWriter.open(tmp_path / "s.zarr")
    again = make_partition(writer.schema, 0, 8, seed=1)
    writer.write_partition(0, again)
    store = open_store(tmp_path / "s.zarr")
    np.testing.assert_array_equal(store.features(np.arange(8)), again.features)
    assert verify(tmp_path / "s.zarr", deep=True).ok


def test_store_is_pickled_by_path(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr")
    store = open_store(tmp_path / "s.zarr")
    expected = store.features(store.rows)
    raw = pickle.dumps(store)
    assert len(raw) < 500
    np.testing.assert_array_equal(pickle.loads(raw).features(store.rows), expected)


def test_threads_read_the_same(tmp_path: Path) -> None:
    partitions = make_store(tmp_path / "s.zarr", rows=(8,) * 6)
    everything = joined(partitions, "features")
    store = open_store(tmp_path / "s.zarr")
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            rows = rng.integers(0, 48, 16)
            if not np.array_equal(store.features(rows), everything[rows], equal_nan=True):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_plain_zarr_reads_it_without_warnings(tmp_path: Path) -> None:
    partitions = make_store(tmp_path / "s.zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(tmp_path / "s.zarr", mode="r")
        arrays: dict[str, Any] = dict(group.arrays())
        np.testing.assert_array_equal(arrays["features"][:11], joined(partitions, "features"))
        np.testing.assert_array_equal(arrays["key"][:11], joined(partitions, "key"))
        for name in ("label", "num_frames", "fps", "status", "splits", "frame_index", "pts"):
            np.testing.assert_array_equal(arrays[name][:11], joined(partitions, name))
        np.testing.assert_array_equal(arrays["commit"][:, 0], [8, 3])
        texts: Any = group["class_text/mote28"]
        np.testing.assert_array_equal(texts[:], make_class_text().embeddings)
    assert texts.attrs["class_names"] == list(CLASS_NAMES)
    assert arrays["features"].metadata.dimension_names == ("row", "view", "frame", "dim")
    assert arrays["pts"].attrs["units"] == "seconds"
    assert np.isnan(arrays["features"][11:]).all()


def test_metadata_is_what_zarr_itself_writes(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr")
    for file in (tmp_path / "s.zarr").rglob("zarr.json"):
        node = json.loads(file.read_text(), parse_constant=_no_constant)
        if node["node_type"] == "array":
            parsed = zarr.open_array(file.parent, mode="r", zarr_format=3).metadata.to_dict()
            ours = {k: v for k, v in node.items() if k not in ("attributes", "fill_value")}
            again = json.loads(json.dumps({k: parsed[k] for k in ours}, default=_plain))
            assert _without_empty(again) == _without_empty(ours)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not strict JSON")


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else str(value)


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: _without_empty(v) for k, v in value.items()}
        return {k: v for k, v in kept.items() if v != {}}
    return [_without_empty(v) for v in value] if isinstance(value, list) else value


def test_a_reader_is_not_disturbed_by_a_writer(tmp_path: Path) -> None:
    partitions = make_store(tmp_path / "s.zarr")
    store = open_store(tmp_path / "s.zarr")
    before = store.features(store.rows)
    writer = StoreWriter.open(tmp_path / "s.zarr")
    writer.write_partition(0, make_partition(writer.schema, 0, 8, seed=5))
    np.testing.assert_array_equal(store.features(store.rows), before)
    np.testing.assert_array_equal(before, joined(partitions, "features"))


def test_a_partition_written_anew_is_said(tmp_path: Path) -> None:
    """Its features are not those that were committed when the store was opened."""
    make_store(tmp_path / "s.zarr")
    stores = [open_store(tmp_path / "s.zarr", mapped=mapped) for mapped in (True, False)]
    writer = StoreWriter.open(tmp_path / "s.zarr")
    writer.write_partition(0, make_partition(writer.schema, 0, 8, seed=5))
    for store in stores:
        with pytest.raises(
            WorkError, match=r"partition 0 .* was written anew.*open the store again"
        ):
            store.features([0])
        assert np.isfinite(store.features([8, 10])).all()


def test_bulk_reading_without_checks_trusts_the_disk(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr")
    path = tmp_path / "s.zarr/features/c/0/0/0/0"
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    store = open_store(tmp_path / "s.zarr")
    out = np.empty((11, 2, 4, 16), np.float16)
    store.read_into(store.rows, out, check=False)
    assert out[0].tobytes()[0] == raw[0]
    with pytest.raises(WorkError, match="sample 'tar0/clip 0 é' fail"):
        store.read_into(store.rows, out)
    with pytest.raises(ValueError, match="must be"):
        store.read_into(store.rows, out[:3])
    with pytest.raises(IndexError, match="views 0 to 1"):
        store.clips([0], [2], [0])


@st.composite
def layouts(draw: Callable[..., Any]) -> tuple[StoreSchema, list[int]]:
    chunk_rows = draw(st.integers(1, 5))
    capacity = chunk_rows * draw(st.integers(1, 4))
    tars = draw(st.integers(1, 3))
    views, frames, dim = draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9)))
    rows = draw(st.lists(st.integers(1, capacity), min_size=tars, max_size=tars))
    return StoreSchema(tars, capacity, views, frames, dim, chunk_rows), rows


@settings(max_examples=25, deadline=None)
@given(layout=layouts(), data=st.data())
def test_any_shape_any_capacity_any_partial_partition(
    layout: tuple[StoreSchema, list[int]], data: st.DataObject
) -> None:
    schema, rows = layout
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.zarr"
        writer = init_store(path, schema, rows)
        partitions = []
        for tar, n in enumerate(rows):
            failed = data.draw(st.sets(st.integers(0, n - 1)), label=f"failed of tar {tar}")
            partitions.append(make_partition(schema, tar, n, failed=sorted(failed)))
        for tar in data.draw(st.permutations(range(len(rows)))):
            writer.write_partition(tar, partitions[tar])
        assert writer.pending() == []
        mapped, plain = open_store(path), open_store(path, mapped=False)
        assert len(mapped) == sum(rows)
        everything = joined(partitions, "features")
        np.testing.assert_array_equal(mapped.features(mapped.rows), everything)
        np.testing.assert_array_equal(plain.features(plain.rows), everything)
        chosen = data.draw(st.lists(st.integers(0, len(mapped) - 1), max_size=12))
        at = mapped.rows[np.array(chosen, np.int64)]
        for opened in (mapped, plain):
            read = np.empty((len(at), *schema.row_shape), np.float16)
            opened.read_into(at, read)
            np.testing.assert_array_equal(read, everything[chosen])
            assert list(opened.partitions()) == list(range(len(rows)))
        views = np.array([data.draw(st.integers(0, schema.views - 1)) for _ in chosen], np.int64)
        frames = data.draw(st.lists(st.integers(0, schema.frames - 1), min_size=1, max_size=4))
        clips = mapped.clips(at, views, frames)
        np.testing.assert_array_equal(clips, plain.clips(at, views, frames))
        picked = everything[chosen][:, :, frames]
        np.testing.assert_array_equal(clips, picked[np.arange(len(at)), views])
        np.testing.assert_array_equal(mapped.features(at, frames), picked)
        np.testing.assert_array_equal(plain.features(at, frames), picked)
        np.testing.assert_array_equal(mapped.features(at), everything[chosen])
        np.testing.assert_array_equal(plain.features(at), everything[chosen])
        assert mapped.keys == joined(partitions, "key").tolist()
        np.testing.assert_array_equal(mapped.pts(mapped.rows), joined(partitions, "pts"))
        assert verify(path, deep=True).ok
