"""`mote-cli extract` with data set, store or both on S3-compatible storage: the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from featstore import open_store
from featstore.remote.objects import ObjectFolder
from tests.support.processes.command_line import done, mote, refused
from tests.support.servers.s3_server import ACCESS_KEY, SECRET_KEY, FailingProxy
from tests.support.worlds.tiny_world import SHORT_TRAINING, World

DATASET = "datasets/clips"


@pytest.fixture
def uploaded(world: World, bucket: str) -> str:
    """URL of a workspace that holds the packed data set and nothing else."""
    objects = ObjectFolder(f"{bucket}/work space")
    for path in (world.root / DATASET).rglob("*"):
        if path.is_file() and ".packing" not in path.parts:
            objects.put(str(path.relative_to(world.root)), path)
    return objects.url


def arguments(world: World, *places: str | Path) -> list[str | Path]:
    return [
        *("extract", "--dataset", "clips", "--encoder", world.encoder, "--sampling", "uniform:4"),
        *("--precision", "fp32", "--workers", "2", *places),
    ]


def contents(store: Path) -> dict[str, bytes]:
    """Files of a store that may not differ between two runs (a commit entry holds the time)."""
    return {
        name: path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and not (name := str(path.relative_to(store))).startswith("commit/c")
    }


def remote_contents(url: str) -> dict[str, bytes]:
    objects = ObjectFolder(url)
    return {
        name: objects.get_bytes(name, 10**8)
        for name in sorted(objects.list())
        if not name.startswith("commit/c")
    }


def test_everything_remote(
    world: World, uploaded: str, tmp_path: Path, proxy: FailingProxy
) -> None:
    command = arguments(world, "--root", uploaded)
    proxy.fail = ["ok", "503", "drop", "ok", 1000, "ok", "503", 2000] * 4
    first: dict[str, Any] = done(*command)
    assert first["store"] == f"{uploaded}/features/clips/{world.store.name}"
    assert first["rows_ok"] == world.printed["extract"]["rows_ok"]
    assert first["partitions_done"] == world.printed["extract"]["partitions_done"]
    local, remote = contents(world.store), remote_contents(first["store"])
    assert remote == local
    assert list((tmp_path / "cache" / "scratch").glob("*/shards/*")) == []

    again = done(*command)
    assert (again["partitions_done"], again["partitions_skipped"]) == (0, len(_tars(local)))
    assert contents(open_store(first["store"]).path) == local

    # What was fetched to read it is trained on as a local store is.
    trained = done(
        *("train-head", "--dataset", "clips", "--head", "mean", "--frames", "4", *SHORT_TRAINING),
        *(
            "--split",
            "train",
            "--precision",
            "fp32",
            "--store",
            first["store"],
            "--root",
            tmp_path / "root",
        ),
    )
    assert trained


def test_a_local_data_set_into_a_remote_store_and_the_reverse(
    world: World, uploaded: str, bucket: str, tmp_path: Path
) -> None:
    url = f"{bucket}/stores/x.zarr"
    printed = done(*arguments(world, "--root", world.root, "--store", url))
    assert printed["store"] == url
    assert remote_contents(url) == contents(world.store)

    here = tmp_path / "here.zarr"
    done(*arguments(world, "--root", uploaded, "--store", here))
    assert contents(here) == contents(world.store)


def test_shares_of_a_remote_store(world: World, uploaded: str, bucket: str) -> None:
    for part in ("0/2", "1/2"):
        printed = done(*arguments(world, "--root", uploaded, "--partition", part))
        assert printed["partition"] == part
    assert printed["partitions_missing"] == 0
    assert remote_contents(printed["store"]) == contents(world.store)


def test_a_dry_run_writes_nothing(world: World, uploaded: str) -> None:
    printed = done(*arguments(world, "--root", uploaded, "--dry-run"))
    assert printed["store"].startswith(uploaded)
    assert printed["videos_sampled"] > 0
    assert not [name for name in ObjectFolder(uploaded).list() if name.startswith("features")]


def test_a_remote_tar_that_is_gone(world: World, uploaded: str) -> None:
    objects = ObjectFolder(uploaded)
    tar = sorted(name for name in objects.list() if name.endswith(".tar"))[0]
    content = objects.get_bytes(tar, 10**8)
    objects.delete(tar)
    error = refused(1, *arguments(world, "--root", uploaded))
    assert f"{uploaded}/{tar} is missing" in error
    objects.put(tar, content)
    printed = done(*arguments(world, "--root", uploaded))
    assert printed["partitions_done"] == 1
    assert remote_contents(printed["store"]) == contents(world.store)


def test_mistakes_are_one_line_without_secrets(
    world: World, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [
        refused(2, *arguments(world, "--root", bucket)),
        refused(2, *arguments(world, "--root", f"s3://{ACCESS_KEY}:{SECRET_KEY}@bucket")),
        refused(2, *arguments(world, "--root", "http://host/bucket")),
        refused(2, "pack", "--dataset", "x", "--videos", world.videos, "--root", bucket),
        refused(1, *arguments(world, "--root", "s3://no-such-bucket/x")),
    ]
    monkeypatch.setenv("MOTE_RETRY_SECONDS", "0.2")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    told.append(refused(1, *arguments(world, "--root", bucket)))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    told.append(refused(2, *arguments(world, "--root", bucket)))
    for error, words in zip(
        told,
        (
            f"no dataset.json at {bucket}/datasets/clips",
            "URL holds credentials",
            "a URL with http does not name remote storage",
            "looks like a URL: only `mote-cli extract`",
            "there is no bucket 'no-such-bucket'",
            "cannot be reached (no connection",
            "set AWS_ACCESS_KEY_ID",
        ),
        strict=True,
    ):
        assert words in error
        assert ACCESS_KEY not in error
        assert SECRET_KEY not in error


def test_the_summary_in_words(world: World, uploaded: str) -> None:
    result = mote(*arguments(world, "--root", uploaded))
    assert result.code == 0
    assert f"--store '{uploaded}/features/clips/" in result.out
    assert SECRET_KEY not in result.out + result.err


def _tars(files: dict[str, bytes]) -> list[str]:
    return [name for name in files if name.startswith("features/c/")]


@pytest.mark.slow
def test_killed_and_run_again(
    world: World, uploaded: str, proxy: FailingProxy, tmp_path: Path
) -> None:
    """The command itself, with kill -9 while it makes the store, fetches, and puts."""
    command = [str(word) for word in arguments(world, "--root", uploaded)]
    for step in (12, 40, 61):
        proxy.requests.clear()
        with subprocess.Popen(
            [sys.executable, "-m", "cli.main", *command],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            stderr=subprocess.DEVNULL,
        ) as running:
            proxy.before = lambda number, step=step, running=running: (  # type: ignore[misc]
                running.kill() if number == step else None
            )
        assert running.returncode == -signal.SIGKILL
    proxy.before = lambda number: None
    printed = done(*command)
    assert printed["partitions_skipped"] > 0
    assert remote_contents(printed["store"]) == contents(world.store)
    assert not list((tmp_path / "cache" / "scratch").iterdir())
