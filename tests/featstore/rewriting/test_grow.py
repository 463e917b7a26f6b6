"""Stores that get more tars, other class texts, or join others: right, or as they were."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import featstore.files.exchange
from featstore import ClassText, StoreWriter, UserError, WorkError, open_store, verify
from featstore.rewriting.grow import add_class_text
from featstore.rewriting.merge import merge
from featstore.rewriting.source import SourceStore
from tests.support.stores.growing_stores import (
    add_tars,
    add_three_tars,
    equal_partitions,
    make_other_store,
    make_small_store,
    other_text,
    same_partitions,
    tar_entries,
    unit_text,
)
from tests.support.stores.sample_stores import CLASS_NAMES, make_partition, make_store

DRIVER = Path(__file__).with_name("growth_crash_driver.py")
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "a.zarr"
    make_small_store(path)
    return path


@pytest.fixture(params=["exchange", "two renames"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a system that can exchange two folders in one step."""
    if request.param == "two renames":
        monkeypatch.setattr(featstore.files.exchange, "_exchanged", lambda one, other: False)


# add-tars


@pytest.mark.usefixtures("either_way")
def test_new_tars_are_pending_and_the_earlier_ones_are_linked(store: Path, tmp_path: Path) -> None:
    before = SourceStore(store)
    kept = [before.partition(tar) for tar in (0, 1)]
    inodes = [before.shard(tar).stat().st_ino for tar in (0, 1)]
    reader = open_store(store)  # was open all the time
    grown = add_three_tars(store)
    assert (grown.tars, grown.tars_added, grown.rows, grown.rows_added) == (5, 3, 21, 12)
    writer = StoreWriter.open(store)
    assert writer.pending() == [0, 3, 4]
    assert writer.provenance.dataset_fingerprint == "f00d"
    after = SourceStore(store)
    for old, new in ((0, 1), (1, 2)):
        equal_partitions(kept[old], after.partition(new))
        assert after.shard(new).stat().st_ino == inodes[old]
    assert [entry.file for entry in after.metadata.tars][:2] == ["toy-000007.tar", "toy-000000.tar"]
    with writer.claim():
        for tar in writer.pending():
            rows = writer.metadata.tars[tar].rows
            writer.write_partition(tar, make_partition(writer.schema, tar, rows, seed=3))
    assert open_store(store).complete
    report = verify(store, deep=True)
    assert (report.ok, report.partitions) == (True, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zarr", "a.zarr.lock"]
    assert len(reader) == 9


def test_readers_that_are_open_meanwhile(store: Path) -> None:
    expected = open_store(store).features([0, 5, 6, 8])
    reader = open_store(store)
    add_tars(store, tar_entries([0, 1, 2], [6, 3, 4]))  # at the end: nothing moves
    np.testing.assert_array_equal(reader.features([0, 5, 6, 8]), expected)
    reader = open_store(store)
    add_tars(store, tar_entries([7, 0, 1, 2], [5, 6, 3, 4]))
    with pytest.raises(WorkError, match="partition 0"):
        reader.features([0])
    writer = StoreWriter.open(store)
    writer.write_partition(0, make_partition(writer.schema, 0, 5, seed=3))
    reader = open_store(store)
    np.testing.assert_array_equal(reader.features([6, 11, 12, 14]), expected)


def test_a_link_to_a_store_is_not_changed(store: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.zarr"
    link.symlink_to(store)
    for work in (add_three_tars, lambda path: add_class_text(path, "video", other_text())):
        with pytest.raises(
            UserError, match="is a symbolic link: commands that change a store need"
        ):
            work(link)
    assert len(open_store(link)) == 9


def test_nothing_new_changes_nothing(store: Path) -> None:
    same = tar_entries([0, 1], [6, 3])
    before = (store / "zarr.json").stat().st_ino
    assert add_tars(store, same, dataset_fingerprint="feed").tars_added == 0
    assert (store / "zarr.json").stat().st_ino == before


def test_a_damaged_partition_is_not_carried_along(store: Path) -> None:
    shard = SourceStore(store).shard(0)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(WorkError, match="partition 0"):
        add_three_tars(store)


@pytest.mark.parametrize(
    ("tars", "message"),
    [
        (tar_entries([0, 2], [6, 3]), r"toy-000001.tar of .* is not listed any more"),
        (tar_entries([0, 1], [6, 4]), r"toy-000001.tar of .* was changed"),
        (tar_entries([0, 1, 2], [6, 3, 7]), "lists 7 videos, a partition of .* holds 6: pack"),
    ],
)
def test_tars_that_do_not_continue_the_store(store: Path, tars: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_tars(store, tars)
    assert verify(store, deep=True).partitions == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ("brush hair", "throw")}, "class names .* number 1 was 'climb stairs'"),
        ({"split_names": ("val", "train")}, "splits .* number 0 was 'train', is 'val'"),
        ({"class_names": (*CLASS_NAMES, "x"), "raw_class_names": tuple("abcd")}, "raw class names"),
    ],
)
def test_names_come_at_the_end_only(store: Path, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_tars(store, tar_entries([0, 1, 2], [6, 3, 4]), **change)


def test_new_classes_need_their_texts(store: Path) -> None:
    names = (*CLASS_NAMES, "fly")
    change: Any = {
        "class_names": names,
        "raw_class_names": ("brush_hair", "climb_stairs", "throw", "fly"),
        "split_names": ("train", "val", "test"),
    }
    tars = tar_entries([0, 1, 2], [6, 3, 4])
    with pytest.raises(
        UserError, match=r"are for 3 classes .*, the store has 4 .*: compute class texts"
    ):
        add_tars(store, tars, **change)
    grown = add_tars(store, tars, class_texts={"mote28": unit_text(names)}, **change)
    assert (grown.classes_added, grown.pending) == (1, 1)
    opened = open_store(store)
    assert opened.class_text("mote28").names == names
    assert opened.split_names == ["train", "val", "test"]
    assert verify(store, deep=True).ok


# add-texts


def test_class_texts_of_another_prompt_set(store: Path) -> None:
    inode = SourceStore(store).shard(0).stat().st_ino
    assert add_class_text(store, "video", other_text())
    assert not add_class_text(store, "video", other_text())
    opened = open_store(store)
    assert opened.prompt_sets == ["mote28", "video"]
    np.testing.assert_array_equal(opened.class_text("video").embeddings, other_text().embeddings)
    assert SourceStore(store).shard(0).stat().st_ino == inode
    assert verify(store, deep=True).ok


def test_class_texts_that_do_not_fit(store: Path) -> None:
    with pytest.raises(UserError, match="no name for a prompt set"):
        add_class_text(store, "../video", other_text())
    with pytest.raises(UserError, match="of other sentences"):
        add_class_text(store, "mote28", other_text())
    with pytest.raises(UserError, match="are for 2 classes with 16 numbers"):
        add_class_text(store, "video", unit_text(CLASS_NAMES[:2]))
    assert open_store(store).prompt_sets == ["mote28"]


def test_class_texts_say_how_they_were_made(store: Path) -> None:
    made = open_store(store).provenance.encoder_fingerprint
    text = replace(other_text(), templates=("a {}", "{}"), encoder_fingerprint=made)
    assert add_class_text(store, "mine", text)
    held = open_store(store).class_text("mine")
    assert (held.templates, held.encoder_fingerprint) == (("a {}", "{}"), made)
    assert (open_store(store).class_text("mote28").templates) == ()  # as earlier stores have it
    with pytest.raises(UserError, match="were made with another encoder"):
        add_class_text(store, "yours", replace(text, encoder_fingerprint="f" * 64))


# merge


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "b.zarr"
    make_other_store(path)
    return path


def test_two_stores_become_one(store: Path, other: Path, tmp_path: Path) -> None:
    merged = merge([store, other], tmp_path / "c.zarr")
    assert (merged.tars, merged.tars_linked, merged.rows) == (4, 4, 17)
    made = open_store(tmp_path / "c.zarr")
    assert made.class_names == [*CLASS_NAMES, "fly"]
    assert made.raw_class_names == ["brush_hair", "climb_stairs", "throw", "fly"]
    assert made.split_names == ["train", "val", "test"]
    assert made.provenance.dataset == "toy+other"
    assert verify(tmp_path / "c.zarr", deep=True).ok
    same_partitions(tmp_path / "c.zarr", store, {0: 0, 1: 1})
    one, two = open_store(store), open_store(other)
    for source in (one, two):
        for key, row in zip(source.keys, source.rows, strict=True):
            there = made.row(key)
            at, was = made.positions([there])[0], source.positions([row])[0]
            assert made.class_names[made.labels[at]] == source.class_names[source.labels[was]]
            assert made.features([there]).tobytes() == source.features([row]).tobytes()
            assert made.reasons[at] == source.reasons[was]
            for split in ("train", "val", "test"):
                had = split in source.split_names and row in source.split(split)
                assert (there in made.split(split)) == had, (key, split)
    text = made.class_text("mote28")
    assert text.names == (*CLASS_NAMES, "fly")
    np.testing.assert_array_equal(text.embeddings[3], two.class_text("mote28").embeddings[1])
    assert SourceStore(tmp_path / "c.zarr").shard(2).stat().st_nlink == 2


def test_the_split_that_stores_were_made_of(tmp_path: Path) -> None:
    for name, split in {"a": "train", "b": "train", "c": "val"}.items():
        make_store(tmp_path / f"{name}.zarr", split=split, dataset=name, dataset_fingerprint=name)
    for others, split in {"b": "train", "c": ""}.items():
        paths = [tmp_path / f"{name}.zarr" for name in ("a", others)]
        merge(paths, tmp_path / f"a{others}.zarr", prefix_keys=True)
        assert open_store(tmp_path / f"a{others}.zarr").provenance.split == split


def test_the_largest_capacity_wins_and_features_stay_equal(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "b.zarr"
    partitions = make_other_store(other, rows=(10, 2), capacity=10)
    merged = merge([store, other], tmp_path / "c.zarr")
    assert (merged.tars, merged.tars_linked) == (4, 2)
    made = SourceStore(tmp_path / "c.zarr")
    assert made.metadata.schema.capacity == 10
    same_partitions(tmp_path / "c.zarr", store, {0: 0, 1: 1})
    assert made.partition(2).features.tobytes() == partitions[0].features.tobytes()
    assert verify(tmp_path / "c.zarr", deep=True).ok


def test_keys_that_both_have_are_named_and_can_be_told_apart(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "b.zarr"
    make_store(
        other, rows=(2,), capacity=6, row_shape=(1, 4, 16), dataset="more", dataset_fingerprint="1"
    )
    with pytest.raises(UserError, match=r"key .tar0/clip 0 é. is in .* and in .*: .*--prefix-keys"):
        merge([store, other], tmp_path / "c.zarr")
    assert not (tmp_path / "c.zarr").exists()
    merge([store, other], tmp_path / "c.zarr", prefix_keys=True)
    keys = open_store(tmp_path / "c.zarr").keys
    assert keys[0] == "toy/tar0/clip 0 é"
    assert keys[-1] == "more/tar0/clip 1 é"
    assert verify(tmp_path / "c.zarr", deep=True).ok


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling": "uniform:8"}, "sampling: the first has uniform:4, the second has uniform:8"),
        ({"encoder_fingerprint": "ffff"}, "encoder: the first has .* the second has"),
    ],
)
def test_stores_that_were_made_otherwise(
    store: Path, tmp_path: Path, change: Any, message: str
) -> None:
    make_other_store(tmp_path / "b.zarr", **change)
    with pytest.raises(UserError, match=message):
        merge([store, tmp_path / "b.zarr"], tmp_path / "c.zarr")


def test_prompt_sets_that_one_lacks_are_left_out_and_named(
    store: Path, other: Path, tmp_path: Path
) -> None:
    add_class_text(store, "video", other_text())
    merged = merge([store, other], tmp_path / "c.zarr")
    assert (merged.prompt_sets, merged.prompt_sets_left_out) == (("mote28",), ("video",))


def test_class_texts_that_differ_are_refused(store: Path, tmp_path: Path) -> None:
    names = ("throw", "fly", "brush hair")
    wrong = ClassText(names, np.eye(16, dtype=np.float32)[[5, 6, 0]], "x")
    make_other_store(tmp_path / "b.zarr", texts={"mote28": wrong})
    with pytest.raises(UserError, match="'mote28' of 'throw' differ"):
        merge([store, tmp_path / "b.zarr"], tmp_path / "c.zarr")


def test_merging_refuses_what_is_not_finished_or_there(
    store: Path, other: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="two or more different stores"):
        merge([store, store], tmp_path / "c.zarr")
    with pytest.raises(UserError, match="exists already"):
        merge([store, other], other)
    add_three_tars(store)
    with pytest.raises(WorkError, match="lacks 3 of 5 partitions: finish it"):
        merge([store, other], tmp_path / "c.zarr")


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=1, max_size=2)),
        min_size=2,
        max_size=3,
    )
)
def test_stores_of_any_sizes_become_one(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    paths, partitions = [], []
    for number, (capacity, rows) in enumerate(sizes):
        paths.append(folder / f"{number}.zarr")
        partitions += make_other_store(
            paths[-1],
            rows=[min(n, capacity) for n in rows],
            capacity=capacity,
            prefix=str(number),
            dataset=f"set{number}",
        )
    merge(paths, folder / "all.zarr")
    made = SourceStore(folder / "all.zarr")
    assert made.metadata.schema.capacity == max(capacity for capacity, _ in sizes)
    for tar, partition in enumerate(partitions):
        equal_partitions(partition, made.partition(tar))
    assert verify(folder / "all.zarr", deep=True).ok


# One at a time, and interrupted


def test_a_store_that_is_written_to_is_left_alone(store: Path, other: Path, tmp_path: Path) -> None:
    works = [
        lambda: add_three_tars(store),
        lambda: add_class_text(store, "video", other_text()),
        lambda: merge([store, other], tmp_path / "c.zarr"),
    ]
    with StoreWriter.open(store).claim([1]):
        for work in works:
            with pytest.raises(WorkError, match="is writing partition 1 of"):
                work()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("a.zarr", "a.zarr.lock", "b.zarr", "b.zarr.lock")
    ]


def test_without_hard_links_files_are_copied(
    store: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    merge([store, other], tmp_path / "c.zarr")
    assert SourceStore(tmp_path / "c.zarr").shard(0).stat().st_nlink == 1
    add_three_tars(store)
    for path in (store, tmp_path / "c.zarr"):
        assert verify(path, deep=True).ok


def test_writing_a_linked_partition_anew_leaves_the_other_store_alone(
    store: Path, other: Path, tmp_path: Path
) -> None:
    merge([store, other], tmp_path / "c.zarr")
    writer = StoreWriter.open(store)
    with writer.claim([0]):
        writer.write_partition(0, make_partition(writer.schema, 0, 6, seed=77))
    for path in (store, tmp_path / "c.zarr"):
        assert verify(path, deep=True).ok


def test_a_replacement_cut_between_its_renames_is_put_back(store: Path) -> None:
    store.rename(store.with_name("a.zarr.previous"))
    with pytest.raises(UserError, match=r"a\.zarr\.previous.* rename it back"):
        open_store(store)
    add_three_tars(store)
    assert verify(store, deep=True).partitions == 2


def drive(folder: Path, *arguments: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(folder), *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills: dict[str, int] = json.loads(done.stdout)
    return kills


def test_killed_at_a_spread_of_steps(tmp_path: Path) -> None:
    assert min(drive(tmp_path, "add-tars:70", "add-texts:6").values()) >= 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [("add-tars:3", "add-texts:1"), ("add-tars:3", "two-renames"), ("merge:9",)],
    ids=" ".join,
)
def test_killed_at_many_steps(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert min(drive(tmp_path, *arguments).values()) >= 10


def test_exchanging_for_real(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not featstore.files.exchange._exchanged(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this file system cannot exchange folders")
    assert (tmp_path / "one" / "other").exists()
    with pytest.raises(OSError, match="No such file"):
        featstore.files.exchange._exchanged(tmp_path / "one", tmp_path / "missing")
