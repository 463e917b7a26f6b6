"""Commands that are killed or interrupted, in real processes: finished work is kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from featstore import StoreWriter, open_store
from tests.support.processes.command_line import done, refused
from tests.support.processes.processes import DEADLINE_S, Commands, Running, command_starter
from tests.support.worlds.media import make_video
from tests.support.worlds.tiny_world import SHORT_TRAINING, World

EXTRACT = ("extract", "--dataset", "clips", "--sampling", "uniform:4", "--precision", "fp32")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with command_starter(tmp_path_factory.mktemp("output")) as commands:
        yield commands


@pytest.fixture(scope="module")
def packed(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with 18 clips in 18 tars."""
    root = tmp_path_factory.mktemp("packed") / "root"
    done(
        *("pack", "--dataset", "clips", "--videos", inputs[0], "--samples-per-shard", "1"),
        *("--root", root),
    )
    return root


@pytest.fixture
def root(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "root")
    return tmp_path / "root"


def committed(root: Path) -> set[str]:
    return {path.parent.name for path in root.glob("features/clips/*.zarr/commit/c/*/0")}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the commit entries, which hold the time of writing."""
    return {
        name: path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not (name := str(path.relative_to(folder))).startswith("commit/c/")
    }


@pytest.fixture(scope="module")
def uninterrupted(
    packed: Path, inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("whole") / "root"
    shutil.copytree(packed, root)
    return Path(done(*EXTRACT, "--encoder", inputs[1], "--root", root)["store"])


def assert_continues(root: Path, encoder: Path, whole: Path) -> None:
    """The same command does what is missing, and only that; the store is bit for bit the same."""
    before = committed(root)
    store = root / "features/clips" / whole.name
    entries = {tar: (store / f"commit/c/{tar}/0").read_bytes() for tar in before}
    shards = {tar: (store / f"features/c/{tar}/0/0/0").stat().st_mtime_ns for tar in before}
    result = done(*EXTRACT, "--encoder", encoder, "--root", root)
    assert (result["partitions_done"], result["partitions_skipped"]) == (
        18 - len(before),
        len(before),
    )
    assert contents(store) == contents(whole)
    assert {tar: (store / f"commit/c/{tar}/0").read_bytes() for tar in before} == entries
    assert shards == {tar: (store / f"features/c/{tar}/0/0/0").stat().st_mtime_ns for tar in before}
    mine, theirs = open_store(store), open_store(whole)
    assert (mine.keys, mine.reasons) == (theirs.keys, theirs.reasons)
    np.testing.assert_array_equal(mine.features(mine.rows), theirs.features(theirs.rows))


def test_kill_9_loses_at_most_the_tar_in_flight(
    commands: Commands, root: Path, inputs: tuple[Path, Path], uninterrupted: Path
) -> None:
    arguments = (*EXTRACT, "--encoder", inputs[1], "--root", root)
    for commits in (0, 1, 5, 10):
        # With 0: as soon as there is a store at all, or before.
        exists = root / "features" / "clips"
        running = commands.start(*arguments)
        code = running.stop(
            lambda n=commits, p=exists: p.exists() and len(committed(root)) >= n, signal.SIGKILL
        )
        assert code == -signal.SIGKILL
        assert commits <= len(committed(root)) < 18
    assert_continues(root, inputs[1], uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_extract(
    commands: Commands, root: Path, inputs: tuple[Path, Path], uninterrupted: Path, number: int
) -> None:
    arguments = (*EXTRACT, "--encoder", inputs[1], "--root", root)
    running = commands.start(*arguments)
    assert running.stop(lambda: len(committed(root)) >= 2, number) == 130
    assert_one_line(running)
    assert 2 <= len(committed(root)) < 18
    assert_continues(root, inputs[1], uninterrupted)


def assert_one_line(running: Running) -> None:
    assert running.words.count("error:") == 1, running.words
    assert "error: interrupted: finished work is kept" in running.words
    assert "Traceback" not in running.words
    assert "Exception" not in running.words
    assert running.out.read_text() == ""
    # No terminal: plain lines.
    assert "\x1b" not in running.words
    assert "\r" not in running.words


@pytest.fixture(scope="module")
def long_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips that keep a worker busy for a while."""
    folder = tmp_path_factory.mktemp("long")
    data = make_video(None, frames=120, width=640, height=480)
    for name in ("a", "b"):
        for i in range(6):
            path = folder / "videos" / name / f"{i}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    done("pack", "--dataset", "clips", "--videos", folder / "videos", "--root", folder / "root")
    return folder


@pytest.mark.parametrize(
    "signals",
    [pytest.param((signal.SIGINT,), marks=pytest.mark.slow), (signal.SIGINT, signal.SIGINT)],
)
def test_interrupting_busy_workers(
    commands: Commands,
    long_clips: Path,
    inputs: tuple[Path, Path],
    tmp_path: Path,
    signals: tuple[int, ...],
) -> None:
    """The second Ctrl-C of an impatient person ends the process at once, also without a trace."""
    shutil.copytree(long_clips / "root", tmp_path / "root")
    arguments = ("extract", "--dataset", "clips", "--sampling", "uniform:64", "--workers", "2")
    running = commands.start(*arguments, "--encoder", inputs[1], "--root", tmp_path / "root")
    store = tmp_path / "root/features/clips/tiny--uniform-64.zarr"
    code = running.stop(store.is_dir, *signals)
    assert not committed(tmp_path / "root")
    if len(signals) == 1 or code == 130:
        assert code == 130
        assert_one_line(running)
    else:
        assert code == -signal.SIGINT
        assert "Traceback" not in running.words
    after = done(*arguments, "--encoder", inputs[1], "--root", tmp_path / "root")
    assert after["rows_ok"] == 12


def test_interrupting_pack(
    commands: Commands, packed: Path, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    pack = ("pack", "--dataset", "clips", "--videos", inputs[0], "--samples-per-shard", "1")
    shards = tmp_path / "root/datasets/clips/shards"
    running = commands.start(*pack, "--root", tmp_path / "root")
    assert running.stop(lambda: len(list(shards.glob("*.tar"))) >= 2, signal.SIGINT) == 130
    assert_one_line(running)
    assert not (shards.parent / "dataset.json").exists()
    result = done(*pack, "--root", tmp_path / "root")
    assert result["shards_skipped"] >= 1
    assert {p.name: p.read_bytes() for p in shards.iterdir()} == {
        p.name: p.read_bytes() for p in (packed / "datasets/clips/shards").iterdir()
    }
    assert (shards.parent / "dataset.json").read_bytes() == (
        packed / "datasets/clips/dataset.json"
    ).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupting_train_head(
    commands: Commands, uninterrupted: Path, tmp_path: Path, number: int
) -> None:
    root = tmp_path / "root"
    shutil.copytree(uninterrupted.parents[2] / "features", root / "features")
    train = ("train-head", "--dataset", "clips", "--frames", "4", "--precision", "fp32")
    train += (*SHORT_TRAINING, "--epochs", "30", "--root", str(root))
    metrics = root / "heads/stopped/metrics.jsonl"
    running = commands.start(*train, "--name", "stopped")
    code = running.stop(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 3, number)
    assert code == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert_one_line(running)
        assert "--resume" in running.words
    assert not (root / "heads/stopped/head.safetensors").exists()
    resumed = done(*train, "--name", "stopped", "--resume")
    assert 3 <= resumed["resumed_from"] < 30
    done(*train, "--name", "whole")
    assert (root / "heads/stopped/head.safetensors").read_bytes() == (
        root / "heads/whole/head.safetensors"
    ).read_bytes()


def test_two_processes_do_not_write_one_store(
    uninterrupted: Path, inputs: tuple[Path, Path]
) -> None:
    root = uninterrupted.parents[2]
    (uninterrupted / "commit/c/0/0").unlink()
    with StoreWriter.open(uninterrupted).claim([0]):
        line = refused(1, *EXTRACT, "--encoder", inputs[1], "--root", root)
    assert f"another process (pid {os.getpid()} on " in line
    assert "is writing partition 0 of" in line
    done(*EXTRACT, "--encoder", inputs[1], "--root", root)


def test_the_installed_command(world: World) -> None:
    """The console script itself, once: no terminal, plain lines, exit code."""
    script = Path(sys.executable).with_name("mote-cli")
    ended = subprocess.run(
        [script, "eval", "--closeset", "clips", "--root", world.root, "--head", "none"],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: no trained head 'none'")
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""


def test_help_needs_no_torch() -> None:
    code = "import sys, cli.main; sys.exit('torch' in sys.modules or 'av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
