"""A store at a URL: the bytes of a local one, whole at every moment, read through a mirror."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer

import numpy as np
import pytest

from featstore import (
    Store,
    StoreSchema,
    UserError,
    WorkError,
    Workspace,
    open_store,
    verify,
)
from featstore.files.scratch import ScratchFolder
from featstore.opening import open_rows, writer_of
from featstore.remote.mirror import open_remote
from featstore.remote.objects import ObjectFolder
from featstore.remote.writer import RemoteStoreWriter
from featstore.rewriting.convert import convert
from featstore.rewriting.quantize import quantize
from featstore.writing.writer import StoreExists, StoreWriter
from tests.support.servers.remote_driver import ROWS, SCHEMA, fill, partition
from tests.support.servers.s3_server import FailingProxy
from tests.support.stores.sample_stores import init_store_at, make_partition, make_store

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def url(bucket: str) -> str:
    """Where a store is to be."""
    return f"{bucket}/features/toy/x.zarr"


@pytest.fixture
def filled(url: str) -> str:
    """URL of a finished store."""
    fill(url)
    return url


def local_copy(folder: Path) -> dict[str, bytes]:
    """The objects of the store that `fill` makes, as a local writer makes them."""
    writer = init_store_at(folder, SCHEMA, ROWS)
    for tar in range(SCHEMA.tars):
        writer.write_partition(tar, partition(tar))
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return without_times(files)


def objects_of(url: str) -> dict[str, bytes]:
    objects = ObjectFolder(url)
    return without_times({name: objects.get_bytes(name, 10**7) for name in objects.list()})


def without_times(files: dict[str, bytes]) -> dict[str, bytes]:
    """Commit entries without the time of writing and the checksum over it."""
    return {
        name: content[:24] if name.startswith("commit/c/") else content
        for name, content in sorted(files.items())
    }


def holds(store: Store, tar: int, seed: int = 0) -> bool:
    wanted = make_partition(SCHEMA, tar, ROWS[tar], failed=[0], seed=seed)
    at = store.positions(np.arange(ROWS[tar]) + tar * SCHEMA.capacity)
    return (
        np.array_equal(store.features(store.rows[at]), wanted.features, equal_nan=True)
        and [store.keys[i] for i in at] == wanted.key
        and np.array_equal(store.labels[at], wanted.label)
        and np.array_equal(store.pts(store.rows[at]), wanted.pts, equal_nan=True)
    )


def remote_writer(url: str) -> RemoteStoreWriter:
    writer = writer_of(url)
    assert isinstance(writer, RemoteStoreWriter)
    return writer


# Writing


def test_the_objects_are_those_of_a_local_store(url: str, tmp_path: Path) -> None:
    assert writer_of(url) is None
    fill(url)
    assert objects_of(url) == local_copy(tmp_path / "local.zarr")
    assert not list((tmp_path / "cache" / "scratch").iterdir())
    writer = remote_writer(url)
    local = StoreWriter.open(tmp_path / "local.zarr")
    assert writer.metadata == local.metadata
    assert writer.prompt_sets == local.prompt_sets
    assert writer.pending() == []
    assert writer.done(1)
    store = open_store(url)
    assert all(holds(store, tar) for tar in range(3))
    assert verify(store.path, deep=True).ok


def listings(proxy: FailingProxy) -> int:
    return sum("list-type=2" in path for _, path, _ in proxy.requests)


def test_what_is_pending_is_asked_at_the_opening(filled: str, proxy: FailingProxy) -> None:
    objects = ObjectFolder(filled)
    objects.delete("commit/c/0/0")
    objects.put("features/c/1/0/0/0", b"not so long")
    proxy.requests.clear()
    writer = RemoteStoreWriter.open(filled)
    assert writer.pending() == [0, 1]
    assert listings(proxy) == 1


@pytest.mark.parametrize("tars", [3, 9])
def test_many_partitions_are_written_with_one_listing(
    url: str, proxy: FailingProxy, tars: int
) -> None:
    """Whoever asks after every tar what is left costs no more than who asks once."""
    schema, rows = replace(SCHEMA, tars=tars), (2,) * tars
    init_store_at(url, schema, rows)
    proxy.requests.clear()
    writer = RemoteStoreWriter.open(url)
    for tar in writer.pending():
        assert not writer.done(tar)
        writer.write_partition(tar, make_partition(schema, tar, 2))
        assert writer.done(tar)
        assert writer.pending() == list(range(tar + 1, tars))
    assert listings(proxy) == 1
    assert RemoteStoreWriter.open(url).pending() == []


def test_the_commit_entry_goes_first_and_comes_last(filled: str, proxy: FailingProxy) -> None:
    writer = remote_writer(filled)
    proxy.requests.clear()
    writer.write_partition(1, partition(1))
    steps = [(m, p.split("x.zarr/")[1].split("/")[0]) for m, p, _ in proxy.requests if m == "PUT"]
    assert steps[-3:] == [("PUT", "chunk_checksum"), ("PUT", "features"), ("PUT", "commit")]
    assert len(steps) == len(set(steps))
    assert [method for method, *_ in proxy.requests[:3]] == ["DELETE", "DELETE", "PUT"]


class Kill:
    """Ends a process with SIGKILL when its request number `step` comes, which may get lost."""

    def __init__(self, proxy: FailingProxy, step: int, arrives: bool) -> None:
        self._proxy, self._step, self._arrives = proxy, step, arrives
        self._known = Event()
        self._pid = 0

    def aim(self, pid: int) -> None:
        self._pid = pid
        self._known.set()

    def __call__(self, number: int) -> None:
        assert self._known.wait(30)
        if number == self._step:
            os.kill(self._pid, signal.SIGKILL)
            self._proxy.fail = [] if self._arrives else ["drop"]


@pytest.mark.parametrize(
    "seed", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 9))]
)
def test_killed_at_any_moment(url: str, proxy: FailingProxy, tmp_path: Path, seed: int) -> None:
    """Writers die at random requests, which arrive or not; whatever is committed is right."""
    rng = random.Random(seed)
    driver = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tests/support/servers/remote_driver.py"), url],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with driver:
        assert driver.stdin is not None
        assert driver.stdout is not None
        kills, status = 0, -1
        while status != 0:
            kill = Kill(proxy, step=rng.randint(1, 45), arrives=rng.random() < 0.5)
            proxy.requests.clear()
            proxy.before = kill
            driver.stdin.write("go\n")
            driver.stdin.flush()
            kill.aim(int(driver.stdout.readline()))
            status = int(driver.stdout.readline())
            assert status in (0, signal.SIGKILL)
            kills += status != 0
            proxy.before = lambda number: None
            proxy.fail = []
            if writer_of(url) is not None:
                store = open_store(url)
                done = list(store.partitions())
                assert all(holds(store, tar) for tar in done)
                assert remote_writer(url).pending() == [t for t in range(3) if t not in done]
        driver.stdin.close()
    assert kills >= 2
    assert objects_of(url) == local_copy(tmp_path / "local.zarr")
    with ScratchFolder(tmp_path / "cache" / "scratch") as mine:
        assert {p.stem for p in mine.parent.iterdir()} == {mine.name}


def test_the_server_goes_away_in_the_middle(
    filled: str, proxy: FailingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = remote_writer(filled)

    def leave(number: int) -> None:
        if number == 5:
            Timer(0, proxy.stop).start()
            proxy.fail = ["drop"]

    proxy.requests.clear()
    proxy.before = leave
    back = Timer(1, proxy.start)
    back.start()
    writer.write_partition(1, partition(1))  # waits for it
    back.join()
    assert writer.pending() == []

    monkeypatch.setenv("MOTE_RETRY_SECONDS", "0.3")
    writer = remote_writer(filled)
    proxy.requests.clear()
    with pytest.raises(WorkError, match="cannot be reached"):
        writer.write_partition(1, partition(1))
    proxy.before = lambda number: None
    proxy.fail = []
    proxy.start()
    assert writer.pending() == [1]
    assert list(open_store(filled).partitions()) == [0, 2]
    fill(filled)
    assert holds(open_store(filled), 1)


def test_a_store_is_not_made_over_another(filled: str, bucket: str) -> None:
    with pytest.raises(StoreExists, match="exists already"):
        init_store_at(filled, SCHEMA, ROWS)
    ObjectFolder(bucket).put("else/notes.txt", b"")
    with pytest.raises(UserError, match=r"else/notes.txt belongs to no store"):
        init_store_at(f"{bucket}/else", SCHEMA, ROWS)
    assert list(ObjectFolder(f"{bucket}/else").list()) == ["notes.txt"]


def test_a_half_made_store_is_replaced(filled: str, tmp_path: Path) -> None:
    objects = ObjectFolder(filled)
    objects.delete("zarr.json")
    objects.put("label/zarr.json", b"{}")
    objects.put("class_text/other/zarr.json", b"{}")
    with pytest.raises(UserError, match=r"is not a feature store: it has no zarr.json"):
        open_store(filled)
    writer = init_store_at(filled, SCHEMA, ROWS)
    assert writer.pending() == [0, 1, 2]
    assert writer.prompt_sets == ["mote28"]
    fill(filled)
    assert objects_of(filled) == local_copy(tmp_path / "local.zarr")


def test_makers_of_the_same_store_do_not_hurt_each_other(url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(_make_or_open, url) for _ in range(4)]
    assert [result.result().pending() for result in results] == [[0, 1, 2]] * 4
    with ThreadPoolExecutor(3) as pool:
        list(
            pool.map(lambda tar: remote_writer(url).write_partition(tar, partition(tar)), range(3))
        )
    assert all(holds(open_store(url), tar) for tar in range(3))


def _make_or_open(url: str) -> RemoteStoreWriter:
    try:
        writer = init_store_at(url, SCHEMA, ROWS)
    except StoreExists:
        writer = remote_writer(url)
    assert isinstance(writer, RemoteStoreWriter)
    return writer


def test_a_partition_that_does_not_fit(filled: str) -> None:
    writer = remote_writer(filled)
    with pytest.raises(ValueError, match="has 5 samples, but its tar lists 6"):
        writer.write_partition(0, partition(1))
    assert writer.pending() == []


# Reading


def test_only_what_changed_is_fetched(filled: str, proxy: FailingProxy) -> None:
    open_store(filled)
    proxy.requests.clear()
    store = open_store(filled)
    assert [method for method, *_ in proxy.requests] == ["GET"]  # the listing
    writer = remote_writer(filled)
    writer.write_partition(1, make_partition(SCHEMA, 1, ROWS[1], failed=[0], seed=9))
    proxy.requests.clear()
    store = open_store(filled)
    fetched = {path.split("x.zarr/")[1] for _, path, _ in proxy.requests[1:]}
    assert "features/c/1/0/0/0" in fetched
    assert all("/c/1" in name for name in fetched)
    assert holds(store, 1, seed=9)
    assert holds(store, 0)


def test_a_partition_that_is_not_done_any_more(filled: str) -> None:
    open_store(filled)
    ObjectFolder(filled).delete("commit/c/2/0")
    store = open_store(filled)
    assert list(store.partitions()) == [0, 1]
    assert not store.complete


def test_a_store_made_anew(filled: str) -> None:
    old = open_store(filled)
    for name in ObjectFolder(filled).list():
        ObjectFolder(filled).delete(name)
    with pytest.raises(UserError, match="there are no objects"):
        open_store(filled)
    init_store_at(filled, SCHEMA, ROWS, sampling="clips:2x2")
    store = open_store(filled)
    assert store.path == old.path
    assert store.provenance.sampling == "clips:2x2"
    assert list(store.partitions()) == []


def test_damage_of_the_mirror_is_mended_as_the_error_says(filled: str) -> None:
    store = open_store(filled)
    shard = store.path / "features/c/0/0/0/0"
    damaged = bytearray(shard.read_bytes())
    damaged[40] ^= 1
    shard.write_bytes(damaged)
    again = open_store(filled)
    with pytest.raises(WorkError, match=r"fail their checksum; delete .*commit/c/0") as error:
        again.features(again.rows[:6])
    commit = Path(str(error.value).partition("delete ")[2].partition(" and run")[0])
    assert commit.is_dir()
    (commit / "0").unlink()
    assert holds(open_store(filled), 0)
    shard.unlink()
    assert holds(open_store(filled), 0)


def test_rows_without_features(filled: str, proxy: FailingProxy) -> None:
    store = open_rows(filled)
    assert (len(store), int((store.status == 2).sum())) == (12, 3)
    assert not any("features/c/" in path for _, path, _ in proxy.requests)
    with pytest.raises(WorkError):
        store.features(store.rows[:1])
    assert holds(open_store(filled), 0)


def test_many_readers_at_once(filled: str, tmp_path: Path) -> None:
    program = (
        "import sys; from featstore import open_store; s = open_store(sys.argv[1]); print(len(s))"
    )
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", program, filled],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: open_store(filled), range(8)))
    assert all(holds(store, 1) for store in stores)
    assert [reader.communicate()[0] for reader in readers] == [b"12\n"] * 2


def test_a_flaky_way(
    filled: str, proxy: FailingProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTE_CACHE", str(tmp_path / "elsewhere"))
    proxy.fail = ["503", "drop", "ok", 10, "ok", 100, "503", 30, *["ok"] * 20, "drop"]
    store = open_remote(filled)
    assert store.path.is_relative_to(tmp_path / "elsewhere")
    assert all(holds(store, tar) for tar in range(3))


def test_a_journal_that_was_cut(filled: str) -> None:
    store = open_store(filled)
    journal = store.path.with_name(f"{store.path.name}.journal")
    journal.write_bytes(journal.read_bytes()[:-9])
    assert holds(open_store(filled), 2)
    for line in journal.read_text().splitlines():
        json.loads(line)


def test_no_room_for_the_mirror(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featstore.files.disk.SPARE_BYTES", 2**60)
    with pytest.raises(WorkError, match="make room, or set MOTE_CACHE"):
        open_store(filled)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("zarr.json", b"{}", "only Zarr v3"),
        ("zarr.json", b" " * (2**24 + 1), "is larger than 16777216 bytes"),
        ("label/zarr.json", b"{" + b" " * 2**20, "is larger than 1048576 bytes"),
        ("label/zarr.json", b'{"zarr_format": 3}', "array label"),
        ("label/zarr.json", None, "label/zarr.json is missing"),
    ],
)
def test_hostile_or_damaged_metadata(
    filled: str, name: str, content: bytes | None, message: str
) -> None:
    objects = ObjectFolder(filled)
    objects.delete(name)
    if content is not None:
        objects.put(name, content)
    for read in (open_store, RemoteStoreWriter.open):
        with pytest.raises((UserError, WorkError), match=message):
            read(filled)


def test_objects_of_odd_names_are_not_fetched(filled: str, tmp_path: Path) -> None:
    objects = ObjectFolder(filled)
    for name in ("class_text/mote28/c/0/1", "class_text/.hidden/zarr.json", "features/c/7/0/0/0"):
        objects.put(name, b"{}")
    store = open_store(filled)
    assert store.prompt_sets == ["mote28"]
    assert not (store.path / "features/c/7").exists()
    assert not (store.path / "class_text/.hidden").exists()


def test_a_copied_store_of_int8_features(url: str, tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr", rows=(8, 3))
    quantize(tmp_path / "s.zarr", tmp_path / "q.zarr")
    convert(tmp_path / "q.zarr", tmp_path / "c.zarr", "zstd")
    copied = tmp_path / "c.zarr"
    for path in copied.rglob("*"):
        if path.is_file():
            ObjectFolder(url).put(str(path.relative_to(copied)), path)
    remote, local = open_remote(url), open_store(copied)
    assert remote.complete
    assert remote.features(remote.rows).tobytes() == local.features(local.rows).tobytes()


def test_frames_go_up_and_come_down(bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/features/toy/frames.zarr"
    schema = StoreSchema.create(2, 6, 1, 4, 16, tier="frames", item=(8, 10, 3))
    writer = init_store_at(url, schema, (6, 2))
    partitions = [make_partition(schema, tar, n, failed=[1]) for tar, n in enumerate((6, 2))]
    with writer.claim():
        for tar, made in enumerate(partitions):
            with writer.feature_rows(tar) as rows:
                for i in np.flatnonzero(made.status == 1).tolist():
                    rows.put(i, np.asarray(made.features)[i])
                writer.write_partition(tar, replace(made, features=rows))
    assert writer.pending() == []
    with pytest.raises(UserError, match="holds frames, not the embeddings"):
        Workspace(tmp_path).opened("toy").choose(name=url)
    assert not list((tmp_path / "cache").glob("stores/*"))
    store = open_store(url)
    found = store.features(store.rows)
    assert np.array_equal(found, np.concatenate([np.asarray(p.features) for p in partitions]))
    assert verify(store.path, deep=True).ok
