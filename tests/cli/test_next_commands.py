"""The next command that each command names works when it is typed as it stands there."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes.command_line import Result, mote, refused
from tests.support.worlds.tiny_world import SHORT_TRAINING, make_encoder


def named(result: Result, name: str = "next") -> list[str]:
    """The words of the command behind "next"."""
    assert result.code == 0, result.err
    (line,) = [line for line in result.out.splitlines() if line.split()[:1] == [name]]
    program, *words = shlex.split(line.removeprefix(name))
    assert program == "mote-cli"
    return words


@pytest.mark.parametrize("by", ["option", "environment"])
def test_from_videos_to_numbers(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    videos, encoder = inputs
    root = tmp_path / "a workspace"
    place = ["--root", str(root)]
    monkeypatch.chdir(tmp_path)
    if by == "environment":
        monkeypatch.setenv("MOTE_ROOT", str(root))
        place = []
    words = named(mote("pack", "--dataset", "clips", "--videos", videos, *place))
    assert ("--root" in words) is (by == "option")
    small = ("--encoder", encoder, "--sampling", "uniform:4", "--precision", "fp32")
    words = named(mote(*words, *small))
    words = named(mote(*words, *SHORT_TRAINING, "--frames", "4"))
    assert mote(*words).code == 0
    tuned = mote(
        *("finetune", "--dataset", "clips", "--encoder", encoder, "--name", "tuned", *place),
        *("--epochs", "1", "--batch-size", "4", "--frames", "4", "--layers", "1"),
    )
    # The store of the split that is evaluated: no head is trained on it.
    assert mote(*named(mote(*named(tuned), "--precision", "fp32")), "--head", "tuned").code == 0
    assert mote(*named(tuned, "then")).code == 0


def test_a_store_elsewhere_is_looked_at(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads look for stores in the workspace only."""
    videos, encoder = inputs
    monkeypatch.chdir(tmp_path)
    extract = named(mote("pack", "--dataset", "clips", "--videos", videos))
    small = ("--encoder", encoder, "--sampling", "uniform:4", "--precision", "fp32")
    assert mote(*named(mote(*extract, *small, "--store", "my own.zarr"))).code == 0


def test_words_that_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("first", str(tmp_path)):
        assert "mote-data/heads/RUN" in refused(2, "inspect", path)
    make_encoder(tmp_path / "mote-data/encoders/mine")
    config = tmp_path / "mote-data/encoders/mine/open_clip_config.json"
    config.write_text(config.read_text()[:50])
    (tmp_path / "clip.mp4").touch()
    predict = ("predict", "clip.mp4", "--classes", "a,b", "--head", "mean", "--encoder")
    assert "fetch or write it again" in refused(2, *predict, "mine")
    assert "no name under encoders/ of the workspace" in refused(2, *predict, "other")


def test_tables_are_not_folded_for_a_file() -> None:
    """Only a terminal, or COLUMNS, has a width."""
    without = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    for columns, whole in ((None, True), ("60", False)):
        listed = subprocess.run(
            [sys.executable, "-m", "cli.main", "protocols", "list"],
            env=without | ({} if columns is None else {"COLUMNS": columns}),
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("│ Something-Something V2 close-set" in listed.stdout) is whole
        assert (max(map(len, listed.stdout.splitlines())) > 60) is whole
