"""Damaged and hostile stores: each a clear error, never zeros, never wrong numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from featstore import StoreWriter, UserError, WorkError, open_store, verify
from featstore.format.metadata import (
    ARRAY_METADATA_LIMIT,
    GROUP_METADATA_LIMIT,
    attributes_checksum,
)
from tests.support.stores.sample_stores import make_store

SHARD = "features/c/1/0/0/0"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two partitions of 8 rows, four inner chunks of 2 rows each in a shard."""
    path = tmp_path / "s.zarr"
    make_store(path, rows=(8, 8, 3))
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [Path.unlink, truncate, empty], ids=lambda f: f.__name__)
def test_lost_shard_is_an_error_and_redone(store: Path, damage: Callable[[Path], None]) -> None:
    already_open = {mapped: open_store(store, mapped=mapped) for mapped in (True, False)}
    damage(store / SHARD)
    with pytest.raises(WorkError, match=r"partition 1 .*features shard .*mote-cli extract"):
        open_store(store)
    for reader in already_open.values():
        with pytest.raises(WorkError, match="partition 1"):
            reader.features([8])
        assert np.isfinite(reader.features([0, 16])).all()
    report = verify(store)
    assert not report.ok
    assert [d.partition for d in report.damaged] == [1]
    assert StoreWriter.open(store).pending() == [1]


@pytest.mark.parametrize("name", ["key", "label", "status", "splits", "pts", "checksum"])
@pytest.mark.parametrize("damage", [Path.unlink, truncate, empty], ids=lambda f: f.__name__)
def test_lost_small_chunk_is_an_error(
    store: Path, name: str, damage: Callable[[Path], None]
) -> None:
    path = next(p for p in (store / name / "c" / "1", store / name / "c/1/0/0") if p.is_file())
    damage(path)
    reader = open_store(store)
    read: dict[str, Callable[[], Any]] = {
        "key": lambda: reader.keys,
        "label": lambda: reader.labels,
        "status": lambda: reader.status,
        "splits": lambda: reader.split("train"),
        "pts": lambda: reader.pts([8]),
        "checksum": lambda: reader.features([8]),
    }
    with pytest.raises(WorkError, match=rf"partition 1 .*{name} chunk"):
        read[name]()
    assert [d.partition for d in verify(store, deep=True).damaged] == [1]


def test_a_flipped_bit_anywhere_is_found(store: Path) -> None:
    """Every file of a partition, first, middle and last byte: deep verification names it."""
    files = [
        f
        for f in store.rglob("*")
        if f.is_file() and f.name != "zarr.json" and f.relative_to(store).parts[2] == "1"
    ]
    assert len(files) == 15
    for path in files:
        size = path.stat().st_size
        for at in (0, size // 2, size - 1):
            flip(path, at)
            damaged = verify(store, deep=True).damaged
            assert [d.partition for d in damaged] == [1], (path, at)
            flip(path, at)
    assert verify(store, deep=True).ok


@pytest.mark.parametrize("mapped", [True, False])
def test_reading_a_flipped_row_is_an_error_and_the_others_are_right(
    store: Path, mapped: bool
) -> None:
    before = open_store(store).features(np.arange(16))
    flip(store / SHARD, 2 * 4 * 16 * 2 * 3 + 5)  # inside row 3 of partition 1
    reader = open_store(store, mapped=mapped)
    with pytest.raises(WorkError, match="partition 1"):
        reader.features(np.arange(16))
    np.testing.assert_array_equal(reader.features(np.arange(8)), before[:8])
    with pytest.raises(WorkError, match="partition 1"):
        reader.features([11])


def test_swapped_shards_are_found(store: Path) -> None:
    """Chunk checksums agree; the rows' own checksums do not."""
    other = store / "features/c/0/0/0/0"
    a, b = (store / SHARD).read_bytes(), other.read_bytes()
    (store / SHARD).write_bytes(b)
    other.write_bytes(a)
    assert verify(store).ok
    assert [d.partition for d in verify(store, deep=True).damaged] == [0, 1]
    with pytest.raises(WorkError, match="fail their checksum"):
        open_store(store).features([0])


def test_swapped_labels_are_found(store: Path) -> None:
    shutil.copy(store / "label/c/0", store / "label/c/1")
    with pytest.raises(WorkError, match="label chunk is not the one that was committed"):
        _ = open_store(store).labels


def test_damaged_commit_entry(store: Path) -> None:
    flip(store / "commit/c/1/0", 3)
    with pytest.raises(WorkError, match=r"partition 1 .*commit chunk fails its checksum"):
        open_store(store)
    assert StoreWriter.open(store).pending() == [1]
    assert [d.partition for d in verify(store).damaged] == [1]


def test_the_remedy_of_the_message_works(store: Path) -> None:
    flip(store / SHARD, 40)
    with pytest.raises(WorkError) as told:
        open_store(store).features([8])
    shutil.rmtree(str(told.value).split("delete ")[1].split(" and run")[0])
    assert StoreWriter.open(store).pending() == [1]
    assert list(open_store(store).partitions()) == [0, 2]


def test_damaged_class_text(store: Path) -> None:
    flip(store / "class_text/mote28/c/0/0", 3)
    with pytest.raises(WorkError, match="class texts 'mote28'"):
        open_store(store).class_text("mote28")
    assert [d.partition for d in verify(store).damaged] == ["class_text/mote28"]


def test_a_long_text_is_refused_before_it_is_unpacked(store: Path) -> None:
    """A few bytes of Zstandard that announce a gigabyte."""
    bomb = b"\x28\xb5\x2f\xfd\xa0" + (2**30).to_bytes(4, "little") + b"\x01\x00\x00"
    from featstore.format.checksums import crc32c

    (store / "key/c/0").write_bytes(bomb + crc32c(bomb).to_bytes(4, "little"))
    digests = np.frombuffer((store / "chunk_checksum/c/0/0").read_bytes()[:-4], "<u4").copy()
    digests[0] = crc32c(bomb)
    body = digests.tobytes()
    (store / "chunk_checksum/c/0/0").write_bytes(body + crc32c(body).to_bytes(4, "little"))
    with pytest.raises(WorkError, match="key chunk announces an impossible length"):
        _ = open_store(store).keys


# Metadata


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    node = json.loads(path.read_text())
    edit(node)
    if "checksum" in node["attributes"]:  # as a writer that means it would leave it
        node["attributes"]["checksum"] = attributes_checksum(node["attributes"])
    path.write_text(json.dumps(node))


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder.*mote-cli extract"):
        open_store(tmp_path / "nothing.zarr")
    with pytest.raises(UserError, match=r"has no zarr.json"):
        open_store(tmp_path)


def test_another_zarr_group(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "g.zarr")
    with pytest.raises(UserError, match="a Zarr group but not a feature store"):
        open_store(tmp_path / "g.zarr")
    zarr.create_array(tmp_path / "a.zarr", shape=(3,), dtype="int32")
    with pytest.raises(UserError, match="a Zarr array, not a feature store"):
        open_store(tmp_path / "a.zarr")


def test_v2_store_with_a_pickle_filter(tmp_path: Path) -> None:
    path = tmp_path / "v2.zarr"
    (path / "key").mkdir(parents=True)
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    array = {
        "zarr_format": 2,
        "shape": [1],
        "chunks": [1],
        "dtype": "|O",
        "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}],
        "compressor": None,
        "fill_value": None,
        "order": "C",
    }
    (path / "key" / ".zarray").write_text(json.dumps(array))
    for act in (open_store, verify, StoreWriter.open):
        with pytest.raises(UserError, match="is a Zarr v2 store: only v3 is read"):
            act(path)


def test_newer_version_names_the_remedy(store: Path) -> None:
    change(store / "zarr.json", lambda n: n["attributes"].update(format_version=3))
    with pytest.raises(UserError, match=r"version 3, this mote reads up to 2: install a newer"):
        open_store(store)


@pytest.mark.parametrize(
    ("name", "limit"),
    [("zarr.json", GROUP_METADATA_LIMIT), ("key/zarr.json", ARRAY_METADATA_LIMIT)],
)
def test_oversize_metadata(store: Path, name: str, limit: int) -> None:
    with open(store / name, "ab") as file:
        file.write(b" " * limit)
    with pytest.raises(UserError, match=f"larger than {limit} bytes"):
        open_store(store)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", '{"zarr_format": 2}', "\xff"])
def test_metadata_that_is_none(store: Path, text: str) -> None:
    (store / "label/zarr.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"zarr.json is not"):
        open_store(store)


@pytest.mark.parametrize(
    ("array", "field", "value"),
    [
        ("features", "shape", [10**15, 2, 4, 16]),
        ("features", "data_type", "float32"),
        ("features", "codecs", [{"name": "bytes", "configuration": {"endian": "little"}}]),
        ("label", "chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [1]}}),
        ("key", "codecs", [{"name": "numcodecs.pickle", "configuration": {}}]),
        ("pts", "fill_value", 0.0),
        ("commit", "storage_transformers", [{"name": "x"}]),
        ("status", "chunk_key_encoding", {"name": "v2"}),
        ("status", "dimension_names", ["rows"]),
    ],
)
def test_array_that_is_not_of_the_format(
    store: Path, array: str, field: str, value: object
) -> None:
    change(store / array / "zarr.json", lambda n: n.update({field: value}))
    with pytest.raises(UserError, match=f"array {array} of .*: {field} is"):
        open_store(store)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("brush hair", "brush hais"),
        ("100.0", "108.0"),
        ("toy-000001", "toy-000003"),
        ("val", "vam"),
    ],
)
def test_attributes_have_a_checksum(store: Path, old: str, new: str) -> None:
    """One bit of a name or a number, in JSON that is still valid."""
    path = store / "zarr.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=r"attributes of .* fail their checksum"):
        open_store(store)


def test_class_texts_of_other_classes(store: Path) -> None:
    path = store / "class_text/mote28/zarr.json"
    path.write_text(path.read_text().replace("brush hair", "brush hais"))
    with pytest.raises(UserError, match="fail their checksum"):
        open_store(store).class_text("mote28")
    earlier = json.loads(path.read_text())
    for name in ("checksum", "embeddings_checksum"):  # which earlier stores lack
        del earlier["attributes"][name]
    path.write_text(json.dumps(earlier))
    with pytest.raises(WorkError, match="class names are not those of the store"):
        open_store(store).class_text("mote28")
    assert [d.partition for d in verify(store).damaged] == ["class_text/mote28"]


def test_missing_array(store: Path) -> None:
    (store / "pts/zarr.json").unlink()
    with pytest.raises(UserError, match="not a complete feature store"):
        open_store(store)


@pytest.mark.parametrize(
    "attributes",
    [
        {"schema": {"tars": 2}},
        {"schema": None},
        {"tars": []},
        {"tars": [{"file": "a"}] * 3},
        {"tars": [{"file": "a", "rows": 9, "bytes": 1, "sha256": ""}] * 3},
        {"class_names": "abc"},
        {"class_names": [1, 2, 3]},
        {"class_names": []},
        {"split_names": [str(i) for i in range(33)]},
        {"provenance": {"encoder": "x"}},
        {"format_version": "1"},
    ],
)
def test_attributes_that_do_not_fit(store: Path, attributes: dict[str, Any]) -> None:
    change(store / "zarr.json", lambda n: n["attributes"].update(attributes))
    with pytest.raises(UserError):
        open_store(store)


def test_metadata_bomb(tmp_path: Path) -> None:
    """Metadata that agrees with itself and speaks of more rows than any memory holds."""
    from featstore import StoreSchema
    from featstore.format.metadata import array_nodes, read_metadata

    make_store(tmp_path / "s.zarr", row_shape=(1, 1, 1))
    node = json.loads((tmp_path / "s.zarr/zarr.json").read_text())
    node["attributes"]["schema"] |= {"capacity": 2**30, "chunk_rows": 2**29}
    node["attributes"]["checksum"] = attributes_checksum(node["attributes"])
    (tmp_path / "s.zarr/zarr.json").write_text(json.dumps(node))
    schema = StoreSchema(**node["attributes"]["schema"])
    for name, spec in schema.arrays().items():
        (tmp_path / "s.zarr" / name / "zarr.json").write_text(json.dumps(spec.metadata()))
    assert array_nodes(read_metadata(tmp_path / "s.zarr"))
    with pytest.raises(UserError, match="do not open a store from a source you do not trust"):
        open_store(tmp_path / "s.zarr")


@pytest.mark.parametrize("name", ["features/c/1/0/0/0", "features/c", "label/zarr.json", "label"])
def test_symbolic_links_inside_are_refused(store: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (store / name).rename(outside)
    (store / name).symlink_to(outside)
    if name == "features/c/1/0/0/0":
        assert "symbolic link" in verify(store).damaged[0].reason
    with pytest.raises(UserError, match="is a symbolic link"):
        open_store(store)


def test_the_store_itself_may_be_reached_through_a_link(store: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.zarr"
    link.symlink_to(store)
    assert len(open_store(link)) == 19
    assert np.isfinite(open_store(link, mapped=False).features([0])).all()


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a" * 200])
def test_prompt_set_names_are_checked(tmp_path: Path, name: str) -> None:
    from featstore.format.metadata import check_prompt_set

    with pytest.raises(UserError, match="no name for a prompt set"):
        check_prompt_set(name)
