"""Stores that were made to harm, and damage that no checksum of one file can tell."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore import ClassText, StoreSchema, StoreWriter, UserError, WorkError, open_store, verify
from featstore.format.metadata import StoreMetadata, TarEntry, attributes_checksum
from featstore.format.schema import MAX_CHUNK_BYTES, MAX_CHUNKS
from featstore.reading.damage_notes import DamageNote, note_path
from tests.support.stores.sample_stores import (
    CLASS_NAMES,
    init_store,
    make_partition,
    make_provenance,
    make_store,
)

TEXTS = "class_text/mote28"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "s.zarr"
    make_store(path, rows=(8, 8, 3))
    return path


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    node = json.loads(path.read_text())
    edit(node)
    if "checksum" in node["attributes"]:
        node["attributes"]["checksum"] = attributes_checksum(node["attributes"])
    path.write_text(json.dumps(node))


def read_all(path: Path) -> None:
    store = open_store(path)
    rows = store.rows
    for read in (
        lambda: (store.keys, store.reasons, store.labels, store.num_frames, store.fps),
        lambda: (store.container_frames, store.damaged_packets, store.status),
        lambda: (store.split("train"), store.frame_index(rows), store.pts(rows)),
        lambda: store.features(rows),
        lambda: [store.class_text(name) for name in store.prompt_sets],
    ):
        read()


# Other things in the place of files


def attempt(path: str) -> None:
    """Open, read and check; exit code 3 when nobody minds."""
    minded = 0
    for work in (lambda: read_all(Path(path)), lambda: verify_raises(Path(path))):
        try:
            work()
        except (UserError, WorkError):
            minded += 1
    raise SystemExit(0 if minded == 2 else 3)


def verify_raises(path: Path) -> None:
    if not verify(path).ok:
        raise WorkError("damaged")


@pytest.mark.parametrize(
    "name",
    ["key/c/1", "label/c/1", "pts/c/1/0/0", "chunk_checksum/c/1/0", "commit/c/1/0",
     "label/zarr.json", "zarr.json", f"{TEXTS}/zarr.json", f"{TEXTS}/c/0/0", "features/c/1/0/0/0"],
)  # fmt: skip
def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(store: Path, name: str) -> None:
    (store / name).unlink()
    os.mkfifo(store / name)
    process = multiprocessing.get_context("spawn").Process(target=attempt, args=(str(store),))
    process.start()
    process.join(60)
    try:
        assert process.exitcode == 0
    finally:
        process.kill()


def as_folder(path: Path, outside: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").touch()


def as_link(path: Path, outside: Path) -> None:
    path.rename(outside)
    path.symlink_to(outside)


def as_pipe(path: Path, outside: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def under_a_file(path: Path, outside: Path) -> None:
    if path.parent.name == "c":
        return as_folder(path, outside)  # a file there would hit all partitions
    path.unlink()
    path.parent.rmdir()
    path.parent.touch()
    return None


@pytest.mark.parametrize("name", ["label/c/1", "pts/c/1/0/0", "features/c/1/0/0/0", "commit/c/1/0"])
@pytest.mark.parametrize(
    "spoil", [as_folder, as_link, as_pipe, under_a_file], ids=lambda f: f.__name__
)
def test_another_thing_in_the_place_of_a_file_is_named_and_redone(
    store: Path, tmp_path: Path, name: str, spoil: Callable[[Path, Path], None]
) -> None:
    before = open_store(store).features(np.arange(8, 16))
    outside = tmp_path / "outside"
    spoil(store / name, outside)
    held = outside.read_bytes() if outside.exists() else b""
    assert [d.partition for d in verify(store).damaged] == [1]
    schema = open_store_schema(store)
    assert StoreWriter.open(store).pending() == [1]
    writer = StoreWriter.open(store)
    with writer.claim([1]):
        writer.write_partition(1, make_partition(schema, 1, 8, failed=(1,)))
    assert verify(store, deep=True).ok
    np.testing.assert_array_equal(open_store(store).features(np.arange(8, 16)), before)
    assert not held or outside.read_bytes() == held, "the link goes, not what it points to"


def open_store_schema(store: Path) -> StoreSchema:
    return StoreWriter.open(store).schema


@pytest.mark.parametrize("name", ["label/c", "label", "pts/c/1"])
def test_nothing_is_written_through_a_link(store: Path, tmp_path: Path, name: str) -> None:
    schema, outside = open_store_schema(store), tmp_path / "outside"
    shutil.rmtree(store / "commit/c/1")
    writer = StoreWriter.open(store)
    (store / name).rename(outside)
    (store / name).symlink_to(outside)
    held = {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="is a symbolic link"):
        writer.write_partition(1, make_partition(schema, 1, 8, seed=7))
    assert {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()} == held


def test_a_lock_that_is_a_link_is_refused(store: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    lock = store.with_name("s.zarr.lock")
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(WorkError, match="is a symbolic link"), StoreWriter.open(store).claim():
        pass
    assert victim.read_text() == "mine"


def test_a_note_that_is_no_file_is_refused(store: Path) -> None:
    os.mkfifo(note_path(store))
    from featstore.format.metadata import read_metadata
    from featstore.reading.chunk_files import ChunkFiles

    with pytest.raises(UserError, match=r"no regular file.*delete it"):
        DamageNote(ChunkFiles(store, read_metadata(store)))


# The quick check


@pytest.mark.parametrize("name", ["label/c/1", "pts/c/1/0/0", "checksum/c/1", "reason/c/1"])
@pytest.mark.parametrize("size", [0, 3, 2**33])
def test_the_quick_check_sees_sizes_of_all_files(store: Path, name: str, size: int) -> None:
    os.truncate(store / name, size)
    found = verify(store).damaged
    assert [d.partition for d in found] == [1]
    assert f"{name.partition('/')[0]} chunk has {size} bytes" in found[0].reason


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("chunk_checksum", "num_frames", "fum_frames"),
        ("pts", "seconds", "secondr"),
        ("status", '"failed": 2', '"failed": 3'),
        ("status", '"meaning"', '"keaning"'),
        ("class_text", '"group"', '"grouq"'),
    ],
)
def test_what_other_readers_are_told_is_checked(store: Path, name: str, old: str, new: str) -> None:
    """Open never looks at it, so features are right; verify says that it was changed."""
    path = store / name / "zarr.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    read_all(store)
    assert [d.partition for d in verify(store).damaged] == [f"{name}/zarr.json"]


def test_attributes_that_somebody_added_are_left_alone(store: Path) -> None:
    change(store / "label/zarr.json", lambda n: n["attributes"].update(note="checked by hand"))
    assert verify(store).ok


def test_numbers_that_no_writer_writes_are_found(tmp_path: Path) -> None:
    """A label outside the classes in a file whose checksums agree: a writer that is not ours."""
    path = tmp_path / "s.zarr"
    schema = StoreSchema.create(1, 4, 1, 2, 4)
    writer = init_store(path, schema, (4,))
    partition = make_partition(schema, 0, 4)
    object.__setattr__(writer, "metadata", replace(writer.metadata, class_names=("x",) * 99,
                                                   raw_class_names=("x",) * 99))  # fmt: skip
    writer.write_partition(0, replace(partition, label=np.array([0, 1, 2, 98], np.int32)))
    assert verify(path).ok
    assert "a label lies outside 0..2" in verify(path, deep=True).damaged[0].reason


# Class texts


def two_sets(path: Path) -> Path:
    """A store with the same sentences under two prompts, so that only the numbers differ."""

    def text(shift: int) -> ClassText:
        embeddings = np.zeros((len(CLASS_NAMES), 16), np.float32)
        embeddings[range(len(CLASS_NAMES)), np.arange(len(CLASS_NAMES)) + shift] = 1
        return ClassText(CLASS_NAMES, embeddings, "beef", ("a {}",), "0123456789abcdef" * 2)

    StoreWriter.init(
        path,
        StoreMetadata(
            StoreSchema.create(1, 4, 1, 2, 16),
            make_provenance(16),
            (TarEntry("a.tar", 1, 1, ""),),
            *(CLASS_NAMES, CLASS_NAMES, ("train",)),
        ),
        {"one": text(0), "two": text(5)},
    )
    return path


def test_swapped_class_texts_are_found(tmp_path: Path) -> None:
    """Both are unit rows of the same classes with a sound checksum behind them."""
    path = two_sets(tmp_path / "s.zarr")
    one, two = (path / "class_text" / name / "c/0/0" for name in ("one", "two"))
    swapped = two.read_bytes(), one.read_bytes()
    one.write_bytes(swapped[0])
    two.write_bytes(swapped[1])
    for name in ("one", "two"):
        with pytest.raises(WorkError, match=r"of other texts; remove .*store add-texts"):
            open_store(path).class_text(name)
    assert [d.partition for d in verify(path).damaged] == ["class_text/one", "class_text/two"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"a {}"', '"b {}"'),
        ('"templates"', '"tempmates"'),
        ('"beef"', '"beeg"'),
        ('"encoder_fingerprint"', '"encoder_fingerprinu"'),
        ('"checksum"', '"chfcksum"'),
        ('"embeddings_checksum"', '"embeddings_chfcksum"'),
    ],
)
def test_what_class_texts_say_of_themselves_has_a_checksum(
    tmp_path: Path, old: str, new: str
) -> None:
    path = two_sets(tmp_path / "s.zarr")
    node = path / "class_text/one/zarr.json"
    assert old in node.read_text()
    node.write_text(node.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=r"class_text/one of .* fail their checksum"):
        open_store(path).class_text("one")
    assert [d.partition for d in verify(path).damaged] == ["class_text/one"]
    assert open_store(path).class_text("two").templates == ("a {}",)


# Metadata


@pytest.mark.parametrize("value", [True, 24.0, "24", None, [24]])
def test_a_size_that_python_takes_for_equal_is_another(store: Path, value: object) -> None:
    """1, 1.0 and true are equal in Python and not to zarr."""
    shape = [value] if not isinstance(value, bool) else [24, True, 4, 16]
    name = "label" if len(shape) == 1 else "features"
    change(store / name / "zarr.json", lambda n: n.update(shape=shape))
    with pytest.raises(UserError, match=f"array {name} of .*: shape is"):
        open_store(store, mapped=False).features([0])


@pytest.mark.parametrize("levels", [40, 300, 900])
def test_deep_nesting_is_refused(store: Path, levels: int) -> None:
    nested: Any = "x"
    for _ in range(levels):
        nested = [nested]
    for name, edit in (
        ("label", lambda n: n.update(codecs=nested)),
        ("label", lambda n: n.update(nested=nested)),
    ):
        raw = (store / name / "zarr.json").read_bytes()
        node = json.loads(raw)
        edit(node)
        (store / name / "zarr.json").write_text(json.dumps(node))
        for work in (open_store, verify, StoreWriter.open):
            with pytest.raises(UserError, match=r"nested more than|is not valid JSON"):
                work(store)
        (store / name / "zarr.json").write_bytes(raw)
    text = (store / "zarr.json").read_text()
    deep = "[" * levels + "]" * levels
    (store / "zarr.json").write_text(
        text.replace('"preprocessing": {', f'"preprocessing": {{"x": {deep},')
    )
    with pytest.raises(UserError, match=r"nested more than|is not valid JSON"):
        open_store(store)


@pytest.mark.parametrize(
    "sizes",
    [
        {"capacity": 2**30, "chunk_rows": 1},
        {"capacity": MAX_CHUNKS + 1, "chunk_rows": 1},
        {"capacity": 2**28, "chunk_rows": 2**28},
        {"frames": 2**26},
        {"frames": MAX_CHUNK_BYTES},
        {"dim": 2**20, "views": 2**10},
    ],
)
def test_sizes_that_no_memory_holds_are_refused(store: Path, sizes: dict[str, int]) -> None:
    node = json.loads((store / "zarr.json").read_text())
    attributes = node["attributes"]
    attributes["schema"] |= sizes
    attributes["provenance"]["dim"] = attributes["schema"]["dim"]
    attributes["checksum"] = attributes_checksum(attributes)
    (store / "zarr.json").write_text(json.dumps(node))
    for work in (open_store, verify, StoreWriter.open):
        with pytest.raises(UserError, match="do not open a store from a source you do not trust"):
            work(store)


def test_half_a_letter_is_no_name(store: Path) -> None:
    """JSON can hold one, UTF-8 cannot: the store could not be copied."""
    change(store / "zarr.json", lambda n: n["attributes"].update(split_names=["\ud800", "val"]))
    with pytest.raises(UserError, match="is not valid JSON"):
        open_store(store)


# Texts that could not be read again


@pytest.mark.parametrize("text", ["k" * 4097, "é" * 2049, "\ud800"])
@pytest.mark.parametrize("field", ["key", "reason"])
def test_texts_that_could_not_be_read_again_are_not_written(
    tmp_path: Path, field: str, text: str
) -> None:
    path = tmp_path / "s.zarr"
    schema = StoreSchema.create(1, 1, 1, 2, 4)
    writer = init_store(path, schema, (1,))
    partition = make_partition(schema, 0, 1)
    writer.write_partition(0, partition)
    with pytest.raises(UserError, match="cannot be stored"):
        writer.write_partition(0, replace(partition, **{field: [text]}))
    assert open_store(path).keys == partition.key  # what was there stayed


def test_the_longest_texts_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    schema = StoreSchema.create(1, 2, 1, 2, 4)
    writer = init_store(path, schema, (2,))
    rng = np.random.default_rng(0)
    keys = ["".join(map(chr, rng.integers(32, 127, 4096))) for _ in range(2)]
    writer.write_partition(
        0, replace(make_partition(schema, 0, 2), key=keys, reason=["r" * 4096, ""])
    )
    store = open_store(path)
    assert (store.keys, store.remarks) == (keys, ["r" * 4096, ""])
    assert verify(path, deep=True).ok


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_files_that_are_closed_to_this_user_are_told(store: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        os.chmod(folder, 0o755)
    for name in ("commit/c", "label/c/1", "features/c/1/0/0/0", "class_text"):
        target = store / name
        mode = target.stat().st_mode
        os.chmod(target, 0)
        process = multiprocessing.get_context("fork").Process(
            target=attempt_as_nobody, args=(str(store),)
        )
        process.start()
        process.join(60)
        os.chmod(target, mode & 0o777)
        assert process.exitcode == 0, name


def attempt_as_nobody(path: str) -> None:
    os.setgid(65534)
    os.setuid(65534)
    attempt(path)


# Beside a writer


@pytest.mark.parametrize("storage", ["plain", "zstd"])
@pytest.mark.parametrize("moment", ["between two files", "afterwards"])
def test_a_partition_that_is_written_anew_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, moment: str
) -> None:
    """What was open tells to open again, not to delete what the writer has just made."""
    path = tmp_path / "s.zarr"
    schema = StoreSchema(
        2, 4, 1, 2, 4, chunk_rows=2, codec="none" if storage == "plain" else storage
    )
    writer = init_store(path, schema, (4, 4))
    for tar in (0, 1):
        writer.write_partition(tar, make_partition(schema, tar, 4))
    readers: list[Callable[[Any], object]] = [
        lambda store: store.features([4]),
        lambda store: store.read_into([4], np.empty((1, 1, 2, 4), np.float16)),
        lambda store: store.labels,
        lambda store: store.keys,
        lambda store: store.pts([4]),
    ]
    stores = [open_store(path) for _ in readers]
    for store in stores:
        store.features([0])
        assert len(store.status) == 8  # what was committed with it is known now
    if moment == "between two files":
        (path / "features/c/1/0/0/0").unlink()
        shutil.rmtree(path / "commit/c/1")
        (path / "label/c/1").unlink()
        (path / "key/c/1").unlink()
        (path / "pts/c/1/0/0").unlink()
    else:
        writer.write_partition(1, make_partition(schema, 1, 4, seed=1))
    told = []
    for store, read in zip(stores, readers, strict=True):
        try:
            read(store)
        except WorkError as error:
            told.append(str(error))
    message = "was written anew while it was being read"
    assert all(message in text for text in told), told
    assert len(told) == 5 if moment == "between two files" else len(told) >= 2
    if moment == "afterwards":
        with pytest.raises(WorkError, match="written anew"):
            stores[0].features([4])
