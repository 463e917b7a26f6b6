"""Stores of sequences: rows of their own length come back as they were written, or not at all."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore import StoreWriter, UserError, WorkError, open_store, verify
from featstore.format.gaps import Gap
from featstore.reading.store import Store
from tests.support.stores.sample_stores import init_store, make_store
from tests.support.stores.sequence_stores import (
    make_rows,
    make_sequence_store,
    sequence_partition,
    sequence_schema,
)


@pytest.mark.parametrize("mapped", [True, False])
@given(
    lengths=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=4), min_size=1, max_size=3),
    crops=st.sampled_from([1, 3]),
    block=st.integers(1, 9),
    cut=st.tuples(st.floats(-1, 60), st.floats(0, 60)),
)
@settings(max_examples=25, deadline=None)
def test_rows_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory,
    mapped: bool,
    lengths: list[list[int]],
    crops: int,
    block: int,
    cut: tuple[float, float],
) -> None:
    path = tmp_path_factory.mktemp("s") / "s.zarr"
    written = make_sequence_store(path, lengths, crops=crops, block=block, room=120, dim=4)
    store = open_store(path, mapped=mapped)
    start, end = cut[0], cut[0] + cut[1]
    rows = [row for of_tar in written for row in of_tar]
    assert store.lengths.tolist() == [len(row[0]) for row in rows]
    for row, (features, seconds, numbers) in zip(store.rows.tolist(), rows, strict=True):
        shape = (len(seconds), crops, 4) if crops > 1 else (len(seconds), 4)
        assert store.sequence(row).shape == shape
        assert store.sequence(row).tobytes() == features.tobytes()
        assert store.sequence_times(row).tolist() == seconds.tolist()
        assert store.sequence_frames(row).tolist() == numbers.tolist()
        inside = (seconds >= start) & (seconds < end)
        assert store.sequence(row, start, end).tobytes() == features[inside].tobytes()
        assert store.sequence_times(row, start, end).tolist() == seconds[inside].tolist()
        pieces = list(store.blocks(row))
        assert b"".join(piece.tobytes() for _, piece in pieces) == features.tobytes()
        assert all(a + len(p) == b for (a, p), (b, _) in pairwise(pieces))
    assert verify(path, deep=True).ok


@given(
    length=st.integers(1, 60),
    seconds=st.floats(0.1, 20),
    stride=st.floats(0.1, 20),
)
@settings(max_examples=30, deadline=None)
def test_windows_hold_every_frame_of_their_time(
    tmp_path_factory: pytest.TempPathFactory, length: int, seconds: float, stride: float
) -> None:
    path = tmp_path_factory.mktemp("s") / "s.zarr"
    ((features, times, _),) = make_sequence_store(path, [[length]])[0]
    store = open_store(path)
    found = list(store.windows(seconds, stride))
    for window in found:
        inside = (times >= window.start_s) & (times < window.end_s)
        assert store.window_features(window).tobytes() == features[inside].tobytes()
        assert inside.any()
    assert found[0].first == 0
    if stride <= seconds:
        assert found[-1].after == length
    starts = [window.start_s for window in found]
    steps = (np.array(starts) - times[0]) / stride
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-6)


def test_plain_zarr_reads_the_flat_axis_of_frames(tmp_path: Path) -> None:
    rows = make_sequence_store(tmp_path / "s.zarr", crops=3)
    group = zarr.open_group(tmp_path / "s.zarr", mode="r")
    sizes = group.attrs["schema"]
    assert group.attrs["format_version"] == 2
    for tar, of_tar in enumerate(rows):
        for position, row in enumerate(of_tar):
            at = tar * sizes["capacity"] + position
            start = tar * sizes["frame_capacity"] + int(group["first_frame"][at])
            end = start + int(group["length"][at])
            for name, expected in zip(("features", "pts", "frame_index"), row, strict=True):
                assert group[name][start:end].tobytes() == expected.tobytes()
    assert json.loads(group["gaps"][:].tolist()[0]) == [[1.5, 2.5, "damaged"]]


def test_a_motion_is_a_sequence_of_numbers(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"tier": "motion", "item": (263,), "feature_type": "float32"}
    schema = sequence_schema(1, 2, **sizes)
    writer = init_store(tmp_path / "m.zarr", schema, [2])
    rows = make_rows(schema, (40, 3))
    writer.write_partition(0, sequence_partition(0, rows))
    store = open_store(tmp_path / "m.zarr")
    assert (store.sequence(0).dtype, store.sequence(0).shape) == (np.float32, (40, 263))
    assert store.sequence(1).tobytes() == rows[1][0].tobytes()
    assert verify(tmp_path / "m.zarr", deep=True).ok


def test_what_reads_fixed_rows_is_refused_and_the_other_way_round(tmp_path: Path) -> None:
    make_sequence_store(tmp_path / "s.zarr")
    make_store(tmp_path / "f.zarr")
    store, fixed = open_store(tmp_path / "s.zarr"), open_store(tmp_path / "f.zarr")
    for call in (
        store.require_embeddings,
        lambda: store.features([0]),
        lambda: store.pts([0]),
        lambda: store.frame_index([0]),
        lambda: store.clips([0], [0], [[0]]),
        lambda: next(store.iter_partitions()),
    ):
        with pytest.raises(UserError, match=r"s\.zarr holds sequences, .* uniform:16"):
            call()
    with pytest.raises(UserError, match=r"f\.zarr holds 4 frames of every video, no sequences"):
        fixed.sequence(0)
    with pytest.raises(UserError, match="no sequences"):
        next(fixed.windows(2))
    assert (fixed.lengths == [4, 0, *[4] * 6, 4, 0, 4]).all()
    assert set(fixed.gaps) == {()}


def test_wrong_parts_are_refused(tmp_path: Path) -> None:
    make_sequence_store(tmp_path / "s.zarr")
    store = open_store(tmp_path / "s.zarr")
    with pytest.raises(UserError, match="ends before it begins"):
        store.sequence(0, 3, 2)
    with pytest.raises(UserError, match="is no time"):
        store.sequence(0, float("nan"))
    with pytest.raises(UserError, match=r"row 4 of .* holds no sample"):
        store.sequence(4)
    for wrong in ((0, 1), (1, -1), (float("inf"), 1)):
        with pytest.raises(UserError, match="must be above zero"):
            next(store.windows(*wrong))


def test_gaps_and_facts(tmp_path: Path) -> None:
    make_sequence_store(tmp_path / "s.zarr")
    store = open_store(tmp_path / "s.zarr")
    assert store.gaps == ((Gap(1.5, 2.5, "damaged"),), (), (), (Gap(1.5, 2.5, "damaged"),))
    assert (store.facts()["sequences"], store.facts()["frames"]) == (True, 36)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": np.array([3, 2], np.int64)}, "two rows"),
        ({"length": np.array([3, 5], np.int64)}, "frames were given"),
    ],
)
def test_frames_that_are_not_those_of_the_rows_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    schema = sequence_schema(1, 2)
    writer = init_store(tmp_path / "s.zarr", schema, [2])
    rows = make_rows(schema, (3, 4))
    with pytest.raises(ValueError, match=message):
        writer.write_partition(0, sequence_partition(0, rows, **changes))
    assert not writer.done(0)
    assert not list((tmp_path / "s.zarr").rglob("*.partial"))


def test_times_that_descend_and_too_many_frames_are_refused(tmp_path: Path) -> None:
    schema = sequence_schema(1, 2, block=2, room=3)
    writer = init_store(tmp_path / "s.zarr", schema, [2])
    features, seconds, numbers = make_rows(schema, (5,))[0]
    with pytest.raises(ValueError, match="descend"):
        writer.write_partition(
            0, sequence_partition(0, [(features, seconds[::-1] - 9, numbers), (features[:0],) * 3])
        )
    with pytest.raises(UserError, match=r"have 8 frames, and a partition of .* room for 6"):
        writer.write_partition(0, sequence_partition(0, make_rows(schema, (3, 5))))


def _files(store: Path) -> list[Path]:
    return sorted(p for p in store.rglob("c/**/*") if p.is_file() and "class_text" not in p.parts)


def test_any_changed_byte_is_an_error_and_never_another_number(tmp_path: Path) -> None:
    make_sequence_store(tmp_path / "s.zarr", [[9, 0, 23]])
    path = tmp_path / "s.zarr"
    sound = open_store(path)
    expected = [(sound.sequence(r).tobytes(), sound.sequence_times(r).tolist()) for r in (0, 2)]
    rng = np.random.default_rng(3)
    for file in _files(path):
        content = file.read_bytes()
        for _ in range(4):
            changed = bytearray(content)
            changed[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
            file.write_bytes(changed)
            assert not verify(path, deep=True).ok, file
            try:
                store = Store(path)
                found = [
                    (store.sequence(r).tobytes(), store.sequence_times(r).tolist()) for r in (0, 2)
                ]
            except (UserError, WorkError):
                continue
            assert found == expected, file
        file.write_bytes(content)
    assert verify(path, deep=True).ok


@pytest.mark.parametrize("array", ["features", "pts", "frame_index", "length", "gaps"])
def test_the_file_of_another_partition_is_noticed(tmp_path: Path, array: str) -> None:
    path = tmp_path / "s.zarr"
    make_sequence_store(path, [[9, 0], [9, 0]])
    if array in ("length", "gaps"):  # equal ones are no damage
        make_rows_of = [[9, 0], [5, 0]]
        make_sequence_store(tmp_path / "t.zarr", make_rows_of)
        path = tmp_path / "t.zarr"
    writer = StoreWriter.open(path)
    one, two = (writer.file(array, tar) for tar in (0, 1))
    if one.read_bytes() == two.read_bytes():
        return
    one.write_bytes(two.read_bytes())
    assert not verify(path, deep=True).ok
