"""`mote-cli extract --tier`: its store, its words, kill -9 in the middle, a disk that is full."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from featstore import open_store, verify
from tests.support.processes.command_line import done, mote, refused
from tests.support.processes.processes import Commands, Running, command_starter
from tests.support.stores.store_files import committed, store_files
from tests.support.worlds.tiny_world import packed_workspace

TARS, PER_TAR = 6, 3
NAMES = {"frames": "tiny--uniform-8--frames.zarr", "tokens:1": "tiny--uniform-8--tokens-1.zarr"}
TIERS = pytest.mark.parametrize("tier", list(NAMES))


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with command_starter(tmp_path_factory.mktemp("output")) as commands:
        yield commands


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_workspace(tmp_path_factory.mktemp("packed"), TARS, PER_TAR)


@pytest.fixture
def root(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "root")
    return tmp_path / "root"


def extract(root: Path, tier: str) -> tuple[str, ...]:
    return (
        *("extract", "--dataset", "clips", "--encoder", "tiny", "--sampling", "uniform:8"),
        *("--precision", "fp32", "--root", str(root), "--tier", tier),
    )


def store_of(root: Path, tier: str) -> Path:
    return root / "features/clips" / NAMES[tier]


@pytest.mark.parametrize("tier", ["frames", pytest.param("tokens:1", marks=pytest.mark.slow)])
def test_kill_9_while_rows_are_put(
    commands: Commands, packed: Path, root: Path, tmp_path: Path, tier: str
) -> None:
    shutil.copytree(packed, tmp_path / "whole")
    assert done(*extract(tmp_path / "whole", tier))["partitions_done"] == TARS
    store = store_of(root, tier)
    shards = store / "features" / "c"
    hit = 0
    while hit < 2:
        running = commands.start(*extract(root, tier))
        before = len(committed(store))

        def at_work(running: Running = running, before: int = before) -> bool:
            """Rows lie in a shard in the making, or the command has ended."""
            making = any(shards.rglob("*.partial")) and len(committed(store)) > before
            return making or not running.alive

        running.until(at_work)
        if running.kill() != -signal.SIGKILL:
            break
        hit += 1
    assert hit
    again = commands.start(*extract(root, tier))
    assert again.end() == 0, again.words
    assert store_files(store) == store_files(store_of(tmp_path / "whole", tier))
    assert verify(store, deep=True).ok


@TIERS
def test_what_the_commands_say(root: Path, tier: str) -> None:
    words = mote(*extract(root, tier), "--dry-run")
    size = 8 * {"frames": 32 * 32 * 3, "tokens:1": 5 * 32 * 2}[tier]
    assert f"({tier}: {size / 1e3:.2f} kB a video)" in " ".join(words.out.split())
    assert done(*extract(root, tier), "--dry-run")["bytes_per_row"] == size
    assert not store_of(root, tier).exists()
    told = mote(*extract(root, tier))
    assert (told.code, "train-head" in told.out) == (0, False)
    assert f"to write: 18 rows of {size / 1e3:.2f} kB each ({tier}), " in " ".join(told.err.split())
    facts = done("inspect", store_of(root, tier))
    assert (facts["tier"], facts["dim"]) == (tier, 32)
    assert facts["item"] == {"frames": [32, 32, 3], "tokens:1": [5, 32]}[tier]
    name = NAMES[tier]
    zeroshot = ("eval", "--head", "mean", "--zeroshot", "clips")
    for command in (("train-head", "--dataset", "clips"), zeroshot):
        line = refused(2, *command, "--store", name, "--root", root)
        assert f"holds {tier}, not the embeddings" in line
    found = done("verify", store_of(root, tier), "--deep", "--reencode", "2", "--root", root)
    assert found["reencoded"]["equal"] == 2
    # The command that repairs is the one that made it.
    shard = next((store_of(root, tier) / "features/c/2").rglob("0"))
    while shard.is_dir():
        shard /= "0"
    raw = bytearray(shard.read_bytes())
    raw[5] ^= 1
    shard.write_bytes(raw)
    report = mote("verify", store_of(root, tier), "--deep", "--root", root, "--json")
    assert report.code == 1
    assert f"--tier {tier}" in report.json["repair"]
    assert done(*extract(root, tier))["partitions_done"] == 1


def test_a_tier_that_is_unknown(root: Path) -> None:
    assert "choose embeddings, frames, or tokens:K" in refused(2, *extract(root, "tokens:-1"))
    assert "has 2 blocks, counted from 0" in refused(2, *extract(root, "tokens:2"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with little room; skipped where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_is_filled_by_others(
    packed: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = small_disk / "root"
    shutil.copytree(packed, root)
    others = small_disk / "others"
    room = 3 * PER_TAR * 8 * 32 * 32 * 3
    others.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - room))
    assert "make room" in refused(1, *extract(root, "frames"))
    assert not store_of(root, "frames").exists()
    monkeypatch.setattr("featstore.files.disk.SPARE_BYTES", -(10**9))  # as if there had been room
    assert "No space left on device" in refused(1, *extract(root, "frames"))
    store = open_store(store_of(root, "frames"))
    assert len(list(store.partitions())) < TARS
    assert verify(store.path, deep=True).ok
    os.unlink(others)
    done(*extract(root, "frames"))
    assert verify(store.path, deep=True).rows_ok == TARS * PER_TAR
