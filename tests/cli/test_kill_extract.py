"""`mote-cli extract` killed with kill -9 again and again, and beside other processes.

Whatever happens, one clean run at the end leaves the store that an uninterrupted run leaves, bit
for bit but for the time in each commit entry.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.processes.command_line import done
from tests.support.processes.processes import Commands, Running, command_starter
from tests.support.stores.store_files import committed, ray_workers, store_files
from tests.support.worlds.tiny_world import packed_workspace

TARS, PER_TAR = 20, 3
STORE = Path("features/clips/tiny--uniform-4.zarr")
RAY = ("--engine", "ray", "--ray-workers", "2")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with command_starter(tmp_path_factory.mktemp("output")) as commands:
        yield commands


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with clips in many tars, and an encoder in it."""
    return packed_workspace(tmp_path_factory.mktemp("packed"), TARS, PER_TAR)


def extract(root: Path) -> tuple[str, ...]:
    return (
        *("extract", "--dataset", "clips", "--encoder", "tiny", "--sampling", "uniform:4"),
        *("--precision", "fp32", "--root", str(root)),
    )


@pytest.fixture(scope="module")
def whole(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a store that nothing interrupted."""
    root = tmp_path_factory.mktemp("whole") / "root"
    shutil.copytree(packed, root)
    assert done(*extract(root))["partitions_done"] == TARS
    return store_files(root / STORE)


@pytest.fixture
def root(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "root")
    return tmp_path / "root"


def writing(store: Path) -> bool:
    """Whether some file of a partition is in the making at this very moment."""
    return any(
        name.endswith(".partial")
        for array in store.glob("*/c")
        for _, _, names in os.walk(array)
        for name in names
    )


def hunt(running: Running, store: Path, kind: str, chance: random.Random, start_s: float) -> int:
    """Wait for a random moment of one kind, or for the end of the process; returns whom to kill.

    `start_s`: about what the command needs until it encodes.
    """
    before = committed(store)
    more = chance.randint(1, 4)
    encoding = (lambda: len(committed(store) - before) >= more, 0.05)
    moments: dict[str, tuple[Callable[[], bool], float]] = {
        # While it loads the encoder, makes the store, starts a cluster.
        "starting": (lambda: True, start_s),
        "encoding": encoding,
        "worker": encoding,
        "writing": (lambda: writing(store), 0.004),
    }
    there, spread = moments[kind]
    running.until(lambda: there() or not running.alive)
    time.sleep(chance.uniform(0, spread))
    workers = ray_workers(store) if kind == "worker" and running.alive else []
    return chance.choice(workers) if workers else running.pid


def kill_again_and_again(
    commands: Commands,
    packed: Path,
    whole: dict[str, bytes],
    folder: Path,
    *,
    kills: int,
    seed: int,
    engine: tuple[str, ...] = (),
) -> Counter[str]:
    """Kill -9 until `kills` have hit, then finish, and compare; returns what was hit.

    A command that gets to its end is compared as well, and a fresh store begun.
    """
    chance = random.Random(seed)
    hit: Counter[str] = Counter()
    all_kinds = ["starting", "encoding", "writing", "writing"] + ["worker"] * bool(engine)
    kinds: list[str] = []
    root = folder
    while sum(hit.values()) < kills:
        if root == folder:
            root = folder / f"{sum(hit.values())} kills"
            shutil.copytree(packed, root)
        running = commands.start(*extract(root), *engine)
        code = None
        while code is None:
            kinds = kinds or chance.sample(all_kinds, len(all_kinds))
            victim = hunt(running, root / STORE, kinds[-1], chance, 6.0 if engine else 1.0)
            if victim == running.pid:
                code = running.kill()
                assert code in (-signal.SIGKILL, 0), running.words
            else:
                os.kill(victim, signal.SIGKILL)  # and the command goes on without it
            if code != 0:
                hit[kinds.pop()] += 1
        if code == 0:
            assert store_files(root / STORE) == whole
            root = folder
    if root != folder:
        last = commands.start(*extract(root), *engine)
        assert last.end() == 0, last.words
        assert store_files(root / STORE) == whole
    return hit


def test_kill_9_again_and_again(
    commands: Commands, packed: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    hit = kill_again_and_again(commands, packed, whole, tmp_path, kills=4, seed=1)
    assert hit == {"starting": 1, "encoding": 1, "writing": 2}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("engine", "kills"), [((), 30), (RAY, 20)], ids=["local engine", "ray engine"]
)
def test_fifty_kills(
    commands: Commands,
    packed: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    engine: tuple[str, ...],
    kills: int,
) -> None:
    hit = kill_again_and_again(
        commands, packed, whole, tmp_path, kills=kills, seed=2, engine=engine
    )
    assert sum(hit.values()) >= kills
    assert min(hit[kind] for kind in ("starting", "encoding", "writing")) >= kills // 5, hit
    assert hit["worker"] >= bool(engine) * kills // 5, hit


@pytest.mark.slow
def test_a_second_process_is_told_and_harms_nothing(
    commands: Commands, root: Path, whole: dict[str, bytes]
) -> None:
    first = commands.start(*extract(root))
    first.until(lambda: len(committed(root / STORE)) >= 3)
    os.kill(first.pid, signal.SIGSTOP)  # it holds what it has claimed, and gets no further
    second = commands.start(*extract(root))
    assert second.end() == 1
    assert f"another process (pid {first.pid} " in second.words
    assert second.words.count("error:") == 1, second.words
    assert len(committed(root / STORE)) < TARS
    os.kill(first.pid, signal.SIGCONT)
    assert first.end() == 0, first.words
    assert store_files(root / STORE) == whole


def test_two_processes_fill_one_store(
    commands: Commands, root: Path, whole: dict[str, bytes]
) -> None:
    running = [commands.start(*extract(root), "--partition", f"{k}/2") for k in (0, 1)]
    for command in running:
        assert command.end() == 0, command.words
    assert store_files(root / STORE) == whole
