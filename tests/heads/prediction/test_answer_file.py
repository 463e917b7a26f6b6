"""The file that predictions are added to: what it holds after any end, and who may go on."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from featstore.errors import UserError, WorkError
from heads.prediction.answer_file import AnswerFile
from heads.prediction.answers import Answer, Form, Lines, Window, form_of, stamp_of

SETTINGS = {"head": "first 12ab", "frames": "8", "classes": "3"}
BEST = [("cut, chop", 0.75), ("=run()", 0.25)]
ANSWERS = [
    Answer("a.mp4", 10, BEST, stamp=("5", "then")),
    Answer("=b\n.mp4", error="damaged: x, y", stamp=("6", "then")),
    Answer('c "d".mp4', 4000, BEST, note="8 frames", stamp=("7", "then")),
]
WINDOWED = [
    Answer("a.mp4", 10, BEST, "", "", [Window(0, 1, BEST)] * 3, ("5", "then")),
    *ANSWERS[1:2],
    Answer("e.mp4", 9, BEST, "", "", [Window(0, 1.5, BEST)], ("9", "then")),
]
KINDS = [("csv", False), ("csv", True), ("jsonl", False), ("jsonl", True)]


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    with mock.patch("os.fsync"):
        yield


def stamps(answers: list[Answer]) -> dict[str, tuple[str, str]]:
    return {answer.path: answer.stamp for answer in answers}


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}{' windows' * kind[1]}")
def kind(request: pytest.FixtureRequest) -> tuple[list[Answer], Lines]:
    form, windowed = request.param
    return WINDOWED if windowed else ANSWERS, Lines(form, 2, windowed, SETTINGS)


def write(path: Path, answers: list[Answer], lines: Lines) -> list[str]:
    """Add what is not done; returns the paths of what was done before."""
    file = AnswerFile(path, lines.form)
    file.open(lines, stamps(answers))
    for answer in answers:
        if answer.path not in file.done:
            file.add(answer)
    file.close()
    return list(file.done)


def test_torn_anywhere_it_becomes_whole(kind: tuple[list[Answer], Lines], tmp_path: Path) -> None:
    """Whatever part of the file a kill has left, the next run makes of it what it would be."""
    answers, lines = kind
    path = tmp_path / "out"
    write(path, answers, lines)
    whole = path.read_bytes()
    for size in {*range(0, len(whole), 5), *(n + 1 for n, byte in enumerate(whole) if byte == 10)}:
        path.write_bytes(whole[:size])
        done = write(path, answers, lines)
        assert path.read_bytes() == whole, size
        assert done == [a.path for a in answers][: len(done)]
    assert write(path, answers, lines) == [answer.path for answer in answers]


def test_other_settings_are_refused_by_name(
    kind: tuple[list[Answer], Lines], tmp_path: Path
) -> None:
    answers, lines = kind
    path = tmp_path / "out"
    write(path, answers, lines)
    before = path.read_bytes()
    assert AnswerFile(path, lines.form).begun_with() == SETTINGS
    other = Lines(lines.form, 1, not lines.windowed, {**SETTINGS, "frames": "16", "head": "second"})
    words = r"begun with other settings .head first 12ab, now second; frames 8, now 16"
    with pytest.raises(UserError, match=words):
        write(path, answers, other)
    assert path.read_bytes() == before


def test_a_video_that_changed_loses_its_rows_and_others_stay(
    kind: tuple[list[Answer], Lines], tmp_path: Path
) -> None:
    answers, lines = kind
    path = tmp_path / "out"
    write(path, answers, lines)
    changed = Answer("a.mp4", 10, BEST[::-1], "", "", answers[0].windows, ("5", "now"))
    assert write(path, [changed, answers[1]], lines) == [answers[1].path]
    assert write(path, [changed, *answers[1:]], lines) == [a.path for a in answers]


def test_a_video_that_was_missing_is_asked_for_again(
    kind: tuple[list[Answer], Lines], tmp_path: Path
) -> None:
    answers, lines = kind
    missing = Answer("late.mp4", error="does not exist")
    path = tmp_path / "out"
    write(path, [*answers, missing], lines)
    assert b"does not exist" in path.read_bytes()
    assert "late.mp4" not in write(path, [*answers, missing], lines)
    write(path, answers, lines)
    found = Answer("late.mp4", 3, BEST, "", "", answers[0].windows, ("1", "now"))
    assert "late.mp4" not in write(path, [*answers, found], lines)
    assert b"does not exist" not in path.read_bytes()


def test_the_table_opens_in_a_spreadsheet(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write(path, ANSWERS, Lines("csv", 2, False, SETTINGS))
    with path.open(newline="") as file:
        first, second, third = csv.DictReader(file)
    assert (first["path"], first["class_1"], first["score_1"]) == ("a.mp4", "cut, chop", "0.750000")
    assert first["class_2"] == "'=run()"
    assert (second["path"], second["class_1"]) == ("'=b\\x0a.mp4", "")
    assert second["error"] == "damaged: x, y"
    assert (third["path"], third["note"], third["num_frames"]) == ('c "d".mp4', "8 frames", "4000")
    assert third["settings"] == "head=first 12ab; frames=8; classes=3"


def test_lines_of_json_hold_what_json_holds(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, WINDOWED, Lines("jsonl", 2, True, SETTINGS))
    values = [json.loads(line) for line in path.read_text().splitlines()]
    for value, answer in zip(values, WINDOWED, strict=True):
        kept = {"size": answer.stamp[0], "modified": answer.stamp[1], "settings": SETTINGS}
        assert value == {**json.loads(json.dumps(answer.to_json())), **kept}


@pytest.mark.parametrize(
    ("form", "content"),
    [
        ("csv", b"path,label\na.mp4,run\n"),
        ("csv", b"\x00\xff\n"),
        ("csv", b"a.mp4"),
        ("jsonl", b'{"path": "a.mp4"}\n'),
        ("jsonl", b"[[[[[["),
        ("jsonl", b'{"size": 1, "settings": []}\n'),
        ("jsonl", b'{"a": ' + b"[" * 100_000 + b"\n"),
    ],
)
def test_another_file_is_never_touched(form: Form, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(content)
    file = AnswerFile(path, form)
    for attempt in (file.begun_with, lambda: write(path, ANSWERS, Lines(form, 2, False, SETTINGS))):
        with pytest.raises(UserError, match=f"holds no {form} predictions"):
            attempt()
    assert path.read_bytes() == content


def test_one_process_at_a_time(tmp_path: Path) -> None:
    lines = Lines("csv", 2, False, SETTINGS)
    first = AnswerFile(tmp_path / "out.csv", "csv")
    first.open(lines, {})
    with pytest.raises(WorkError, match="another process is writing"):
        write(tmp_path / "out.csv", ANSWERS, lines)
    first.close()
    assert write(tmp_path / "out.csv", ANSWERS, lines) == []


def test_the_name_says_the_form(tmp_path: Path) -> None:
    assert form_of(Path("a.CSV"), None) == "csv"
    assert form_of(Path("a.jsonl"), None) == "jsonl"
    assert form_of(Path("a"), "jsonl") == "jsonl"
    for name, form in (("a.xlsx", None), ("a", None), ("a.csv", "table")):
        with pytest.raises(UserError, match=r"FILE\.csv or FILE\.jsonl"):
            form_of(Path(name), form)
    with pytest.raises(UserError, match="is no file"):
        AnswerFile(tmp_path, "csv").begun_with()


def test_a_file_is_known_by_size_and_time(tmp_path: Path) -> None:
    file = tmp_path / "a"
    assert stamp_of(file) == ("", "")
    seen = []
    for content, moment in ((b"x", 1), (b"xy", 1), (b"x", 1 + 10**9 * 86400)):
        file.write_bytes(content)
        os.utime(file, ns=(moment, moment))
        seen.append(stamp_of(file))
    assert seen[0] == ("1", "1970-01-01 00:00:00.000000001")
    assert len(set(seen)) == 3
