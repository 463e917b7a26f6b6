"""Tars fetched from a real S3-compatible server: one ahead, two on disk, never a wrong one."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from featstore.errors import UserError, WorkError
from featstore.remote.objects import ObjectFolder
from pipeline.tars.dataset import Dataset, Tar
from pipeline.tars.reading import DamagedTar
from pipeline.tars.sources import TARS_ON_DISK, RemoteTars, TarSource, remote_dataset
from tests.support.servers.s3_server import FailingProxy

CONTENTS = [random.Random(i).randbytes(200_000 + i) for i in range(5)]
SHARDS = tuple(
    Tar(f"toy-{i:06d}.tar", "train", 1, (), len(data), hashlib.sha256(data).hexdigest())
    for i, data in enumerate(CONTENTS)
)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """A packed data set (its tars are no tars: nothing here opens them)."""
    return Dataset(
        folder=tmp_path / "packed",
        name="toy",
        class_names=("throw",),
        raw_class_names=("throw",),
        split_names=("train",),
        splits_disjoint=True,
        tars=SHARDS,
        keys_by_split={"train": [f"clip{i}" for i in range(5)]},
    )


@pytest.fixture
def url(bucket: str, dataset: Dataset, tmp_path: Path) -> str:
    """URL of the packed data set."""
    dataset.write()
    objects = ObjectFolder(f"{bucket}/datasets/toy")
    objects.put("dataset.json", tmp_path / "packed" / "dataset.json")
    for shard, data in zip(SHARDS, CONTENTS, strict=True):
        objects.put(f"shards/{shard.file}", data)
    return objects.url


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.fixture
def tars(url: str, dataset: Dataset, scratch: Path) -> Iterator[RemoteTars]:
    source = RemoteTars(url, dataset, scratch)
    yield source
    source.close()
    assert on_disk(scratch) == []


def on_disk(scratch: Path) -> list[str]:
    return sorted(path.name for path in scratch.rglob("*") if path.is_file())


def test_the_data_set_is_the_one_that_was_packed(url: str, scratch: Path) -> None:
    dataset = remote_dataset(url, scratch)
    assert dataset.tars == SHARDS
    assert dataset.listed == 5


def test_a_data_set_that_cannot_be_used(url: str, scratch: Path) -> None:
    objects = ObjectFolder(url)
    objects.put(
        "dataset.json", objects.get_bytes("dataset.json", 10**6).replace(b"clip3", b"clip9")
    )
    with pytest.raises(WorkError, match=f"{url}/dataset.json' is damaged or was edited") as error:
        remote_dataset(url, scratch)
    assert str(scratch) not in str(error.value)
    objects.delete("dataset.json")
    with pytest.raises(UserError, match=f"no dataset.json at {url}: pack the data set"):
        remote_dataset(url, scratch)


def test_every_tar_in_order_and_never_more_than_two(
    url: str, tars: TarSource, scratch: Path
) -> None:
    tars.open_order(SHARDS)
    for shard, data in zip(SHARDS, CONTENTS, strict=True):
        path = tars.path(shard)
        assert path.read_bytes() == data
        assert tars.path(shard) == path
        assert len(on_disk(scratch)) <= TARS_ON_DISK
        tars.release(shard)
        assert not path.exists()


def test_the_next_tar_comes_while_one_is_in_use(
    url: str, tars: RemoteTars, dataset: Dataset, scratch: Path, proxy: FailingProxy
) -> None:
    tars = RemoteTars(url, dataset, scratch)  # through the proxy
    tars.open_order(SHARDS)
    tars.path(SHARDS[0])
    # Fetched without having been asked for; what comes after it would be a third on disk.
    tars._fetches[SHARDS[1].file].result(timeout=30)
    assert [path.rpartition("/")[2] for _, path, _ in proxy.requests] == [
        s.file for s in SHARDS[:2]
    ]
    before = len(proxy.requests)
    tars.path(SHARDS[1])
    assert len(proxy.requests) == before
    tars.release(SHARDS[0])
    tars._fetches[SHARDS[2].file].result(timeout=30)
    tars.close()


def test_another_order_than_announced_and_more_than_two_in_use(
    tars: RemoteTars, scratch: Path
) -> None:
    tars.open_order(SHARDS)
    paths = {i: tars.path(SHARDS[i]) for i in (4, 2, 0, 3, 1)}
    assert all(path.read_bytes() == CONTENTS[i] for i, path in paths.items())
    for shard in SHARDS:
        tars.release(shard)
    assert tars.path(SHARDS[3]).read_bytes() == CONTENTS[3]


def test_a_flaky_way(url: str, dataset: Dataset, scratch: Path, proxy: FailingProxy) -> None:
    tars = RemoteTars(url, dataset, scratch)
    proxy.fail = ["503", 50_000, "drop", 100, 0, "503", "ok", 150_000]
    tars.open_order(SHARDS)
    for shard, data in zip(SHARDS, CONTENTS, strict=True):
        assert tars.path(shard).read_bytes() == data
        tars.release(shard)
    tars.close()


def test_tars_that_are_not_those_packed(url: str, tars: RemoteTars) -> None:
    objects = ObjectFolder(f"{url}/shards")
    gone, short, other = (shard.file for shard in SHARDS[:3])
    objects.delete(gone)
    objects.put(short, CONTENTS[1][:-1])
    objects.put(other, CONTENTS[2][::-1])
    tars.open_order(SHARDS)
    for shard, what in (
        (SHARDS[0], "is missing"),
        (SHARDS[1], "has 200000 bytes, not 200001"),
        (SHARDS[2], "is damaged: its sha256 differs from the packed file's"),
    ):
        with pytest.raises(DamagedTar, match=f"{url}/shards/{shard.file} {what}; .*|missing: copy"):
            tars.path(shard)
        tars.release(shard)
    assert tars.path(SHARDS[3]).read_bytes() == CONTENTS[3]
    objects.put(other, CONTENTS[2])
    assert tars.path(SHARDS[2]).read_bytes() == CONTENTS[2]


def test_a_server_that_is_gone_and_comes_back(
    url: str, dataset: Dataset, scratch: Path, proxy: FailingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTE_RETRY_SECONDS", "0.2")
    tars = RemoteTars(url, dataset, scratch)
    proxy.stop()
    tars.open_order(SHARDS)
    with pytest.raises(WorkError, match="cannot be reached") as error:
        tars.path(SHARDS[0])
    assert not isinstance(error.value, DamagedTar)  # the tar is not at fault
    proxy.start()
    assert tars.path(SHARDS[0]).read_bytes() == CONTENTS[0]
    tars.close()


def test_no_room(tars: RemoteTars, monkeypatch: pytest.MonkeyPatch) -> None:
    full = SimpleNamespace(free=2**20)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: full)
        tars.open_order(SHARDS)  # nothing is fetched ahead
        with pytest.raises(WorkError, match=r"toy-000000.tar takes 0 MiB .* 1 MiB free: make room"):
            tars.path(SHARDS[0])
    assert tars.path(SHARDS[0]).read_bytes() == CONTENTS[0]


def test_closing_ends_a_transfer(
    url: str, dataset: Dataset, scratch: Path, proxy: FailingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = RemoteTars(url, dataset, scratch)
    proxy.fail = [100] * 10_000  # never complete
    tars.open_order(SHARDS)
    failures: list[BaseException] = []

    def wait() -> None:
        try:
            tars.path(SHARDS[0])
        except BaseException as error:
            failures.append(error)

    waiting = Thread(target=wait)
    waiting.start()
    tars.close()
    waiting.join(30)
    assert not waiting.is_alive()
    assert isinstance(failures[0], WorkError)
    assert on_disk(scratch) == []
