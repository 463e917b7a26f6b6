"""Scratch folders go with their process, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from featstore.files.scratch import ScratchFolder, cache_folder

REPOSITORY = Path(__file__).parents[3]


def test_it_goes_when_it_is_closed_or_dropped(tmp_path: Path) -> None:
    with ScratchFolder(tmp_path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
    assert not list(tmp_path.iterdir())
    dropped = ScratchFolder(tmp_path)
    assert dropped.path.is_dir()
    del dropped
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_goes_and_nothing_else(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from featstore.files.scratch import ScratchFolder\n"
        "scratch = ScratchFolder(Path(sys.argv[1]))\n"
        "(scratch.path / 'file').write_text('x'); print(scratch.path, flush=True); sys.stdin.read()"
    )
    mine = ScratchFolder(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        with ScratchFolder(tmp_path):
            assert (left / "file").exists()
        other.send_signal(signal.SIGKILL)
    assert (left / "file").exists()
    with ScratchFolder(tmp_path):
        assert not left.exists()
        assert mine.path.is_dir()


def test_many_at_once(tmp_path: Path) -> None:
    def use(_: int) -> bool:
        with ScratchFolder(tmp_path) as folder:
            (folder / "file").write_text("x")
            return folder.is_dir()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(100)))
    assert not list(tmp_path.iterdir())


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOTE_CACHE", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
    monkeypatch.delenv("MOTE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mote"
