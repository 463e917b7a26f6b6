"""The path of every video of a packed data set, from whatever packing left behind."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from pipeline.tars.packing import pack
from pipeline.tars.paths import video_paths
from tests.support.worlds.foreign_tars import clip, take, webdataset_tar
from tests.support.worlds.media import make_video


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, set[str]]:
    """A packed data set of six videos, one of which failed, and their paths."""
    videos = tmp_path / "videos"
    names = {f"{label} {n}.mp4": label for label in ("höhe", "b") for n in range(3)}
    for name, label in names.items():
        make_video(videos / label / name, frames=3, width=32, height=32)
    (videos / "b/b 1.mp4").write_bytes(b"nothing")
    pack(videos, "clips", tmp_path / "clips", samples_per_shard=3, max_failures=1, workers=1)
    return tmp_path / "clips", {f"{label}/{name}" for name, label in names.items()}


def test_paths_from_the_plan_and_without_it(packed: tuple[Path, set[str]]) -> None:
    folder, expected = packed
    paths = video_paths(folder)
    assert set(paths.values()) == expected
    assert len(paths) == 6
    shutil.rmtree(folder / ".packing")  # a copy of the data set may lack it
    assert video_paths(folder) == paths
    assert video_paths(folder.parent / "elsewhere") == {}


def test_a_damaged_tar_costs_its_own_paths_only(
    packed: tuple[Path, set[str]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = packed
    paths = video_paths(folder)
    (folder / ".packing/plan.json").write_text("{")
    first, *_ = sorted((folder / "shards").glob("*.tar"))
    first.write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        found = video_paths(folder)
    assert 0 < len(found) < len(paths)
    assert found.items() <= paths.items()
    assert "paths are left out" in caplog.text
    assert first.name in caplog.text


def test_a_member_is_the_path_in_a_tar_that_lies_elsewhere(tmp_path: Path) -> None:
    samples = [
        {"__key__": "a/1", "mp4": clip(1), "cls": b"nod"},
        {"__key__": "c", "mp4": b"nothing", "cls": b"wave"},
    ]
    tar = webdataset_tar(tmp_path / "t.tar", samples)
    take(tmp_path / "out", tar)
    assert video_paths(tmp_path / "out") == {"a%2F1": "a/1.mp4", "c": f"{tar}:c.mp4"}
