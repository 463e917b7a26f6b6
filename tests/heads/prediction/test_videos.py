"""Which videos a user means with files, folders, globs and lists."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
from pathlib import Path

import pytest

from featstore.errors import UserError
from heads.prediction.request import PredictionRequest
from heads.prediction.videos import find_videos


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with files that only have the names of videos."""
    for name in (
        "a.mp4",
        "in/b.AVI",
        "in/deep/c.mkv",
        "in/notes.txt",
        "in/.hidden.mp4",
        "d [1].mp4",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def there(*words: str | Path, lists: tuple[str, ...] = ()) -> list[str]:
    """The paths that are found without a problem."""
    return [video.path for video in find_videos(words, lists) if not video.problem]


@pytest.mark.parametrize(
    ("word", "paths"),
    [
        ("a.mp4", ["a.mp4"]),
        ("in/notes.txt", ["in/notes.txt"]),  # named itself: the decoder says what it is
        ("in", ["in/b.AVI", "in/deep/c.mkv"]),
        (".", ["a.mp4", "d [1].mp4", "in/b.AVI", "in/deep/c.mkv"]),
        ("*.mp4", ["a.mp4", "d [1].mp4"]),
        ("in/*", ["in/b.AVI", "in/deep/c.mkv"]),  # a folder that fits is taken whole
        ("**/*.mkv", ["in/deep/c.mkv"]),
        ("i*/**", ["in/b.AVI", "in/deep/c.mkv"]),
        ("d [1].mp4", ["d [1].mp4"]),  # a file with this name comes before the pattern
    ],
)
@pytest.mark.usefixtures("folder")
def test_a_word(word: str, paths: list[str]) -> None:
    assert sorted(there(word)) == paths


def test_each_video_once_and_the_others_are_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        paths = there("a.mp4", "./a.mp4", folder / "a.mp4", "in", "in/deep")
    assert paths == ["a.mp4", "in/b.AVI", "in/deep/c.mkv"]
    assert "predicted once: 3 videos (a.mp4, " in caplog.text


def test_a_link_to_a_video_is_a_video(folder: Path) -> None:
    (folder / "link.mp4").symlink_to("a.mp4")
    (folder / "same").symlink_to("in")
    assert there("a.mp4", "link.mp4", "in", "same") == [
        *("a.mp4", "link.mp4", "in/b.AVI", "in/deep/c.mkv")
    ]


@pytest.mark.usefixtures("folder")
def test_what_names_no_video_is_listed_and_stops_nothing() -> None:
    os.mkfifo("pipe.mp4")
    words = ("no.mp4", "empty", "in/*.txt", "no*.mp4", "pipe.mp4", "a\0b", "a.mp4", "no.mp4")
    problems = {video.path: video.problem for video in find_videos(words)}
    assert list(problems) == list(words[:-1])
    assert problems.pop("a.mp4") == ""
    parts = ("does not exist", "a folder without videos (mp4", "fits 1 files, none with the name")
    for part, told in zip(
        (*parts, "fits no file", "is no file and no folder", "does not exist"),
        problems.values(),
        strict=True,
    ):
        assert part in told
    os.mkfifo("in/pipe.mp4")  # nobody will ever write into it
    inside = {video.path: video.problem for video in find_videos(["in"])}
    assert inside == {**dict.fromkeys(inside, ""), "in/pipe.mp4": "is no file and no folder"}
    with pytest.raises(UserError, match=r"^no.mp4 does not exist, and 1 more name no video"):
        find_videos(("no.mp4", "empty"))
    with pytest.raises(UserError, match="no video is named"):
        find_videos(())


LISTS = {
    "lines": "a.mp4\n\n  in/b.AVI  \r\n",
    "names with commas": "d [1].mp4\nin/b.AVI\n",
    "csv": 'label,path\n"x, y",a.mp4\nz,"in/b.AVI"\n',
    "semicolons": "Video;label\na.mp4;x\nin/b.AVI;\n",
    "tabs": "path\tlabel\na.mp4\tx\nin/b.AVI\ty\n",
    "objects": '{"path": "a.mp4", "label": 1}\n{"path": "in/b.AVI"}\n',
    "other key": '{"video": "a.mp4"}\n{"Video": "in/b.AVI"}\n',
    "texts": '"a.mp4"\n"in/b.AVI"\n',
    "find -print0": "a.mp4\0in/b.AVI\0",
    "byte order mark": "\ufeffa.mp4\nin/b.AVI\n",
    "defused": "path\na.mp4\n'=no.mp4\nin/b.AVI\n",
}


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS.keys())
def test_a_list(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [text.split("\n")[0] if "[1]" in text else "a.mp4", "in/b.AVI"]
    (folder / "list").write_text(text)
    assert there(lists=("list",)) == wanted
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert there("-") == wanted


def test_paths_of_a_list_may_start_at_the_list(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "in/list.csv").write_text("path\ndeep/c.mkv\na.mp4\n")
    assert there(lists=("in/list.csv",)) == ["in/deep/c.mkv", "a.mp4"]
    monkeypatch.chdir(folder / "empty")
    assert there(lists=("../in/list.csv",)) == ["../in/deep/c.mkv"]


def test_a_name_that_is_no_text_is_found(folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    (folder / name).write_bytes(b"x")
    (folder / "list").write_bytes(b"caf\xe9.mp4\n")
    assert there(lists=("list",)) == [name]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "lists no videos"),
        ('{"path": 3}\n', "line 1 names no path"),
        ('{"path": "a.mp4"}\n{"path": \n', "line 2 is not JSON"),
        (f'{{"path": {"[" * 100_000}\n', "line 1 is not JSON"),
        ("label,path\nx\n", "row 2 has no column 'path'"),
    ],
)
def test_a_list_that_cannot_be_read(content: str, words: str, folder: Path) -> None:
    (folder / "list").write_text(content)
    with pytest.raises(UserError, match=words):
        find_videos((), ("list",))
    with pytest.raises(UserError, match="cannot be read"):
        find_videos((), ("no list",))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("seconds", [math.inf, math.nan, 0.0, -1.0])
def test_a_window_has_a_length(seconds: float) -> None:
    with pytest.raises(UserError, match="is no length: name its seconds"):
        PredictionRequest(find_videos(["a.mp4"]), window=seconds)


def test_predictions_are_a_list_of_videos(folder: Path) -> None:
    (folder / "out.jsonl").write_text(json.dumps({"path": "a.mp4", "predictions": []}) + "\n")
    assert there(lists=("out.jsonl",)) == ["a.mp4"]
