"""What the decoder takes is taken, and what is left out is counted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.annotations.file_signs import looks_like_video
from pipeline.annotations.known_sets import read_listing
from pipeline.annotations.tables import TABLES
from pipeline.tars.dataset import load_dataset
from pipeline.tars.packing import pack
from tests.support.worlds.foreign_tars import clip, take, webdataset_tar
from tests.support.worlds.media import make_video

MPEG4 = {"codec": "mpeg4"}
FORMATS: dict[str, dict[str, object]] = {
    "asf": {**MPEG4, "container": "asf"},
    "3g2": {"container": "3g2"},
    "f4v": {"container": "f4v"},
    "gif": {"codec": "gif", "container": "gif", "pixel_format": "rgb8"},
    "y4m": {"codec": "rawvideo", "container": "yuv4mpegpipe"},
    "qt": {**MPEG4, "container": "mov"},
    "mxf": {"codec": "mpeg2video", "container": "mxf"},
    "m2v": {"codec": "mpeg2video", "container": "mpeg2video"},
    "ogm": {"codec": "libvpx", "container": "ogg"},
    "divx": {**MPEG4, "container": "avi"},
    "m2t": {"codec": "mpeg2video", "container": "mpegts"},
    "nut": {**MPEG4, "container": "nut"},
    "dv": {
        **{"codec": "dvvideo", "container": "dv", "width": 720, "height": 576},
        "pixel_format": "yuv420p",
    },
    "mp4": {},
    "mkv": {"container": "matroska"},
    "flv": {"codec": "flv1", "container": "flv"},
    "mpg": {"codec": "mpeg1video", "container": "mpeg"},
    "avi": {**MPEG4, "container": "avi"},
}
UNNAMED = ("gif", "asf", "y4m", "qt", "mxf", "nut", "mp4", "mkv", "flv", "mpg", "avi", "m2t", "m2v")


def encoded(end: str) -> bytes:
    return make_video(frames=8, **FORMATS[end])  # type: ignore[arg-type]


def test_every_further_extension_is_tried() -> None:
    assert set(TABLES["videos"]["further"]) <= set(FORMATS)


def test_what_the_decoder_takes_is_taken(tmp_path: Path) -> None:
    for end in FORMATS:
        (tmp_path / "v" / end).mkdir(parents=True)
        (tmp_path / "v" / end / f"x.{end}").write_bytes(encoded(end))
    for end in UNNAMED:
        (tmp_path / "v" / end / "unnamed").write_bytes(encoded(end))
    summary = pack(tmp_path / "v", "own", tmp_path / "packed")
    assert summary.failures == ()
    assert summary.videos_packed == len(FORMATS) + len(UNNAMED)
    assert summary.left_out.line == ""


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "v"
    (folder / "run").mkdir(parents=True)
    (folder / "run/a.mp4").write_bytes(clip(1))
    (folder / "sit").mkdir()
    (folder / "sit/b.mp4").write_bytes(clip(2))
    for name in ("run/a.jpg", "run/b.JPG", "run/README", "notes.txt", "run/empty"):
        (folder / name).write_bytes(b"no video" * (name != "run/empty"))
    (folder / ".DS_Store").write_bytes(b"")
    (folder / "run/._a.mp4").write_bytes(b"")
    (folder / "run/nothing").mkdir()
    (folder / "run/loop").symlink_to("..", target_is_directory=True)
    (folder / "run/linked.mp4").symlink_to("../sit/b.mp4")
    (folder / "run/self.mp4").symlink_to("self.mp4")
    (folder / "run/gone.mp4").symlink_to("nowhere.mp4")
    os.mkfifo(folder / "run/pipe")
    (folder / "loose.mp4").write_bytes(clip(3))
    summary = pack(folder, "own", tmp_path / "packed", max_failures=1)
    assert summary.to_json()["left_out"] == {
        "files": {"": 3, "jpg": 2, "txt": 1},
        "hidden": 2,
        "links": 1,
        "loops": 1,
        "empty": 1,
        "unclassed": 1,
        "unlisted": 0,
    }
    line = summary.left_out.line
    assert "files that are no videos: 3 without extension, 2 .jpg, 1 .txt" in line
    assert "links back to a folder around them: 1 (first: 'run/loop')" in line
    assert "empty folders: 1 (first: 'run/nothing')" in line
    assert (summary.videos_packed, summary.videos_failed) == (3, 2)
    reasons = {v["key"]: v["reason"] for v in summary.failures}
    assert "symbolic links" in reasons["run%2Fself"]
    assert "No such file" in reasons["run%2Fgone"]
    assert load_dataset(tmp_path / "packed").raw_class_names == ("run", "sit")
    (tmp_path / "list.txt").write_text("run/a.mp4 0\n")
    listing = read_listing("own", folder, tmp_path / "list.txt")
    assert listing.left_out.unlisted == 5


def test_previews_in_tars_do_not_count_beside_a_video(tmp_path: Path) -> None:
    samples = [
        {"__key__": "both", "mp4": clip(1), "gif": encoded("gif"), "cls": b"a"},
        {"__key__": "gif", "gif": encoded("gif"), "cls": b"a"},
        {"__key__": "odd", "bin": clip(2), "jpg": b"GIF89a", "cls": b"b"},
        {"__key__": "none", "bin": b"no video", "cls": b"b"},
    ]
    tar = webdataset_tar(tmp_path / "x.tar", samples)
    summary, dataset = take(tmp_path / "out", tar)
    assert (summary.videos_packed, summary.videos_failed) == (3, 1)
    assert summary.failures[0]["reason"] == "it has no video (members: bin, cls)"
    assert dataset.tars[0].samples == 3


@pytest.mark.parametrize(
    "beginning",
    [b"", b"G", b"MIT License\n" * 99, b"\x89PNG\r\n", b"%PDF-1.7", b"\x7fELF", b"PK\x03\x04"],
)
def test_other_files_do_not_look_like_videos(beginning: bytes) -> None:
    assert not looks_like_video(beginning)
    assert not looks_like_video(b"\0\0\0\x18ftypheic")
    assert not looks_like_video(b"RIFF\0\0\0\0WAVE")
