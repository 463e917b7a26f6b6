"""Which reader a folder gets, what is logged, and what is refused before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from featstore.errors import UserError
from pipeline.annotations.known_sets import KNOWN_DATASETS, read_listing


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"video")
    return folder


def test_known_sets_have_their_numbers_of_classes() -> None:
    assert {name: known.classes for name, known in KNOWN_DATASETS.items()} == {
        "k400": 400,
        "k600": 600,
        "k700": 700,
        "hmdb51": 51,
        "ucf101": 101,
        "ssv2": 174,
        "charades": 157,
        "multithumos": 65,
    }


def test_rows_and_share_are_logged_before_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    touch(tmp_path / "v", *(f"{number}.mp4" for number in range(4)))
    lines = "".join(f"{number}.mp4,run,train\n" for number in range(5))
    (tmp_path / "list.csv").write_text(lines)
    read_listing("own", tmp_path / "v", tmp_path / "list.csv")
    shown = [record.getMessage() for record in caplog.records]
    assert shown[:3] == [f"read: {n}.mp4 -> class 'run', splits train" for n in range(3)]
    assert shown[3] == "4 of 5 listed videos were found (80.0 %), 1 class, splits: train"


def test_any_name_goes_with_any_format(tmp_path: Path) -> None:
    touch(tmp_path / "v", "AAAAAAAAAAA_000001_000011.mp4", "x.avi")
    csv = tmp_path / "mine.csv"
    csv.write_text("label,youtube_id,time_start,time_end,split\nrun,AAAAAAAAAAA,1,11,val\n")
    listing = read_listing("my-kinetics", tmp_path / "v", csv)
    assert listing.split_names == ["val"]
    assert "1 video file in the folder is not listed and not used" in listing.notes
    (tmp_path / "k400_val.txt").write_text("x.avi 3\n")
    as_list = read_listing("k400", tmp_path / "v", tmp_path / "k400_val.txt")
    assert [record.path for record in as_list.records] == ["x.avi"]


def test_archives_unpacked_with_their_folders(tmp_path: Path) -> None:
    touch(tmp_path / "v", "a.avi")
    lists = tmp_path / "archive/inner/testTrainMulti_7030_splits"
    lists.mkdir(parents=True)
    (lists / "run_test_split1.txt").write_text("a.avi 1 \n")
    listing = read_listing("hmdb51", tmp_path / "v", tmp_path / "archive")
    assert listing.records[0].splits == ("train1",)


def test_missing_inputs_are_one_line_errors(tmp_path: Path) -> None:
    touch(tmp_path, "v/a/1.mp4", "file.mp4")
    (tmp_path / "nothing").mkdir()
    for videos, lists, names, message in (
        (tmp_path / "none", None, None, "does not exist"),
        (tmp_path / "file.mp4", None, None, "is not a folder"),
        (tmp_path / "v", tmp_path / "none.csv", None, "do not exist"),
        (tmp_path / "v", tmp_path / "nothing", None, "no annotation files of a known format"),
        (tmp_path / "v", None, tmp_path / "none.csv", "does not exist"),
        (tmp_path / "v", None, tmp_path / "file.mp4", "brings its own"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_listing("own", videos, lists, names)
        assert "\n" not in str(caught.value)


def test_unreadable_folder_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/1.mp4", "locked/2.mp4")
    real = os.scandir

    # Permissions do not bind the root user, who may run this test.
    def scandir(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot read folder .*locked.*Permission denied"):
        read_listing("own", tmp_path)
