"""Kills commands that change or make stores with SIGKILL; run by test_grow.py, prints one line.

`growth_crash_driver.py FOLDER WORK:STRIDE ... [two-renames]`: WORK is add-tars, add-texts or merge,
and is killed just before every STRIDE-th system call that matters. Each work and each check is a
fork of this process, which itself never starts zarr's threads.
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

import featstore.files.exchange
from featstore import open_store, verify
from featstore.rewriting.grow import add_class_text
from featstore.rewriting.merge import merge
from tests.featstore.writing.crash_driver import fork
from tests.support.stores.growing_stores import (
    add_three_tars,
    make_other_store,
    make_small_store,
    other_text,
    same_partitions,
)


def kill_at(step: int) -> None:
    """Make this process kill itself just before its `step`-th system call that matters."""
    count = 0

    def before(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    for owner, name in [
        (os, "fsync"),
        (os, "link"),
        (os, "unlink"),  # of shutil.rmtree, too
        (os, "rmdir"),
        (Path, "replace"),
        (Path, "rename"),
        (Path, "mkdir"),
        (featstore.files.exchange, "_exchanged"),
    ]:
        before(owner, name)


def add_tars(folder: Path) -> None:
    add_three_tars(folder / "a.zarr")


def check_add_tars(folder: Path, killed: bool) -> None:
    path = folder / "a.zarr"
    if TWO_RENAMES and not path.exists():
        featstore.files.exchange.recover(path)
    assert open_store(path).schema.tars in (2, 5)
    assert verify(path, deep=True).ok
    add_tars(folder)
    assert open_store(path).schema.tars == 5
    assert verify(path, deep=True).ok
    same_partitions(path, folder / "reference.zarr", {0: 1, 1: 2})


def add_texts(folder: Path) -> None:
    add_class_text(folder / "a.zarr", "video", other_text())


def check_add_texts(folder: Path, killed: bool) -> None:
    path = folder / "a.zarr"
    assert open_store(path).prompt_sets in (["mote28"], ["mote28", "video"])
    assert verify(path, deep=True).ok
    add_texts(folder)
    np.testing.assert_array_equal(
        open_store(path).class_text("video").embeddings, other_text().embeddings
    )


def merge_both(folder: Path) -> None:
    merge([folder / "a.zarr", folder / "b.zarr"], folder / "c.zarr")


def check_merge(folder: Path, killed: bool) -> None:
    out = folder / "c.zarr"
    if not out.exists():
        merge_both(folder)
    assert open_store(out).complete
    for path in (out, folder / "a.zarr", folder / "b.zarr"):
        assert verify(path, deep=True).ok
    same_partitions(out, folder / "reference.zarr", {0: 0, 1: 1})


WORKS: dict[str, tuple[Callable[[Path], None], Callable[[Path, bool], None]]] = {
    "add-tars": (add_tars, check_add_tars),
    "add-texts": (add_texts, check_add_texts),
    "merge": (merge_both, check_merge),
}
TWO_RENAMES = "two-renames" in sys.argv


def stepwise(folder: Path, work: str, stride: int) -> int:
    do, check = WORKS[work]

    def prepare() -> None:
        make_small_store(folder / "pristine" / "a.zarr")
        make_small_store(folder / "pristine" / "reference.zarr")
        make_other_store(folder / "pristine" / "b.zarr")

    assert fork(prepare) == 0
    step = kills = 0
    while True:
        trial = folder / "trial"
        shutil.copytree(folder / "pristine", trial)

        def killed(place: Path = trial, at: int = step) -> None:
            if TWO_RENAMES:
                featstore.files.exchange._exchanged = lambda one, other: False
            kill_at(at)
            do(place)

        def checked(place: Path = trial, died: bool = True) -> None:
            if TWO_RENAMES:
                featstore.files.exchange._exchanged = lambda one, other: False
            check(place, died)
            left = [p.name for p in place.iterdir() if "partial" in p.name or "prev" in p.name]
            # A merge that was complete before the kill leaves its empty staging folder.
            assert not left or work == "merge", left

        status = fork(killed)
        assert status in (0, signal.SIGKILL), status
        assert fork(checked) == 0, (work, step)
        shutil.rmtree(trial)
        if status == 0:
            return kills
        kills += 1
        step += stride


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # SIGKILL takes nothing from the page cache
    kills = {
        work: stepwise(Path(sys.argv[1]) / work, work, int(stride))
        for work, _, stride in (argument.partition(":") for argument in sys.argv[2:])
        if stride
    }
    print(json.dumps(kills))
