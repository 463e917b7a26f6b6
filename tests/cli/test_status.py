"""`status`, `inspect` and the end of `doctor`: what a workspace holds and what to do next in it."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from tests.support.processes.command_line import done, mote, refused
from tests.support.stores.small_workspace import small_workspace
from tests.support.worlds.tiny_world import World


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return small_workspace(tmp_path / "work").root


def test_status_shows_each_thing_with_its_numbers(root: Path) -> None:
    shown = mote("status", "--root", root)
    assert shown.code == 0
    lines = [line.strip() for line in shown.out.splitlines()]
    for words in (
        "5 videos, 1 failed; 2 classes",
        "splits: train 4, val 1",
        "tiny, uniform:4",
        "11 rows, 2 failed; 2 views of 4 frames",
        "trained on clips: 1 of 30 epochs",
    ):
        assert words in lines
    for begin in (
        "data set clips, ",
        "store clips/tiny--uniform-4, complete, ",
        "store other/half, 1 of 2 tars, ",
        "head first, ",
        "encoder tiny, ",
        "close-set 71.5 % on clips, 2001-",
        "zero-shot 40.0 % on clips, 2001-",
    ):
        assert any(line.startswith(begin) for line in lines), begin


def test_status_fits_a_window_of_80_columns(root: Path) -> None:
    lines = mote("status", "--root", "work", cwd=root.parent, width=80).out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("next: ")) <= 80


def test_status_as_json(root: Path) -> None:
    value = done("status", "--root", root)
    assert [each["name"] for each in value["datasets"]] == ["clips", "new"]
    assert value["heads"][0]["newest"]["closeset"]["top1"] == 71.5
    assert value["stores"][0]["complete"] is True
    about = {step["about"]: step for step in value["next"]}
    assert about.keys() == {"new", "other/half", "second"}
    assert about["new"]["missing"] == "packed, not extracted"
    assert shlex.split(about["new"]["command"])[:4] == ["mote-cli", "extract", "--dataset", "new"]
    assert about["other/half"] == {
        "about": "other/half",
        "missing": "1 of 2 tars extracted; data set other is not here",
        "command": None,
    }
    assert about["second"]["command"] is None
    assert "--resume" in about["second"]["missing"]


def test_damage_is_a_line_and_no_end(root: Path) -> None:
    (root / "heads/first/config.json").write_text("{")
    (root / "features/clips/tiny--uniform-4.zarr/zarr.json").write_text("\x1b[31m")
    shown = mote("status", "--root", root)
    assert shown.code == 0
    problems = [line for line in shown.out.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 2
    assert "other/half" in shown.out


def test_following_the_next_lines_leads_to_a_workspace_that_lacks_nothing(
    own: World, tmp_path: Path
) -> None:
    """Each command that `status` names works when it is pasted, and takes a step."""
    place = ("--root", own.root)
    shutil.rmtree(own.root / "features")
    taken: list[str] = []
    while steps := done("status", *place)["next"]:
        command = steps[0]["command"]
        assert command not in taken
        taken.append(command)
        words = shlex.split(command)
        assert words[0] == "mote-cli"
        assert mote(*words[1:]).code == 0, command
        assert len(taken) < 10
    assert [shlex.split(command)[1] for command in taken] == ["extract", "eval", "eval", "eval"]
    assert mote("status", *place).out.endswith("next: nothing is missing\n")
    doctor = mote("doctor", *place)
    assert doctor.out.endswith("next: nothing is missing\n")


def test_an_empty_workspace_is_told_how_to_begin(tmp_path: Path) -> None:
    commands = [step["command"] for step in done("status", "--root", tmp_path / "none")["next"]]
    assert commands == ["mote-cli demo", "mote-cli pack --help"]
    assert not (tmp_path / "none").exists()


def test_doctor_ends_with_what_to_do_next(root: Path) -> None:
    shown = mote("doctor", "--root", root).out.splitlines()
    assert shown[-3].startswith("next: new: packed, not extracted: `mote-cli extract --dataset new")
    assert len(done("doctor", "--root", root)["next"]) == 3


def test_what_an_encoder_does_not_say_is_a_dash(root: Path) -> None:
    shown = mote("inspect", root / "encoders/tiny")
    assert any(line.split() == ["architecture", "-"] for line in shown.out.splitlines())


def test_inspect_takes_a_root_a_folder_or_a_name(root: Path) -> None:
    place = ("--root", root)
    assert done("inspect", root) == done("status", *place)
    by_name = done("inspect", "clips", *place)
    assert by_name == done("inspect", root / "datasets/clips")
    assert (by_name["kind"], by_name["videos_failed"]) == ("dataset", 1)
    assert by_name["stores"] == ["clips/tiny--uniform-4"]
    assert by_name["heads"] == ["first", "second"]
    run = done("inspect", "first", *place)
    assert run == done("inspect", root / "heads/first")
    assert (run["kind"], run["finished"]) == ("run", True)
    assert run["newest"]["closeset"]["top1"] == 71.5
    assert "closeset clips 71.5" in mote("inspect", "first", *place).out
    assert "--resume" in done("inspect", "second", *place)["next"][0]
    assert done("inspect", "half", *place)["kind"] == "store"
    assert done("inspect", "other", *place)["stores"] == ["other/half"]
    assert done("inspect", "tiny", *place)["stores"] == ["clips/tiny--uniform-4", "other/half"]


def test_inspect_suggests_a_near_name(root: Path) -> None:
    line = refused(2, "inspect", "frist", "--root", root)
    assert "frist does not exist: did you mean first? give the folder" in line
