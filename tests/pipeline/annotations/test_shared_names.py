"""Files that differ only in extension or letter case: all kept, each with a key of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import UserError
from pipeline.annotations.known_sets import read_listing
from pipeline.annotations.listing import Listing, ListingBuilder, key_from_name, name_from_key
from pipeline.annotations.video_folder import path_stem
from pipeline.tars.dataset import load_dataset
from pipeline.tars.packing import pack
from tests.support.worlds.tiny_world import make_clip


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"video")
    return folder


def keys(listing: Listing) -> dict[str, str]:
    return {record.path: name_from_key(record.key) for record in listing.records}


def test_extensions_case_and_dots(tmp_path: Path) -> None:
    names = ("a/test.avi", "a/test.mp4", "a/test.mkv", "a/Test.mp4", "a/a.b.mp4", "b/test.mp4")
    listing = read_listing("own", touch(tmp_path, *names))
    assert keys(listing) == {
        "a/test.avi": "a/test.avi",
        "a/test.mp4": "a/test.mp4",
        "a/test.mkv": "a/test.mkv",
        "a/Test.mp4": "a/Test",
        "a/a.b.mp4": "a/a.b",
        "b/test.mp4": "b/test",
    }
    assert any("3 videos have a name in common with another file" in n for n in listing.notes)
    assert all("." not in record.key for record in listing.records)


def test_a_whole_name_that_is_the_key_of_a_third_file(tmp_path: Path) -> None:
    names = ("c/a.mp4", "c/a.avi", "c/a.mp4.avi", "c/a.mp4.avi.mkv", "c/b.mp4")
    found = keys(read_listing("own", touch(tmp_path, *names)))
    assert found == {**{name: name for name in names[:4]}, "c/b.mp4": "c/b"}


NAMES = st.from_regex(r"[aA]{1,2}(\.[ab])?(\.(mp4|avi|MP4|mkv)){1,3}", fullmatch=True)


@given(st.lists(NAMES, unique=True, min_size=1))
def test_every_file_is_kept_under_one_key(names: list[str]) -> None:
    builder = ListingBuilder()
    for name in names:
        builder.add(path_stem(name), source=name, class_name="c", path=name)
    listing = builder.build()
    assert sorted(record.path for record in listing.records) == sorted(names)
    assert len({record.key for record in listing.records}) == len(names)
    stems = [path_stem(name) for name in names]
    for record in listing.records:  # a file that shares its name with none keeps its old key
        if stems.count(path_stem(record.path)) == 1 and path_stem(record.path) not in names:
            assert record.key == key_from_name(path_stem(record.path))


def test_a_list_means_the_file_of_its_letter_case(tmp_path: Path) -> None:
    folder = touch(tmp_path / "v", "a/Run.mp4", "a/run.mp4", "a/jump.mp4", "a/jump.avi")
    listed = tmp_path / "list.txt"
    listed.write_text("a/Run x\na/run y\na/jump.mp4 x\na/jump.avi y\n")
    listing = read_listing("own", folder, listed)
    assert {r.path: r.class_name for r in listing.records} == {
        "a/Run.mp4": "x",
        "a/run.mp4": "y",
        "a/jump.mp4": "x",
        "a/jump.avi": "y",
    }
    assert not listing.missing


def test_what_cannot_be_kept_is_named_all_at_once(tmp_path: Path) -> None:
    folder = touch(tmp_path / "v", *(f"a/{number}.mp4" for number in range(8)))
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"a/{n}.mp4 x\na/{n}.mp4 y\n" for n in range(8)))
    with pytest.raises(UserError) as told:
        read_listing("own", folder, listed)
    for number in range(5):
        assert f"'a/{number}.mp4' is listed with two classes, 'x' and 'y'" in str(told.value)
    assert "and 3 more" in str(told.value)
    touch(tmp_path / "w", "AbCd/1.mp4", "ab cd/1.mp4", "EfGh/1.mp4", "ef gh/1.mp4")
    with pytest.raises(UserError, match=r"'AbCd' and 'ab cd' read the same .*'EfGh' and 'ef gh'"):
        read_listing("own", tmp_path / "w")


def test_a_file_added_beside_one_of_its_name_changes_no_key(tmp_path: Path) -> None:
    videos, packed = tmp_path / "videos", tmp_path / "packed"
    make_clip(videos / "a/test.mp4", 0)
    make_clip(videos / "b/other.mp4", 1)
    pack(videos, "own", packed)
    assert set(load_dataset(packed).tars[0].failed) == set()
    tar = load_dataset(packed).tars[0]
    make_clip(videos / "a/test.avi", 2)
    with pytest.raises(UserError, match=r"1 video added \(e.g. 'a/test.avi'\); .*--append"):
        pack(videos, "own", packed)
    summary = pack(videos, "own", packed, append=True)
    assert (summary.videos_packed, summary.shards_written) == (3, 1)
    assert load_dataset(packed).tars[0] == tar  # byte for byte
    assert pack(videos, "own", packed).shards_written == 0


def test_folders_without_end(tmp_path: Path) -> None:
    folder = tmp_path
    for _ in range(100):
        folder /= "a"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="more than 64 folders deep"):
        read_listing("own", tmp_path)
