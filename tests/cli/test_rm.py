"""`rm` shows what goes, asks for it on a terminal, and needs --yes elsewhere."""

from __future__ import annotations

import io
from pathlib import Path
from unittest import mock

import pytest

from featstore.files.locks import claimed
from tests.support.processes.command_line import Result, done, mote, refused
from tests.support.stores.small_workspace import small_workspace


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return small_workspace(tmp_path / "work").root


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def answered(answer: str, *arguments: str | Path) -> Result:
    with mock.patch("sys.stdin", Terminal(f"{answer}\n")):
        return mote(*arguments)


def test_without_a_terminal_only_yes_removes(root: Path) -> None:
    words = ("rm", "store", "tiny--uniform-4", "--root", root)
    with mock.patch("sys.stdin", io.StringIO("y\n")):
        shown = mote(*words)
    assert shown.code == 2
    assert "add --yes" in shown.error
    lines = shown.err.splitlines()
    assert lines[0].startswith("goes: store clips/tiny--uniform-4 (11 rows, ")
    assert "  head first: was trained on it; stays" in lines
    assert (root / "features/clips/tiny--uniform-4.zarr").is_dir()
    removed = done(*words, "--yes")
    assert [each["name"] for each in removed["removed"]] == ["clips/tiny--uniform-4"]
    assert removed["bytes"] == removed["removed"][0]["bytes"] > 0
    assert not (root / "features/clips/tiny--uniform-4.zarr").exists()
    assert "no store 'tiny--uniform-4'" in refused(2, *words, "--yes")


@pytest.mark.parametrize(("answer", "gone"), [("y", True), ("n", False), ("", False)])
def test_a_terminal_is_asked(root: Path, answer: str, gone: bool) -> None:
    shown = answered(answer, "rm", "head", "first", "--root", root)
    assert shown.code == 0
    assert shown.out.startswith("removed 1, " if gone else "nothing was removed")
    assert (root / "heads/first").exists() is not gone


def test_several_at_once_are_all_found_before_one_goes(root: Path) -> None:
    line = refused(2, "rm", "head", "first", "none", "--yes", "--root", root)
    assert "no head 'none'" in line
    assert (root / "heads/first").is_dir()
    removed = done("rm", "head", "first", "second", "--yes", "--root", root)["removed"]
    assert [each["name"] for each in removed] == ["first", "second"]


def test_what_is_in_use_is_refused_with_the_process(root: Path) -> None:
    with claimed(root / "heads/second/state/lock", [0], str):
        line = refused(1, "rm", "head", "second", "--yes", "--root", root)
    assert "is working on head second: wait for it or stop it" in line
