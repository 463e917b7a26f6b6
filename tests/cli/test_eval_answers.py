"""What `eval` shows of classes and confusions, and the files that it names."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes.command_line import done, mote
from tests.support.stores.action_store import ACTIONS, action_store
from tests.support.worlds.tiny_world import CLASSES, VAL, WORDS, World

FILES = ("videos", "per_class", "confusion", "confusion_picture")


def test_every_video_stands_in_the_table_with_its_own_path(own: World) -> None:
    value = done("eval", "--closeset", "clips", "--head", "mean", "--root", own.root)
    assert tuple(value["files"]) == FILES
    assert all(Path(file).is_file() for file in value["files"].values())
    with open(value["files"]["videos"], encoding="utf-8-sig", newline="") as text:
        rows = {row["path"]: row for row in csv.DictReader(text)}
    assert len(rows) == value["n_listed"] == VAL * len(CLASSES)
    for name, words in zip(CLASSES, WORDS, strict=True):
        row = rows[f"val/{name}/val0 {name}.mp4"]
        assert (own.videos / row["path"]).is_file()
        assert row["true_class"] == words
        assert row["class_1"] in WORDS
    right = sum(row["correct"] == "yes" for row in rows.values())
    assert 100 * right / len(rows) == pytest.approx(value["top1"])
    assert {found["name"] for found in value["best_classes"]} == set(WORDS)
    assert value["worst_classes"] == []
    assert sum(c["times"] for c in value["confusions"]) == min(5, len(rows) - right)


def test_a_store_without_its_data_set_is_told_and_tested(own: World) -> None:
    (own.root / "datasets").rename(own.root / "away")
    seen = mote("eval", "--closeset", "clips", "--head", "mean", "--root", own.root)
    assert seen.code == 0, seen.err
    assert "data set clips is not packed here" in seen.err
    (file,) = (own.root / "heads/mean/eval").glob("*.videos.csv")
    with open(file, encoding="utf-8-sig", newline="") as text:
        assert {row["path"] for row in csv.DictReader(text)} == {""}


def test_shots_leave_the_same_files(own: World) -> None:
    value = done(
        *("eval", "--fewshot", "clips", "--shots", "1", "--epochs", "1", "--batch-size", "4"),
        *("--root", own.root, "--split", "val"),
    )
    for file in value["files"]:
        with open(file.replace(".json", ".videos.csv"), encoding="utf-8-sig", newline="") as text:
            assert all(row["path"].startswith("val/") for row in csv.DictReader(text))
        assert Path(file.replace(".json", ".confusion.png")).is_file()


def many_classes(root: Path) -> Path:
    names = [*ACTIONS, "Pretending to put something into something", "\x1b[31mred \u202e"]
    names += ["Moving something and something away from each other very slowly", "$x$", "跳舞"]
    action_store(
        root / "features/toy/a.zarr",
        samples=260,
        classes=13,
        class_names=names,
        noise=14.0,
        failed=(3, 4),
    )
    return root


def test_what_is_shown_fits_eighty_columns(tmp_path: Path) -> None:
    root = many_classes(tmp_path)
    command = [sys.executable, "-c", "from cli.main import main; main()", "eval", "--closeset"]
    seen = subprocess.run(
        [*command, "toy", "--head", "mean", "--root", root],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(Path(__file__).parents[2])},
    ).stdout
    value = done("eval", "--closeset", "toy", "--head", "mean", "--root", root)
    _, _, told = seen.partition("best of 13 classes")
    told, kept, _ = told.partition("kept as")
    assert kept
    assert max(map(len, told.splitlines())) <= 80
    assert "\x1b" not in seen
    assert "\u202e" not in seen
    words = " ".join(told.replace("│", " ").split())
    assert "worst of 13 classes" in words
    assert len(value["best_classes"]) == len(value["worst_classes"]) == 5
    assert len(value["confusions"]) == 5
    for found in value["confusions"]:
        assert f": {found['times']} of {found['videos']}" in words
    assert words.count(" taken for ") == 5
    top1 = [found["top1"] for found in value["best_classes"] + value["worst_classes"][::-1]]
    assert top1 == sorted(top1, reverse=True)


def test_a_sweep_shows_settings_only(tmp_path: Path) -> None:
    root = many_classes(tmp_path)
    seen = mote("eval", "--closeset", "toy", "--head", "mean", "--fusion", "all", "--root", root)
    assert seen.code == 0, seen.err
    assert "taken for" not in seen.out
    assert "best of" not in seen.out
    assert not list(root.rglob("*.videos.csv"))
    assert not list(root.rglob("*.png"))
