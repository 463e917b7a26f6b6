"""Kills writing processes with SIGKILL; run by test_crash.py, prints one JSON line.

`crash_driver.py FOLDER stepwise FIRST STRIDE` kills one process just before each system call that
matters, and in the middle of each file; `crash_driver.py FOLDER anytime ROUNDS` kills processes
that write without pause whenever the signal happens to arrive. A last argument `sequences` does the
same with a store of sequences.

Each writer and each check is a fork of this process, which itself never starts zarr's threads.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch  # noqa: F401  (loaded once here instead of in every child that reads features)

import featstore.files.durable
import featstore.writing.shard_rows
from featstore import Partition, StoreSchema, StoreWriter, open_store, verify
from featstore.files.durable import durable_file
from featstore.writing.partition import SequencePartition
from tests.support.stores.sample_stores import init_store, make_partition
from tests.support.stores.sequence_stores import make_rows, sequence_partition, sequence_schema

SEQUENCES = sys.argv[-1] == "sequences"
SCHEMA = StoreSchema(tars=2, capacity=6, views=1, frames=4, dim=16, chunk_rows=2)
ROWS = (6, 5)
LENGTHS = ((9, 0, 2, 8, 1, 1), (3, 0, 30, 1, 9))
if SEQUENCES:
    SCHEMA = sequence_schema(2, 6)


def partition(tar: int, seed: int) -> Partition | SequencePartition:
    if SEQUENCES:
        return sequence_partition(tar, make_rows(SCHEMA, LENGTHS[tar], seed))
    return make_partition(SCHEMA, tar, ROWS[tar], seed=seed, failed=[1])


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child; returns the child's wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def kill_at(step: int) -> None:
    """Make this process kill itself just before its `step`-th system call that matters."""
    count = 0

    def tick() -> None:
        nonlocal count
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def before(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            tick()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    def write_in_halves(path: Path, data: Any) -> None:
        raw = bytes(data)
        with durable_file(path) as file:
            file.write(raw[: len(raw) // 2])
            file.flush()
            tick()
            file.write(raw[len(raw) // 2 :])

    featstore.writing.shard_rows.write_bytes = write_in_halves  # type: ignore[attr-defined]
    for owner, name in [(os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")]:
        before(owner, name)


def check(path: Path, earlier: int | None) -> None:
    """After a kill: tar 0 untouched, tar 1 all old, all new or not there; redo makes it right."""

    def holds(tar: int, seed: int) -> bool:
        store = open_store(path)
        wanted = partition(tar, seed)
        at = store.positions(np.arange(ROWS[tar]) + tar * SCHEMA.capacity)
        if isinstance(wanted, SequencePartition):
            rows = make_rows(SCHEMA, LENGTHS[tar], seed)
            return [store.keys[i] for i in at] == wanted.key and all(
                store.sequence(store.rows[i]).tobytes() == row[0].tobytes()
                and store.sequence_times(store.rows[i]).tobytes() == row[1].tobytes()
                for i, row in zip(at, rows, strict=True)
            )
        return (
            np.array_equal(store.features(store.rows[at]), wanted.features, equal_nan=True)
            and [store.keys[i] for i in at] == wanted.key
            and np.array_equal(store.labels[at], wanted.label)
            and np.array_equal(store.pts(store.rows[at]), wanted.pts, equal_nan=True)
        )

    assert holds(0, seed=0), "a finished partition changed"
    done = list(open_store(path).partitions())
    assert done in ([0], [0, 1]), done
    if done == [0, 1]:
        seeds = [1] if earlier is None else [1, earlier]
        assert any(holds(1, seed) for seed in seeds), "a done partition is a mixture"
    assert verify(path, deep=True).ok
    writer = StoreWriter.open(path)
    assert writer.pending() == [tar for tar in (0, 1) if tar not in done]
    with writer.claim():
        writer.write_partition(1, partition(1, seed=1))
    assert not list(path.rglob("*.partial")), "leftovers were not removed"
    assert holds(0, seed=0)
    assert holds(1, seed=1)
    assert verify(path, deep=True).ok


def prepare(path: Path, earlier: int | None) -> None:
    writer = init_store(path, SCHEMA, ROWS)
    writer.write_partition(0, partition(0, seed=0))
    if earlier is not None:
        writer.write_partition(1, partition(1, seed=earlier))


def write(path: Path, step: int) -> None:
    writer = StoreWriter.open(path)
    with writer.claim():
        kill_at(step)
        writer.write_partition(1, partition(1, seed=1))


def stepwise(folder: Path, first: int, stride: int) -> dict[str, int]:
    """Kill at step first, first + stride, ... of writing a new and of redoing a done partition."""
    kills = {}
    for name, earlier in (("new", None), ("redone", 7)):
        pristine = folder / f"{name}.zarr"
        assert fork(lambda p=pristine, e=earlier: prepare(p, e)) == 0  # type: ignore[misc]
        step = first
        while True:
            path = folder / "trial.zarr"
            shutil.copytree(pristine, path)
            status = fork(lambda p=path, s=step: write(p, s))  # type: ignore[misc]
            assert status in (0, signal.SIGKILL), status
            assert fork(lambda p=path, e=earlier: check(p, e)) == 0, (name, step)  # type: ignore[misc]
            shutil.rmtree(path)
            if status == 0:
                break
            step += stride
        kills[name] = (step - first) // stride
    return kills


def anytime(folder: Path, rounds: int) -> dict[str, int]:
    """Kill processes that redo a partition, by turns new and old, once they report a round."""
    path = folder / "busy.zarr"
    assert fork(lambda: prepare(path, 7)) == 0
    for _ in range(rounds):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            writer = StoreWriter.open(path)
            with writer.claim():
                while True:
                    writer.write_partition(1, partition(1, seed=1))
                    os.write(writing, b".")
                    writer.write_partition(1, partition(1, seed=7))
        os.close(writing)
        os.read(reading, 1)
        os.kill(pid, signal.SIGKILL)
        os.close(reading)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        assert fork(lambda: check(path, 7)) == 0
    return {"rounds": rounds}


if __name__ == "__main__":
    if sys.argv[2] == "stepwise":
        result = stepwise(Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        result = anytime(Path(sys.argv[1]), int(sys.argv[3]))
    print(json.dumps(result))
