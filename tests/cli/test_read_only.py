"""A workspace that cannot be written: what only reads works, and what writes names the file."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes.command_line import done
from tests.support.processes.processes import Commands, Running, command_starter
from tests.support.worlds.tiny_world import SHORT_TRAINING, World

# Modes do not stop root, unless it gives up the right to pass over them.
HELD_TO_MODES = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner")


def held_to_modes() -> tuple[str, ...]:
    if os.geteuid() != 0:
        return ()
    if shutil.which("setpriv") is None or subprocess.run([*HELD_TO_MODES, "true"]).returncode:
        pytest.skip("as root, and setpriv cannot take away the right to pass over modes")
    return HELD_TO_MODES


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with command_starter(tmp_path_factory.mktemp("output"), *held_to_modes()) as commands:
        yield commands


def modes(folder: Path, change: int) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222 | change)


@pytest.fixture(scope="module")
def locked(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A copy of the workspace, with one result, that nobody may write to."""
    root = tmp_path_factory.mktemp("locked") / "mote-data"
    shutil.copytree(world.root, root)
    for kind in ("--closeset", "--zeroshot"):
        done("eval", kind, "clips", "--head", "clips-mean", "--root", root)
    modes(root, 0)
    yield World(world.videos, world.encoder, root, world.printed)
    modes(root, 0o200)


def ended(started: Running, code: int) -> tuple[str, list[str]]:
    """What a command printed on stdout, and its errors."""
    assert started.end() == code, started.words
    assert "Traceback" not in started.words
    errors = [line for line in started.words.splitlines() if line.startswith("error:")]
    return started.out.read_text(), errors


def test_an_evaluation_is_printed_and_the_file_is_what_fails(
    locked: World, commands: Commands
) -> None:
    evaluating = ("eval", "--closeset", "clips", "--head", "clips-mote", "--root", locked.root)
    shown, (error,) = ended(commands.start(*evaluating), 1)
    assert "mean top-1" in shown or "top-1 %" in shown
    assert "kept as" not in shown
    assert str(locked.root / "heads/clips-mote/eval") in error
    assert "Permission denied" in error
    assert "measured and printed" in error
    sweep = commands.start(*evaluating, "--sweep", "fusion=softmax,cosine", "--json")
    ended(sweep, 1)
    assert [row["file"] for row in sweep.json["rows"]] == [None, None]
    assert not (locked.root / "heads/clips-mote/eval").exists()


@pytest.mark.parametrize(
    "words",
    [
        "status --root ROOT",
        "inspect clips --root ROOT",
        pytest.param("verify STORE --root ROOT", marks=pytest.mark.slow),
        "compare clips-mean clips-mean --root ROOT",
        "predict VIDEO --head clips-mote --out ELSEWHERE.csv --root ROOT",
        "export clips-mote --format safetensors --out ELSEWHERE --root ROOT",
        pytest.param(
            "export clips-mote --format official --out ELSEWHERE --root ROOT",
            marks=pytest.mark.slow,
        ),
        "tradeoff clips-mean --zeroshot clips --out ELSEWHERE.png --root ROOT",
    ],
)
def test_what_only_reads(locked: World, commands: Commands, words: str, tmp_path: Path) -> None:
    line = [word.replace("ELSEWHERE", str(tmp_path / "new/file")) for word in spelt(locked, words)]
    before = sorted(locked.root.rglob("*"))
    shown, errors = ended(commands.start(*line), 0)
    assert shown
    assert not errors
    assert sorted(locked.root.rglob("*")) == before
    assert len(list((tmp_path / "new").glob("file*"))) == ("ELSEWHERE" in words)


@pytest.mark.parametrize(
    ("words", "file"),
    [
        ("tradeoff clips-mean --zeroshot clips --root ROOT", "tradeoff.png"),
        pytest.param("store duplicates STORE --root ROOT", "quality", marks=pytest.mark.slow),
        pytest.param("store suspects STORE --root ROOT", "quality", marks=pytest.mark.slow),
    ],
)
def test_what_is_found_is_printed_and_the_file_is_what_fails(
    locked: World, commands: Commands, words: str, file: str
) -> None:
    line = spelt(locked, words)
    before = sorted(locked.root.rglob("*"))
    started = commands.start(*line, "--json")
    _, (error,) = ended(started, 1)
    assert started.json["figure" if "tradeoff" in words else "files"] in (None, {})
    assert f"printed, but not kept: cannot write {locked.root / file} (Permission denied)" in error
    assert "with --out" in error
    assert sorted(locked.root.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "train-head --dataset clips --name new --root ROOT TRAINING",
        "extract --dataset clips --encoder ENCODER --sampling uniform:2 --root ROOT",
        "pack --dataset clips --videos VIDEOS --samples-per-shard 4 --root ROOT",
        "pack --dataset other --videos VIDEOS --root ROOT",
        "export clips-mote --format safetensors --out ROOT/head.safetensors --root ROOT",
        "store quantize STORE --out ROOT/features/clips/half.zarr --root ROOT",
        "rm head clips-mote --yes --root ROOT",
        "predict VIDEO --head clips-mote --out ROOT/answers.csv --root ROOT",
    ],
)
def test_what_writes_names_the_place_in_one_line(
    locked: World, commands: Commands, words: str
) -> None:
    before = sorted(locked.root.rglob("*"))
    _, (error,) = ended(commands.start(*spelt(locked, words)), 1)
    assert str(locked.root) in error
    assert "Permission denied" in error
    assert sorted(locked.root.rglob("*")) == before


def spelt(locked: World, words: str) -> list[str]:
    """The words of a command, with the paths of the workspace."""
    known = {
        "ROOT": str(locked.root),
        "STORE": str(locked.root / locked.store.relative_to(locked.store.parents[2])),
        "VIDEOS": str(locked.videos),
        "VIDEO": str(next(locked.videos.rglob("*.mp4"))),
        "ENCODER": str(locked.encoder),
    }
    named = [known.get(word, word.replace("ROOT", known["ROOT"])) for word in words.split()]
    at = named.index("TRAINING") if "TRAINING" in named else None
    return named if at is None else [*named[:at], *SHORT_TRAINING, "--frames", "4"]
