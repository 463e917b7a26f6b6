"""`predict` on many files: what goes in, what comes out and when, and how a file is continued."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest

from featstore.workspace import Workspace
from heads.prediction.predict import Predictor, predict
from heads.prediction.request import PredictionRequest
from heads.prediction.videos import find_videos
from pipeline.decoding.pyav import PyAVDecoder
from tests.support.processes.command_line import done, mote, refused
from tests.support.processes.processes import Commands, command_starter
from tests.support.worlds.damage import Recipe, encoded, rewritten
from tests.support.worlds.media import make_video, repeat_video
from tests.support.worlds.tiny_world import WORDS, World

FP32 = ("--precision", "fp32")


@pytest.fixture
def clips(world: World, tmp_path: Path) -> Path:
    """A folder with six videos of six classes, one of which is damaged."""
    folder = tmp_path / "clips"
    shutil.copytree(world.videos / "val", folder)
    (folder / "run" / "text.mp4").write_text("no video")
    return folder


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def best(answer: dict[str, Any]) -> list[tuple[str, float]]:
    return [(p["class_name"], p["score"]) for p in answer["predictions"]]


def test_folders_globs_and_lists_give_what_files_give(world: World, clips: Path) -> None:
    place = ("--root", world.root, "--max-failures", "1", *FP32)
    files = sorted(map(str, clips.rglob("*.mp4")))
    (clips / "list.csv").write_text("\n".join(["path", *files]))
    expected = {v["path"]: v for v in done("predict", *files, *place)["videos"]}
    assert list(expected) == files
    for words in ([clips], [f"{clips}/**/*.mp4"], ["--list", clips / "list.csv"]):
        told = done("predict", *words, *place)["videos"]
        assert {video["path"]: video for video in told} == expected
    # Not a bit of a score depends on what is scored beside it.
    assert done("predict", files[-1], *place)["videos"] == [expected[files[-1]]]
    assert expected[str(clips / "run" / "text.mp4")]["error"].startswith("not a readable")


def test_a_missing_file_stops_no_other_and_is_counted(world: World, clips: Path) -> None:
    good = sorted((clips / "sit").iterdir())
    (clips / "none").mkdir()
    words = ("predict", "no.mp4", *good, clips / "none", *good, "--root", world.root)
    result = mote(*words, "--json")
    assert result.code == 1
    assert "2 of 3 videos failed" in result.error
    assert "warning: no.mp4: does not exist" in result.err
    assert f"predicted once: 1 video ({good[0]})" in result.err
    missing, video, empty = result.json["videos"]
    assert (missing["error"], missing["predictions"]) == ("does not exist", [])
    assert "folder without videos" in empty["error"]
    assert len(video["predictions"]) == 5
    assert mote(*words, "--max-failures", "0.7").code == 0


@pytest.mark.parametrize("form", [(), ("--format", "csv"), ("--format", "jsonl")])
def test_without_a_terminal_it_prints_lines(
    world: World, clips: Path, form: tuple[str, ...]
) -> None:
    words = ("predict", clips, "--top", "2", "--root", world.root, "--max-failures", "1", *FP32)
    expected = {video["path"]: video for video in done(*words)["videos"]}
    result = mote(*words, *form)
    if "jsonl" in form:
        told = [json.loads(line) for line in result.out.splitlines()]
        assert {video["path"]: video for video in told} == expected
        return
    table = rows(result.out)
    assert list(table[0]) == [
        *("path", "num_frames", "class_1", "score_1", "class_2", "score_2", "error", "note")
    ]
    assert len(table) == len(expected) == 7
    for row in table:
        video = expected[row["path"]]
        assert row["error"] == video.get("error", "")
        for rank, (name, score) in enumerate(best(video), start=1):
            assert row[f"class_{rank}"] == name
            assert float(row[f"score_{rank}"]) == pytest.approx(score, abs=1e-6)
    assert "7 videos: 7 done in" in result.err


@pytest.mark.parametrize("count", [2, 20])
def test_tables_and_lines_for_people(world: World, clips: Path, count: int) -> None:
    video = next((clips / "sit").iterdir())
    files = [clips / f"{number}.mp4" for number in range(count)]
    for file in files:
        shutil.copy(video, file)
    result = mote("predict", *files, "--format", "table", "--root", world.root, *FP32)
    for file in files:
        line = next(line for line in result.out.splitlines() if line.startswith(str(file)))
        if count == 2:
            assert line.endswith(" frames, head clips-mote)")
        else:
            assert line.count("; ") == 4
    assert result.out.count("┃ class") == (2 if count == 2 else 0)


def test_classes_of_a_file(world: World, clips: Path, tmp_path: Path) -> None:
    video = next((clips / "sit").iterdir())
    place = ("--root", world.root, "--head", "mean", "--encoder", world.encoder, *FP32)
    names = ['say "hello", loudly', "=run()", "sit"]
    (tmp_path / "words.txt").write_text("\n".join(names))
    (tmp_path / "words.json").write_text(json.dumps(names))
    (tmp_path / "own.json").write_text(json.dumps({n: [f"a photo of {n}."] for n in names}))
    (tmp_path / "one.txt").write_text("a photo of {}.\n")
    told = [
        done("predict", video, "--classes", tmp_path / name, *place, *more)["videos"]
        for name, more in (
            *(("words.txt", ()), ("words.json", ()), ("own.json", ())),
            ("words.txt", ("--prompts", tmp_path / "one.txt")),
        )
    ]
    assert told[0] == told[1]
    assert {name for name, _ in best(told[0][0])} == set(names)
    # Descriptions are the sentences of a class, as templates are.
    assert told[2] == told[3]
    assert told[2] != told[0]
    result = mote("predict", video, "--classes", tmp_path / "words.txt", *place)
    assert "words.txt: 3 classes read from this file" in result.err
    row = rows(result.out)[0]
    assert {row["class_1"], row["class_2"], row["class_3"]} == {names[0], f"'{names[1]}", "sit"}
    assert "class_4" not in row
    line = refused(
        *(2, "predict", video, "--classes", tmp_path / "own.json", "--prompts", "name"), *place
    )
    assert "leave one out" in line


def test_one_class_is_no_choice(world: World, clips: Path) -> None:
    line = refused(2, "predict", clips, "--classes", "run", "--root", world.root)
    assert "one class to choose from, 'run'" in line
    assert "name at least two" in line


def test_videos_are_decoded_side_by_side(
    world: World, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the first two decodings waits until the other one has begun."""
    together, decode = Barrier(2, timeout=60), PyAVDecoder.decode_with_info
    waiting = iter([together, together])

    def watched(*arguments: Any) -> Any:
        if (barrier := next(waiting, None)) is not None:
            barrier.wait()
        return decode(*arguments)

    monkeypatch.setattr(PyAVDecoder, "decode_with_info", watched)
    found = predict(Workspace(world.root), [clips], head="clips-mote", workers=2)
    assert len(found["videos"]) == 7


def test_an_answer_is_there_before_the_last_video_is_decoded(
    world: World, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered, decode = Event(), PyAVDecoder.decode_with_info
    files = sorted(clips.rglob("*.mp4"))
    last = files[-1].read_bytes()

    def watched(self: PyAVDecoder, source: Any, choose: Any) -> Any:
        if source == last:
            assert answered.wait(60)
        return decode(self, source, choose)

    monkeypatch.setattr(PyAVDecoder, "decode_with_info", watched)
    request = PredictionRequest(find_videos([clips]), workers=2)
    reports: list[tuple[float, float]] = []
    answers = Predictor(Workspace(world.root), request).answers(
        lambda done, total, **_: reports.append((done, total))
    )
    first = next(answers)
    assert first.path != str(files[-1])
    answered.set()
    assert len(list(answers)) == len(files) - 1
    assert reports == [(count, 7.0) for count in range(8)]


# A file that is continued


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
def test_a_file_is_continued(world: World, clips: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "new" / name
    place = ("--root", world.root, "--max-failures", "1", *FP32)
    first = mote("predict", clips / "sit", clips / "run", "--out", out, *place)
    assert first.out == f"{out}: 2 of 3 videos have predictions\n"
    before = out.read_bytes()
    again = mote("predict", clips, "--out", out, *place)
    assert out.read_bytes().startswith(before)
    assert "7 videos: 4 done in" in again.err
    assert "3 before, 1 failed" in again.err
    assert again.out == f"{out}: 6 of 7 videos have predictions\n"
    whole = out.read_bytes()
    nothing = done("predict", clips, "--out", out, *place)
    assert (nothing["videos"], nothing["done_before"]) == ([], 7)
    assert out.read_bytes() == whole
    assert mote("predict", clips, "--out", out, "--root", world.root, *FP32).code == 1

    video = next((clips / "sit").iterdir())
    shutil.copy(next((clips / "wave").iterdir()), video)
    assert done("predict", clips, "--out", out, *place)["done_before"] == 6
    for settings, words in (
        (("--frames", "3"), "frames 4, now 3"),
        (("--top", "2"), "top 5, now 2"),
        (("--classes", "run,sit,jump,wave,swim"), "classes 6, now 5; class '"),
        (("--classes", "a,b,c,d,e,f"), "' is in the file and not named now"),
        (("--classes", ",".join(reversed(WORDS))), "(other class names, another order or other"),
        (("--head", "clips-transformer"), "head clips-mote "),
        (("--window", "1"), "window none, now 1"),
        (("--no-modulate",), "modulate yes, now no"),
    ):
        line = refused(2, "predict", clips, "--out", out, *settings, *place)
        assert "begun with other settings" in line
        assert words in line


def test_a_file_is_not_replaced(world: World, clips: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("path,label\na.mp4,run\n")
    for name, words in (("table.csv", "holds no csv predictions"), ("x.xlsx", "FILE.csv")):
        line = refused(2, "predict", clips, "--out", tmp_path / name, "--root", world.root)
        assert words in line
    assert table.read_text() == "path,label\na.mp4,run\n"
    assert "table, csv or jsonl" in refused(2, "predict", clips, "--format", "xml")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with command_starter(tmp_path_factory.mktemp("output")) as commands:
        yield commands


def test_killed_and_interrupted_it_goes_on(
    world: World, commands: Commands, tmp_path: Path
) -> None:
    folder, out = tmp_path / "many", tmp_path / "out.csv"
    clip = next((world.videos / "val" / "sit").iterdir())
    for number in range(150):
        folder.mkdir(exist_ok=True)
        shutil.copy(clip, folder / f"{number:03d}.mp4")
    words = ("predict", folder, "--out", out, "--workers", "1", "--root", world.root, *FP32)

    def lines() -> int:
        return out.read_bytes().count(b"\n") if out.exists() else 0

    killed = commands.start(*words)
    killed.until(lambda: lines() > 8)
    assert killed.kill() == -signal.SIGKILL
    after_kill = lines()
    kept = out.read_bytes()[: out.read_bytes().rfind(b"\n") + 1]
    interrupted = commands.start(*words)
    assert interrupted.stop(lambda: lines() > after_kill + 8, signal.SIGINT) == 130
    assert "finished work is kept" in interrupted.words
    assert 150 > lines() > after_kill
    summary = done(*words)
    assert summary["done_before"] == 150 - len(summary["videos"]) > 0
    assert out.read_bytes().startswith(kept)
    table = rows(out.read_text())
    assert sorted(row["path"] for row in table) == sorted(map(str, folder.iterdir()))
    assert len({row["score_1"] for row in table}) == 1


# Long videos


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 seconds: twenty that show one thing, then thirty that show another."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    clip = make_video(None, frames=25, width=72, height=48, fps=25, gop=25, options={"bf": "0"})
    repeat_video(clip, path, "mp4", 1250)
    return path


def test_a_long_video_is_warned_about(world: World, long_video: Path) -> None:
    result = mote("predict", long_video, "--root", world.root, "--json")
    note = "4 frames over 50 seconds: --window 10 predicts every 10 seconds of it"
    assert f"warning: {long_video} is long, {note}" in result.err
    assert result.json["videos"][0]["note"] == note
    short = next((world.videos / "val" / "sit").iterdir())
    assert "note" not in done("predict", short, "--root", world.root)["videos"][0]


@pytest.mark.parametrize("window", [(), ("--window", "0.2")])
def test_what_was_skipped_of_a_video_is_noted(
    world: World, tmp_path: Path, window: tuple[str, ...]
) -> None:
    cut, sizes = tmp_path / "cut.ts", tmp_path / "sizes.ts"
    cut.write_bytes(rewritten(encoded(Recipe("libx264", "mpegts")), "mpegts", {}, first=5))
    small = make_video(frames=10, container="mpegts")
    sizes.write_bytes(small + make_video(frames=10, width=64, container="mpegts"))
    found = done("predict", cut, sizes, *window, "--root", world.root)["videos"]
    notes = [video["note"] for video in found]
    assert notes[0].startswith("leading pictures skipped: ")
    assert notes[1].startswith("frames of another size than the first: ")


def test_windows_of_a_long_video(
    world: World, long_video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each window is what a cut of the video would be; memory is bounded by decoding few."""
    place = ("--root", world.root, "--window", "12", *FP32)
    (video,) = done("predict", long_video, *place)["videos"]
    spans = [(part["start"], part["end"]) for part in video["windows"]]
    assert spans == [(0, 12), (12, 24), (24, 36), (36, 50)]
    assert video["num_frames"] == 1250
    assert "note" not in video
    monkeypatch.setattr("heads.prediction.predict.WINDOW_BYTES", 1)
    assert done("predict", long_video, *place)["videos"] == [video]
    for part in video["windows"]:
        assert {p["class_name"] for p in part["predictions"]} < set(WORDS)
    table = rows(mote("predict", long_video, *place).out)
    assert [row["window"] for row in table] == ["1 of 4", "2 of 4", "3 of 4", "4 of 4"]
    assert (table[3]["start"], table[3]["end"]) == ("36.000", "50.000")
    shown = mote("predict", long_video, *place, "--format", "table").out
    assert shown.count(" to ") == 4


def test_a_window_sees_its_own_frames(world: World, tmp_path: Path) -> None:
    """Two clips one after the other: the windows are what the clips are by themselves."""
    parts = [tmp_path / "0.mp4", tmp_path / "1.mp4"]
    whole = tmp_path / "whole.mp4"
    size = {"width": 72, "height": 48, "options": {"qp": "0"}}
    for number, path in enumerate(parts):
        make_video(path, frames=50, first=50 * number, fps=25, **size)  # type: ignore[arg-type]
    make_video(whole, frames=100, fps=25, **size)  # type: ignore[arg-type]
    place = ("--root", world.root, *FP32)
    expected = done("predict", *parts, *place)["videos"]
    (video,) = done("predict", whole, "--window", "2", *place)["videos"]
    for part, alone in zip(video["windows"], expected, strict=True):
        assert [name for name, _ in best(part)] == [name for name, _ in best(alone)]
        assert [score for _, score in best(part)] == pytest.approx(
            [score for _, score in best(alone)], abs=1e-4
        )


def test_a_damaged_video_has_no_windows(world: World, clips: Path, tmp_path: Path) -> None:
    place = ("--root", world.root, "--window", "1", "--max-failures", "1")
    found = done("predict", clips, *place)["videos"]
    failed = [video for video in found if "error" in video]
    assert [os.path.basename(video["path"]) for video in failed] == ["text.mp4"]
    assert len(found) == 7
    out = tmp_path / "out.csv"
    assert mote("predict", clips, "--out", out, *place).code == 0
    assert done("predict", clips, "--out", out, *place)["done_before"] == 7
