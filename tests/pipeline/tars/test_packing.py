"""Packing: what is in the tars, what is beside them, and what happens when it is interrupted."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import webdataset

from featstore.errors import UserError, WorkError
from featstore.files.locks import exclusive
from pipeline.annotations.listing import name_from_key
from pipeline.tars.dataset import Dataset, load_dataset
from pipeline.tars.packing import pack
from pipeline.tars.summary import PackSummary
from tests.support.worlds.media import make_video


@cache
def clip(frames: int = 3) -> bytes:
    return make_video(frames=frames, gop=2)


def put(folder: Path, *names: str, data: bytes | None = None) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip() if data is None else data)


def class_folders(folder: Path, per_class: int = 4) -> Path:
    for name in ("brush_hair", "clap", "YoYo"):
        for number in range(per_class):
            put(folder, f"{name}/{name} {number}.mp4", data=clip(2 + number % 3))
    return folder


def samples(dataset: Dataset) -> dict[str, dict[str, bytes]]:
    """All tar members by key, read without webdataset."""
    found: dict[str, dict[str, bytes]] = {}
    for tar in dataset.tars:
        with tarfile.open(dataset.tar_path(tar)) as archive:
            for member in archive:
                key, _, kind = member.name.partition(".")
                file = archive.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[kind] = file.read()
    return found


def content(folder: Path) -> dict[str, str]:
    """Hash of every result file; .packing holds times, which may differ."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".packing" not in path.parts
    }


def failures(folder: Path) -> list[dict[str, str]]:
    with open(folder / "failures.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_tars_hold_original_bytes_and_a_sidecar(tmp_path: Path) -> None:
    videos = class_folders(tmp_path / "videos")
    summary = pack(videos, "own", tmp_path / "out", samples_per_shard=5)
    dataset = load_dataset(tmp_path / "out")

    assert [tar.file for tar in dataset.tars] == [
        "own-000000.tar",
        "own-000001.tar",
        "own-000002.tar",
    ]
    assert [tar.samples for tar in dataset.tars] == [5, 5, 2]
    assert dataset.raw_class_names == ("YoYo", "brush_hair", "clap")
    assert dataset.class_names == ("yo yo", "brush hair", "clap")
    assert (dataset.split_names, dataset.splits_disjoint) == ((), False)
    found = samples(dataset)
    assert len(found) == 12
    for key, files in found.items():
        source = videos / f"{name_from_key(key)}.mp4"
        sidecar = json.loads(files["json"])
        assert files["mp4"] == source.read_bytes()
        assert sidecar["key"] == key
        assert sidecar["sha256"] == hashlib.sha256(files["mp4"]).hexdigest()
        assert sidecar["source_path"] == str(source.relative_to(videos))
        assert dataset.raw_class_names[sidecar["label"]] == source.parent.name
        assert sidecar["raw_class_name"] == source.parent.name
        assert sidecar["class_name"] == dataset.class_names[sidecar["label"]]
        assert sidecar["num_frames"] == 2 + int(source.stem[-1]) % 3
        assert (sidecar["width"], sidecar["height"], sidecar["codec"]) == (96, 64, "h264")
        assert sidecar["fps"] == pytest.approx(25)
        assert sidecar["splits"] == []
    assert summary.to_json()["videos_packed"] == 12
    assert summary.bytes == sum(dataset.tar_path(s).stat().st_size for s in dataset.tars)
    assert not summary.too_many_failures
    assert failures(tmp_path / "out") == []


def test_webdataset_reads_the_tars(tmp_path: Path) -> None:
    videos = class_folders(tmp_path / "videos", per_class=2)
    pack(videos, "own", tmp_path / "out")
    dataset = load_dataset(tmp_path / "out")
    url = str(dataset.tar_path(dataset.tars[0]))
    read = {item["__key__"]: item for item in webdataset.WebDataset(url, shardshuffle=False)}
    assert set(read) == set(samples(dataset))
    assert all(set(item) >= {"mp4", "json"} for item in read.values())


def test_same_input_gives_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    videos = class_folders(tmp_path / "videos")
    (videos / "clap/broken.mp4").write_text("no video")
    pack(videos, "own", tmp_path / "a", samples_per_shard=4, workers=1)
    pack(videos, "own", tmp_path / "b", samples_per_shard=4, workers=4)
    pack(videos, "own", tmp_path / "c", samples_per_shard=4, seed=1)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a") != content(tmp_path / "c")


def test_classes_are_mixed_in_every_tar(tmp_path: Path) -> None:
    videos = class_folders(tmp_path / "videos", per_class=8)
    pack(videos, "own", tmp_path / "out", samples_per_shard=8)
    dataset = load_dataset(tmp_path / "out")
    for tar in dataset.tars:
        with tarfile.open(dataset.tar_path(tar)) as archive:
            names = {name_from_key(name.partition(".")[0]) for name in archive.getnames()}
        assert len({name.split("/")[0] for name in names}) > 1


def test_disjoint_splits_get_their_own_tars(tmp_path: Path) -> None:
    class_folders(tmp_path / "videos/train")
    class_folders(tmp_path / "videos/validation", per_class=1)
    pack(tmp_path / "videos", "own", tmp_path / "out", samples_per_shard=7)
    dataset = load_dataset(tmp_path / "out")
    assert [(tar.file, tar.split, tar.samples) for tar in dataset.tars] == [
        ("own-train-000000.tar", "train", 7),
        ("own-train-000001.tar", "train", 5),
        ("own-val-000000.tar", "val", 3),
    ]
    assert dataset.splits_disjoint
    assert dataset.splits_of("validation%2Fclap%2Fclap%200") == ("val",)
    assert dataset.splits_of("unknown") == ()


BAD = {
    "empty.mp4": b"",
    "text.mp4": b"this is no video at all\n" * 50,
    "truncated.mp4": None,
    "sound.mp4": None,
}


def put_bad(folder: Path) -> None:
    for name, data in BAD.items():
        if name == "truncated.mp4":
            data = clip()[: len(clip()) // 2]
        elif name == "sound.mp4":
            data = make_video(audio_only=True)
        assert data is not None
        put(folder, name, data=data)
    (folder / "gone.mp4").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.mp4")
    put(folder, "n" * 201 + ".mp4")


def test_bad_files_keep_their_place_outside_the_tars(tmp_path: Path) -> None:
    videos = class_folders(tmp_path / "videos")
    put_bad(videos / "clap")
    put(videos, "clap/one frame.mp4", data=clip(1))
    summary = pack(videos, "own", tmp_path / "out", samples_per_shard=6)
    dataset = load_dataset(tmp_path / "out")

    rows = {Path(row["path"]).name: row for row in failures(tmp_path / "out")}
    assert set(rows) == {*BAD, "gone.mp4", "pipe.mp4", "n" * 201 + ".mp4"}
    assert all(row["reason"] and "\n" not in row["reason"] for row in rows.values())
    assert str(tmp_path) not in "".join(row["reason"] for row in rows.values())
    assert "empty" in rows["empty.mp4"]["reason"]
    assert "206 characters" in rows["n" * 201 + ".mp4"]["reason"]
    assert rows["text.mp4"]["class_name"] == "clap"
    in_json = {failed.key: failed for tar in dataset.tars for failed in tar.failed}
    assert {row["key"]: row["reason"] for row in rows.values()} == {
        key: failed.reason for key, failed in in_json.items()
    }
    assert {failed.label for failed in in_json.values()} == {2}
    assert not set(samples(dataset)) & set(in_json)
    assert len(samples(dataset)) == 13
    assert (summary.videos_listed, summary.videos_packed, summary.videos_failed) == (20, 13, 7)
    assert summary.too_many_failures
    assert len(summary.to_json()["failures"]) == 5
    assert json.loads(json.dumps(summary.to_json()))["too_many_failures"] is True
    assert [tar.rows for tar in dataset.tars] == [6, 6, 6, 2]


def test_share_of_failures_is_the_callers_choice(tmp_path: Path) -> None:
    videos = class_folders(tmp_path / "videos", per_class=1)
    put(videos, "clap/bad.mp4", data=b"")
    assert pack(videos, "own", tmp_path / "a", max_failures=0.2).too_many_failures
    assert not pack(videos, "own", tmp_path / "a", max_failures=0.25).too_many_failures


def test_all_failed_still_writes_everything(tmp_path: Path) -> None:
    put(tmp_path / "videos", "a/1.mp4", "b/2.mp4", data=b"")
    summary = pack(tmp_path / "videos", "own", tmp_path / "out")
    dataset = load_dataset(tmp_path / "out")
    assert summary.too_many_failures
    assert (dataset.listed, dataset.packed) == (2, 0)
    assert samples(dataset) == {}


def test_a_decoder_that_breaks_costs_one_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = class_folders(tmp_path / "videos", per_class=1)

    def probe(self: object, source: bytes) -> Any:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr("pipeline.tars.probing.PyAVDecoder.probe", probe)
    summary = pack(videos, "own", tmp_path / "out")
    assert summary.videos_failed == 3
    assert summary.failures[0]["reason"] == "ZeroDivisionError: surprise"


def test_keys_of_hostile_names_come_back(tmp_path: Path) -> None:
    names = ["-abc", "a.b.c", "(x)!#;[]&+~@", "é 中文", "a%2Eb", "a%2F..", " lead"]
    for name in names:
        put(tmp_path / "videos", f"some class/{name}.mp4")
    put(tmp_path / "videos", "some class/UPPER.MP4")
    pack(tmp_path / "videos", "own", tmp_path / "out")
    found = samples(load_dataset(tmp_path / "out"))
    assert {name_from_key(key) for key in found} == {
        f"some class/{name}" for name in [*names, "UPPER"]
    }
    assert not any("/" in key or "." in key for key in found)
    assert all(set(files) == {"mp4", "json"} for files in found.values())


def test_finished_packing_does_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    videos = class_folders(tmp_path / "videos")
    put_bad(videos / "clap")
    pack(videos, "own", tmp_path / "out", samples_per_shard=4)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    seen: list[float] = []
    caplog.set_level("INFO")
    summary = pack(
        videos,
        "own",
        tmp_path / "out",
        samples_per_shard=4,
        progress=lambda done, total, **details: seen.append(done),
    )
    assert (summary.shards_written, summary.shards_skipped) == (0, 5)
    assert "nothing to do" in caplog.text
    assert seen == []
    ignored = tmp_path / "out/.packing/lock"
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert {p: t for p, t in before.items() if p != ignored} == {
        p: t for p, t in after.items() if p != ignored
    }
    assert summary.videos_failed == 7


def test_lost_tar_is_packed_again(tmp_path: Path) -> None:
    videos = class_folders(tmp_path / "videos")
    pack(videos, "own", tmp_path / "out", samples_per_shard=4)
    expected = content(tmp_path / "out")
    (tmp_path / "out/shards/own-000001.tar").unlink()
    (tmp_path / "out/shards/own-000002.tar").write_bytes(b"short")
    summary = pack(videos, "own", tmp_path / "out", samples_per_shard=4)
    assert (summary.shards_written, summary.shards_skipped) == (2, 1)
    assert content(tmp_path / "out") == expected


CHILD = """
import os, signal, sys
from pathlib import Path
from pipeline.tars.packing import pack
videos, out, kind, limit = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
if kind == "video":
    def progress(done, total, **details):
        if done == limit:
            os.kill(os.getpid(), signal.SIGKILL)
    pack(Path(videos), "own", Path(out), samples_per_shard=4, progress=progress)
else:
    real, count = os.fsync, 0
    def fsync(descriptor):
        global count
        real(descriptor)
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = fsync
    pack(Path(videos), "own", Path(out), samples_per_shard=4)
"""


def killed(videos: Path, out: Path, kind: str, limit: int) -> int:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-c", CHILD, str(videos), str(out), kind, str(limit)]
    return subprocess.run(command, env=environment, check=False).returncode


def test_kill_9_then_the_same_command_ends_as_if_uninterrupted(tmp_path: Path) -> None:
    videos = class_folders(tmp_path / "videos")
    put_bad(videos / "YoYo")
    pack(videos, "own", tmp_path / "whole", samples_per_shard=4)
    expected = content(tmp_path / "whole")
    # After a number of videos, or of syncs, two for each file: 1 and 2 are the plan, then come
    # five tars, each with its record, then failures.csv (23, 24) and dataset.json (25, 26).
    for kind, limit in (("video", 10), ("sync", 1), ("sync", 5), ("sync", 24)):
        out = tmp_path / f"{kind}{limit}"
        assert killed(videos, out, kind, limit) == -signal.SIGKILL
        assert not (out / "dataset.json").exists()
        if kind == "video":
            with pytest.raises(UserError, match="not finished"):
                load_dataset(out)
        summary = pack(videos, "own", out, samples_per_shard=4)
        assert content(out) == expected
        assert not list(out.rglob("*.partial"))
        if (kind, limit) == ("video", 10):
            assert (summary.shards_written, summary.shards_skipped) == (3, 2)
            assert pack(videos, "own", out, samples_per_shard=4).shards_written == 0


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, Path]:
    videos = class_folders(tmp_path / "videos")
    pack(videos, "own", tmp_path / "out", samples_per_shard=4)
    return videos, tmp_path / "out"


def refused(videos: Path, out: Path, **options: Any) -> str:
    before = content(out)
    with pytest.raises(UserError) as caught:
        pack(videos, "own", out, **{"samples_per_shard": 4, **options})
    assert content(out) == before
    message = str(caught.value)
    assert "\n" not in message
    assert f"use another --dataset name or delete {str(out)!r}" in message
    return message


def test_changed_input_is_refused(packed: tuple[Path, Path]) -> None:
    videos, out = packed
    path = videos / "clap/clap 0.mp4"
    original, times = path.read_bytes(), path.stat()

    put(videos, "clap/new.mp4")
    assert "1 video added (e.g. 'clap/new.mp4')" in refused(videos, out)
    (videos / "clap/new.mp4").unlink()

    path.unlink()
    assert "1 video removed (e.g. 'clap/clap 0.mp4')" in refused(videos, out)

    path.write_bytes(original + b"\0")
    assert "1 video of another size (e.g. 'clap/clap 0.mp4')" in refused(videos, out)

    path.write_bytes(original[:-1] + b"\1")
    os.utime(path, ns=(0, times.st_mtime_ns + 10**9))
    assert "1 video with other content" in refused(videos, out)

    path.write_bytes(original)
    os.utime(path, ns=(0, times.st_mtime_ns + 10**9))
    assert pack(videos, "own", out, samples_per_shard=4).shards_written == 0

    (videos / "dance").mkdir()
    assert "there were 3 classes and are 4 now ('dance' is new)" in refused(videos, out)
    (videos / "dance").rmdir()
    assert "samples_per_shard was 4, is 5" in refused(videos, out, samples_per_shard=5)
    assert "seed was 0, is 2" in refused(videos, out, seed=2)


def test_changed_annotations_are_refused_and_reordered_ones_are_not(tmp_path: Path) -> None:
    put(tmp_path / "videos", "a.mp4", "b.mp4", "c.mp4")
    labels = tmp_path / "labels.csv"
    out = tmp_path / "out"
    labels.write_text("path,label,split\na.mp4,run,train\nb.mp4,jump,train\nc.mp4,run,val\n")
    pack(tmp_path / "videos", "own", out, samples_per_shard=4, annotations=labels)
    labels.write_text("path,label,split\nc.mp4,run,val\nb.mp4,jump,train\na.mp4,run,train\n")
    again = pack(tmp_path / "videos", "own", out, samples_per_shard=4, annotations=labels)
    assert again.shards_written == 0
    labels.write_text("path,label,split\na.mp4,jump,train\nb.mp4,jump,train\nc.mp4,run,test\n")
    message = refused(tmp_path / "videos", out, annotations=labels)
    assert "1 video with another class (e.g. 'a.mp4')" in message
    assert "1 video with other splits (e.g. 'c.mp4')" in message


def test_a_missing_video_that_came_is_a_change(tmp_path: Path) -> None:
    put(tmp_path / "videos", "a.mp4")
    labels = tmp_path / "labels.csv"
    labels.write_text("a.mp4,run\nb.mp4,jump\n")
    summary = pack(tmp_path / "videos", "own", tmp_path / "out", annotations=labels)
    assert summary.videos_failed == 1
    put(tmp_path / "videos", "b.mp4")
    message = refused(
        tmp_path / "videos", tmp_path / "out", annotations=labels, samples_per_shard=256
    )
    assert "1 video found that were missing (e.g. 'b.mp4')" in message


def test_moved_videos_and_copied_files_continue(packed: tuple[Path, Path], tmp_path: Path) -> None:
    videos, out = packed
    shutil.copytree(videos, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    (out / "shards/own-000000.tar").unlink()
    assert pack(tmp_path / "elsewhere", "own", out, samples_per_shard=4).shards_written == 1


def test_a_video_that_changes_meanwhile_stops_packing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = class_folders(tmp_path / "videos")
    last = sorted(videos.rglob("*.mp4"))

    def progress(done: float, total: float, **details: object) -> None:
        for path in last:
            path.write_bytes(clip() + b"\0")

    with pytest.raises(UserError, match="changed while it was being packed"):
        pack(videos, "own", tmp_path / "out", workers=1, progress=progress)
    assert not (tmp_path / "out/dataset.json").exists()
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_second_process_is_told_who_packs(packed: tuple[Path, Path]) -> None:
    videos, out = packed
    holder = rf"another process \(pid {os.getpid()} on .*\) is packing into"
    with exclusive(out / ".packing/lock", "packing"), pytest.raises(WorkError, match=holder):
        pack(videos, "own", out, samples_per_shard=4)


def test_folder_without_records_is_not_touched(packed: tuple[Path, Path]) -> None:
    videos, out = packed
    shutil.rmtree(out / ".packing")
    before = sorted(out.rglob("*"))
    assert "without the records of its packing" in refused(videos, out)
    assert sorted(out.rglob("*")) == before


def test_full_disk_is_a_work_error_and_finished_tars_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = class_folders(tmp_path / "videos")
    real = os.fsync
    count = 0

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == 8:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(WorkError, match=r"No space left on device.*finished tars are kept"):
        pack(videos, "own", tmp_path / "out", samples_per_shard=4)
    summary = pack(videos, "own", tmp_path / "out", samples_per_shard=4)
    assert summary.shards_skipped == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_shard": 0}, "samples-per-shard"),
        ({"max_failures": 1.5}, "max-failures"),
        ({"workers": 0}, "workers"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack(tmp_path, "own", tmp_path / "out", **options)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "-x"])
def test_wrong_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="data set name"):
        pack(tmp_path, name, tmp_path / "out")


def test_wrong_input_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    with pytest.raises(UserError, match="no videos"):
        pack(tmp_path / "videos", "own", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_inside_the_videos_folder_is_no_class(tmp_path: Path) -> None:
    class_folders(tmp_path)
    out = tmp_path / "mote-data/datasets/own"
    for _ in range(2):
        summary: PackSummary = pack(tmp_path, "own", out)
    assert summary.classes == 3
    assert summary.shards_written == 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda value: value.update(format_version=99), "install a newer one"),
        (lambda value: value.pop("shards"), "damaged"),
        (lambda value: value["shards"][0].update(file="../x.tar"), "not a plain file name"),
        (lambda value: value["class_names"].reverse(), "edited by hand"),
    ],
)
def test_load_dataset_refuses_damage(packed: tuple[Path, Path], edit: Any, message: str) -> None:
    path = packed[1] / "dataset.json"
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
    with pytest.raises((UserError, WorkError), match=message) as caught:
        load_dataset(packed[1])
    assert "\n" not in str(caught.value)


def test_memory_does_not_grow_with_the_number_of_videos(tmp_path: Path) -> None:
    """How many videos are in hand at a time depends on threads, but it has a bound."""
    data = clip() + bytes(2_000_000)
    for number in range(24):
        put(tmp_path / "videos", f"a/{number}.mp4", data=data)
    tracemalloc.start()
    pack(tmp_path / "videos", "own", tmp_path / "out", workers=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 7 * len(data), "three are begun and one is written, of 24"
