"""A small data set that went through every command once; tests that change it take a copy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.support.processes.command_line import done
from tests.support.worlds.tiny_world import SHORT_TRAINING, World, make_clips, make_encoder


@pytest.fixture(scope="package", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Half of the time of these tests would be syncs; tests/featstore has those that need them."""
    with mock.patch("os.fsync"):
        yield


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(videos, encoder folder), never changed."""
    folder = tmp_path_factory.mktemp("inputs")
    return make_clips(folder / "videos"), make_encoder(folder / "tiny")


@pytest.fixture(scope="session")
def world(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    """The workspace after pack, extract, three train-heads and evals; never changed."""
    videos, encoder = inputs
    root = tmp_path_factory.mktemp("world") / "mote-data"
    place = ("--root", root)
    printed = {
        "pack": done(
            *("pack", "--dataset", "clips", "--videos", videos, "--samples-per-shard", "4", *place)
        ),
        "extract": done(
            *("extract", "--dataset", "clips", "--encoder", encoder, "--sampling", "uniform:4"),
            *("--precision", "fp32", "--workers", "2", *place),
        ),
    }
    for head in ("mean", "transformer", "mote"):
        printed[f"train-head {head}"] = done(
            *("train-head", "--dataset", "clips", "--head", head, "--frames", "4"),
            *(*SHORT_TRAINING, "--precision", "fp32", *place),
        )
    return World(videos, encoder, root, printed)


@pytest.fixture
def own(world: World, tmp_path: Path) -> World:
    """A copy of the workspace that a test may change."""
    root = tmp_path / "mote-data"
    shutil.copytree(world.root, root)
    store = root / world.store.relative_to(world.root)
    printed = {**world.printed, "extract": {**world.printed["extract"], "store": str(store)}}
    return World(world.videos, world.encoder, root, printed)
