"""kill -9 at any moment: what is done is right, the rest is redone; one writer at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from featstore import StoreSchema, StoreWriter, UserError, WorkError, verify
from tests.support.stores.sample_stores import init_store, make_partition, make_store

DRIVER = Path(__file__).with_name("crash_driver.py")
REPOSITORY = Path(__file__).parents[3]


def drive(folder: Path, *arguments: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(folder), *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills: dict[str, int] = json.loads(done.stdout)
    return kills


def test_killed_at_a_spread_of_steps(tmp_path: Path) -> None:
    kills = drive(tmp_path, "stepwise", "0", "7")
    assert min(kills.values()) >= 6


def test_sequences_killed_at_a_spread_of_steps(tmp_path: Path) -> None:
    kills = drive(tmp_path, "stepwise", "0", "13", "sequences")
    assert min(kills.values()) >= 3


@pytest.mark.slow
def test_sequences_killed_whenever_the_signal_arrives(tmp_path: Path) -> None:
    assert drive(tmp_path, "anytime", "6", "sequences") == {"rounds": 6}


@pytest.mark.slow
def test_killed_at_every_step(tmp_path: Path) -> None:
    kills = drive(tmp_path, "stepwise", "0", "1")
    assert min(kills.values()) >= 40


def test_killed_whenever_the_signal_arrives(tmp_path: Path) -> None:
    assert drive(tmp_path, "anytime", "6") == {"rounds": 6}


def test_second_writing_process_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    make_store(store)
    program = (
        "import sys; from pathlib import Path; from featstore import StoreWriter\n"
        "with StoreWriter.open(Path(sys.argv[1])).claim():\n"
        "    print('locked', flush=True); sys.stdin.read()"
    )
    writer = StoreWriter.open(store)
    with subprocess.Popen(
        [sys.executable, "-c", program, str(store)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with (
            pytest.raises(
                WorkError, match=rf"another process \(pid {other.pid} on .*\) is writing"
            ),
            writer.claim(),
        ):
            pass
        other.kill()
    with writer.claim():  # the kernel freed it
        pass


def test_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr")
    writer = StoreWriter.open(tmp_path / "s.zarr")
    with pytest.raises(ZeroDivisionError), writer.claim():
        raise ZeroDivisionError
    with writer.claim():
        pass


def test_init_leaves_nothing_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("featstore.writing.writer._write_node", full)
    with pytest.raises(WorkError, match="no room is left on the disk"):
        make_store(tmp_path / "s.zarr")
    assert [*tmp_path.iterdir()] == []


def test_init_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    leftover = tmp_path / "s.zarr.0123.partial"
    leftover.mkdir()
    (leftover / "zarr.json").write_text("{}")
    make_store(tmp_path / "s.zarr")
    assert not leftover.exists()


def test_an_existing_store_is_not_made_again(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr")
    with pytest.raises(UserError, match="exists already"):
        make_store(tmp_path / "s.zarr")


def test_disk_full_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is the system's own; the partition is not done and can be redone."""
    schema = StoreSchema.create(1, 8, 2, 4, 16)
    writer = init_store(tmp_path / "s.zarr", schema, [8])
    partition = make_partition(schema, 0, 8)

    def full(path: Path, data: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("featstore.writing.shard_rows.write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            writer.write_partition(0, partition)
    assert writer.pending() == [0]
    writer.write_partition(0, partition)
    assert writer.pending() == []


def test_every_file_is_synced_before_its_rename_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = StoreSchema.create(1, 8, 2, 4, 16)
    writer = init_store(tmp_path / "s.zarr", schema, [8])
    calls: list[tuple[str, str]] = []
    replace = Path.replace

    def record_sync(descriptor: int) -> None:
        calls.append(("sync", os.path.realpath(f"/proc/self/fd/{descriptor}")))

    def record_replace(self: Path, target: Path) -> Path:
        calls.append(("rename", str(target)))
        assert ("sync", os.path.realpath(self)) in calls
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_replace)
    writer.write_partition(0, make_partition(schema, 0, 8))
    renamed = [Path(name) for kind, name in calls if kind == "rename"]
    arrays = [path.relative_to(tmp_path / "s.zarr").parts[0] for path in renamed]
    assert arrays[-3:] == ["chunk_checksum", "features", "commit"]
    assert len(arrays) == 15
    for path in renamed:
        after = calls[calls.index(("rename", str(path))) + 1]
        assert after == ("sync", os.path.realpath(path.parent))


def test_two_writers_fill_different_partitions_and_never_the_same(tmp_path: Path) -> None:
    schema = StoreSchema.create(4, 8, 2, 4, 16)
    one = init_store(tmp_path / "s.zarr", schema, [8] * 4)
    other = StoreWriter.open(tmp_path / "s.zarr")
    with one.claim([0, 2]), other.claim([1, 3]):
        unfinished = tmp_path / "s.zarr/key/c/2.0123.partial"
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(b"in the making")
        for writer, tar in ((one, 0), (other, 1), (one, 2), (other, 3)):
            writer.write_partition(tar, make_partition(schema, tar, 8))
        third = StoreWriter.open(tmp_path / "s.zarr")
        with pytest.raises(WorkError, match=r"is writing partition 0 of .*s\.zarr"), third.claim():
            pass
        with pytest.raises(WorkError, match="is writing partition 2"), third.claim([2]):
            pass
        assert unfinished.exists(), "a file that another process is writing was removed"
    with other.claim([2]):
        assert not unfinished.exists()
    assert verify(tmp_path / "s.zarr", deep=True).ok
