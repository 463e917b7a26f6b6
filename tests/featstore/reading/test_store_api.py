"""What callers may give `open_store` and a `Store`, and what they may do with what they get."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featstore import Store, UserError, open_store
from featstore.batches.loader import FeatureLoader, MappedFeatures, load_features, resident
from featstore.rewriting.convert import convert
from featstore.rewriting.quantize import quantize
from tests.support.stores.sample_stores import make_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same samples plain, compressed and as int8."""
    place = tmp_path_factory.mktemp("stores")
    make_store(place / "plain.zarr", rows=(8, 8, 3))
    convert(place / "plain.zarr", place / "zstd.zarr", "zstd")
    quantize(place / "plain.zarr", place / "int8.zarr")
    return place


@pytest.fixture(params=["plain", "plain, by zarr", "zstd", "int8"])
def store(folder: Path, request: pytest.FixtureRequest) -> Store:
    name, _, by_zarr = request.param.partition(", ")
    return open_store(folder / f"{name}.zarr", mapped=not by_zarr)


def test_rows_may_be_any_whole_numbers(store: Store) -> None:
    everything = store.features(store.rows)
    for rows, expected in [
        (3, [3]),
        (np.int32(3), [3]),
        ([3, 1, 1], [3, 1, 1]),
        ((2,), [2]),
        (range(2), [0, 1]),
        (np.array([4, 0], np.uint8), [4, 0]),
        (torch.tensor([1, 2]), [1, 2]),
        ([], []),
        (np.zeros(0, np.int32), []),
    ]:
        np.testing.assert_array_equal(store.features(rows), everything[expected])
        np.testing.assert_array_equal(store.positions(rows), expected)


@pytest.mark.parametrize(
    "rows",
    [
        [True, False],
        np.arange(19) < 3,
        torch.tensor([True]),
        [0.9],
        np.array([1.0]),
        float("nan"),
        "3",
        ["3"],
        None,
        slice(0, 3),
        {1, 2},
        [2**70],
        [1j],
        np.array([1], "M8[s]"),
        [[0, 1], [2, 3]],
        [[0], [1]],
        [[0], [1, 2]],
        np.zeros((0, 2), np.int64),
    ],
    ids=repr,
)
def test_rows_that_are_none_are_refused(store: Store, rows: Any) -> None:
    """numpy would take a mask for rows 0 and 1, "3" for 3, and cut a fraction off."""
    for read in (store.features, store.positions, store.frame_index, store.pts):
        with pytest.raises(UserError, match=r"^rows are .*(whole numbers|mask|must be \[n\])"):
            read(rows)
    for load in (resident, load_features):
        with pytest.raises(UserError, match=r"^rows are"):
            load(store, rows)


def test_a_mask_is_told_what_to_do(store: Store) -> None:
    with pytest.raises(UserError, match=r"rows are a mask: give .*store.rows\[mask\]") as error:
        store.features(store.status == 1)
    assert "\n" not in str(error.value)
    assert store.features(store.rows[store.status == 1]).shape == (16, 2, 4, 16)


@pytest.mark.parametrize("row", [-1, 19, 2**40, np.array([2**63], np.uint64)])
def test_rows_that_no_sample_has_are_refused(store: Store, row: Any) -> None:
    with pytest.raises(UserError, match="holds no sample"):
        store.features(row)


def test_frames_may_be_any_whole_numbers(store: Store) -> None:
    some = store.features([5, 0])
    for frames, expected in [
        (2, [2]),
        (np.int64(2), [2]),
        ([3, 3, 0], [3, 3, 0]),
        (range(2), [0, 1]),
        ([], []),
    ]:
        found = store.features([5, 0], frames)
        np.testing.assert_array_equal(found, some[:, :, expected])
    own = store.features([5, 0], [[0, 1], [3, 2]])
    np.testing.assert_array_equal(own, np.stack([some[0][:, [0, 1]], some[1][:, [3, 2]]]))
    for frames, taken in [([0, 1], 2), ([], 0), (1, 1), (np.zeros((0, 3), np.int64), 3)]:
        assert store.features([], frames).shape == (0, 2, taken, 16)
    np.testing.assert_array_equal(store.clips(5, [1], 2), some[:1, 1, 2:3])


@pytest.mark.parametrize(
    "frames",
    [[True, False, True, False], 1.5, [0.0, 1.0], "1", slice(0, 2), [[0, 1]], [[[0]]], [2**70]],
    ids=repr,
)
def test_frames_that_are_none_are_refused(store: Store, frames: Any) -> None:
    with pytest.raises(UserError, match=r"^frames are"):
        store.features([0, 2], frames)
    with pytest.raises(UserError, match=r"^frames are"):
        store.clips([0, 2], [0, 0], frames)


@pytest.mark.parametrize("frame", [-1, 4])
def test_frames_are_not_counted_from_the_end(store: Store, frame: int) -> None:
    with pytest.raises(IndexError, match="stores frames 0 to 3 of each view"):
        store.features([0], [0, frame])
    for view, error in [(-1, IndexError), (2, IndexError), (0.5, UserError), (True, UserError)]:
        with pytest.raises(error, match="view"):
            store.clips([0], [view], [0])


def given_out(store: Store) -> Iterator[tuple[str, np.ndarray]]:
    rows = store.rows
    for name in ("rows", "labels", "num_frames", "fps", "status"):
        yield name, getattr(store, name)
    for name in ("container_frames", "damaged_packets"):
        yield name, getattr(store, name)
    yield "split", store.split("train")
    yield "positions", store.positions(rows)
    yield "frame_index", store.frame_index(rows)
    yield "pts", store.pts(rows)
    yield "features", store.features(rows)
    yield "one row", store.features(0)
    yield "some frames", store.features(rows, [1])
    yield "clips", store.clips(rows, np.zeros(len(rows), np.int64), [0, 2])
    yield "class_text", store.class_text("mote28").embeddings


def test_what_is_given_out_cannot_change_the_store(store: Store) -> None:
    before = {name: array.copy() for name, array in given_out(store)}
    files = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()}
    for _, array in given_out(store):
        if array.flags.writeable:
            array[...] = 0
        else:
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
    for names in (store.class_names, store.raw_class_names, store.split_names, store.prompt_sets):
        names.clear()
    keys, reasons = list(store.keys), list(store.reasons)
    for texts in (store.keys, store.reasons):
        changes: list[Callable[[], object]] = [
            texts.clear,
            texts.sort,
            texts.pop,
            lambda texts=texts: texts.append("x"),  # type: ignore[misc]
            lambda texts=texts: texts.__setitem__(0, "x"),  # type: ignore[misc]
            lambda texts=texts: texts.__iadd__(["x"]),  # type: ignore[misc]
        ]
        for change in changes:
            with pytest.raises(TypeError, match="read-only"):
                change()
    copied = pickle.loads(pickle.dumps(store.keys))
    copied.append("x")  # a copy is anybody's own
    assert (store.keys, store.reasons, type(copied)) == (keys, reasons, list)
    for name, array in given_out(store):
        np.testing.assert_array_equal(array, before[name], err_msg=name)
    assert {path: path.read_bytes() for path in files} == files
    assert store.class_names[2] == "throw"
    assert "train" in store.split_names


def test_memory_that_is_read_only_is_not_called_damage(store: Store) -> None:
    out = np.empty((1, 2, 4, 16), np.float16)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="C-contiguous and writeable"):
        store.read_into([0], out)


def test_unknown_names_list_what_there_is(store: Store) -> None:
    for key in ("x", 3, ""):
        with pytest.raises(UserError, match=f"has no sample {key!r}: `keys` of the store lists"):
            store.row(key)  # type: ignore[arg-type]
    for name, near in (("test", ""), (None, ""), ("TRAIN", r"did you mean train\? ")):
        with pytest.raises(UserError, match=rf"has no split .*: {near}choose one of train, val$"):
            store.split(name)  # type: ignore[arg-type]
    for name in ("x", "../class_text/mote28", None):
        with pytest.raises(UserError, match=r"prompt set .*: it has mote28; add them with"):
            store.class_text(name)  # type: ignore[arg-type]
    failed = store.row("tar0/clip 1 é")
    assert failed == 1
    assert np.isnan(store.features(failed)).all()


def test_a_store_is_found_however_it_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "a b é#?%20"
    make_store(odd / "s.zarr")
    os.symlink(odd / "s.zarr", tmp_path / "link")
    monkeypatch.chdir(odd)
    monkeypatch.setenv("HOME", str(odd))
    expected = open_store(odd / "s.zarr").keys
    for place in ("s.zarr", Path("s.zarr"), "./s.zarr/", "s.zarr//", "../link", "~/s.zarr"):
        assert open_store(place).keys == expected
    monkeypatch.chdir(odd / "s.zarr")
    assert open_store(".").path.name == "s.zarr"


@pytest.mark.parametrize("mapped", [True, False])
def test_a_store_stays_the_same_after_a_change_of_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    expected = open_store(folder / "plain.zarr").features([0, 12])
    monkeypatch.chdir(folder)
    store = open_store("plain.zarr", mapped=mapped)
    raw = pickle.dumps(store)
    monkeypatch.chdir(tmp_path)
    for opened in (store, pickle.loads(raw)):
        np.testing.assert_array_equal(opened.features([0, 12]), expected)
        assert opened.class_text("mote28").names[0] == "brush hair"


FORKED = """
import multiprocessing, sys
import numpy as np, torch
from featstore import open_store
from featstore.batches.loader import FeatureLoader, resident

def epoch(store, features):
    loader = FeatureLoader(features, store.labels, batch_size=1024, frames=32, seed=0)
    return np.concatenate([batch.features.numpy() for batch in loader.epoch(0)])

if __name__ == "__main__":
    torch.set_num_threads(4)
    store = open_store(sys.argv[1])
    features = resident(store, store.rows)
    # Large enough for several threads, in the parent first.
    expected = store.features(store.rows[::-1]), epoch(store, features)
    context = multiprocessing.get_context("fork")
    for work in (lambda: store.features(store.rows[::-1]), lambda: epoch(store, features)):
        queue = context.Queue()
        process = context.Process(target=lambda: queue.put(work()))
        process.start()
        found = queue.get()
        process.join()
        assert any(np.array_equal(found, one) for one in expected)
"""


def test_a_forked_process_reads_what_its_parent_read(tmp_path: Path) -> None:
    """It waited forever, for the threads that torch had in the parent."""
    make_store(tmp_path / "s.zarr", rows=(512, 512), capacity=512, row_shape=(1, 32, 32), failed=())
    script = tmp_path / "forked.py"
    script.write_text(FORKED)
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    subprocess.run(
        [sys.executable, script, tmp_path / "s.zarr"], check=True, timeout=120, env=environment
    )


def test_steps_and_epochs_are_counted_from_0(folder: Path) -> None:
    store = open_store(folder / "plain.zarr")
    loader = FeatureLoader(
        MappedFeatures(store, store.rows), store.labels, batch_size=4, frames=2, seed=0
    )
    for epoch, start in [(-1, 0), (0, -1)]:
        with pytest.raises(ValueError, match=f"epoch {epoch}, step {start}: both are counted"):
            next(loader.epoch(epoch, start))
    assert list(loader.epoch(0, len(loader))) == list(loader.epoch(0, 99)) == []
    with pytest.raises(UserError, match=r"labels are .*whole numbers"):
        FeatureLoader(
            MappedFeatures(store, store.rows), store.labels + 0.5, batch_size=4, frames=2, seed=0
        )
