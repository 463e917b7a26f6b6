"""A disk that fills up, and files that may not grow: real errors of the operating system."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from featstore import open_store, verify
from pipeline.tars.packing import pack
from tests.support.processes.command_line import done, refused
from tests.support.stores.store_files import store_files
from tests.support.worlds.tiny_world import make_clips, make_encoder

FRAMES = 512
EXTRACT = ("extract", "--dataset", "clips", "--encoder", "tiny", "--precision", "fp32",
           "--sampling", f"uniform:{FRAMES}")  # fmt: skip
TAR_BYTES = 4 * FRAMES * 32 * 2  # of the features of one tar
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a packed set of five tars."""
    root = tmp_path_factory.mktemp("full")
    make_encoder(root / "encoders" / "tiny")
    make_clips(root / "videos")
    pack(root / "videos", "clips", root / "datasets" / "clips", samples_per_shard=4)
    shutil.rmtree(root / "videos")
    return root


@pytest.fixture(scope="module")
def expected(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of an undisturbed store."""
    root = tmp_path_factory.mktemp("undisturbed") / "root"
    shutil.copytree(world, root)
    done(*EXTRACT, "--root", root)
    return store_files(store_of(root))


def store_of(root: Path) -> Path:
    return root / f"features/clips/tiny--uniform-{FRAMES}.zarr"


def test_files_that_may_not_grow(world: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    """Small arrays are written, features are not: one line, and the next run goes on."""
    root = tmp_path / "root"
    shutil.copytree(world, root)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (TAR_BYTES // 2, TAR_BYTES // 2))

    ran = subprocess.run(
        [sys.executable, "-m", "cli.main", *EXTRACT, "--root", root],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        preexec_fn=limit,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert ran.returncode == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert "File too large" in line
    assert verify(store_of(root), deep=True).ok
    assert not list(open_store(store_of(root)).partitions())
    done(*EXTRACT, "--root", root)
    assert store_files(store_of(root)) == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with little room; skipped where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_is_filled_by_others_in_the_middle(
    world: Path, small_disk: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = small_disk / "root"
    shutil.copytree(world, root)
    others = small_disk / "others"
    others.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 3 * TAR_BYTES))
    assert "make room" in refused(1, *EXTRACT, "--root", root)
    assert not store_of(root).exists()
    monkeypatch.setattr("featstore.files.disk.SPARE_BYTES", -(10**9))  # as if there had been room
    assert "No space left on device" in refused(1, *EXTRACT, "--root", root)
    store = open_store(store_of(root))
    assert 0 < len(list(store.partitions())) < store.schema.tars
    assert verify(store.path, deep=True).ok
    others.unlink()
    done(*EXTRACT, "--root", root)
    assert store_files(store_of(root)) == expected
