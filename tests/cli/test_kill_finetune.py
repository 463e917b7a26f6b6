"""`mote-cli finetune` killed with kill -9 again and again.

Whatever happens, `--resume` leaves what an uninterrupted run leaves, bit for bit: weights,
optimiser, records (but for times), encoder and head.
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
from typing import Any

import pytest

from tests.support.processes.processes import Commands, Running, command_starter
from tests.support.worlds.tuning import files_of, finetune, same_bits, tuning_workspace

EPOCHS = 6
MORE = ("--epochs", str(EPOCHS), "--accumulation", "2")  # 3 batches: a remainder is carried over


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with command_starter(tmp_path_factory.mktemp("output")) as commands:
        yield commands


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuning_workspace(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def whole(
    commands: Commands, packed: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a run that nothing interrupted leaves."""
    root = tmp_path_factory.mktemp("whole") / "root"
    shutil.copytree(packed, root)
    running = commands.start(*finetune(root, "r", *MORE))
    assert running.end() == 0, running.words
    return files_of(root, "r")


def hunt(running: Running, root: Path, kind: str, chance: random.Random) -> None:
    """Wait for a random moment of one kind, or for the end of the process."""
    run = root / "heads/r"
    state = run / "state/last.safetensors"
    before = state.stat().st_mtime_ns if state.exists() else 0

    def saved() -> bool:
        return state.exists() and state.stat().st_mtime_ns != before

    moments: dict[str, tuple[Callable[[], bool], float]] = {
        "starting": (lambda: True, 1.5),
        "training": (saved, 0.3),
        "writing": (lambda: any(run.rglob("*.partial")), 0.003),
        "publishing": (
            lambda: (run / "tower.safetensors").exists() or (root / "encoders/r").exists(),
            0.01,
        ),
    }
    there, spread = moments[kind]
    running.until(lambda: there() or not running.alive)
    time.sleep(chance.uniform(0, spread))


def kill_again_and_again(
    commands: Commands, packed: Path, whole: dict[str, Any], folder: Path, kills: int, seed: int
) -> Counter[str]:
    """Kill -9 until `kills` have hit, finishing and comparing whenever a run gets to its end."""
    chance = random.Random(seed)
    hit: Counter[str] = Counter()
    kinds: list[str] = []
    rounds = 0
    while sum(hit.values()) < kills:
        rounds += 1
        root = folder / f"round {rounds}"
        shutil.copytree(packed, root)
        every = ("--checkpoint-every", str(chance.randint(1, 3)))
        code = None
        while code != 0:
            running = commands.start(*finetune(root, "r", *MORE, *every, "--resume"))
            if sum(hit.values()) < kills:
                kinds = kinds or chance.sample(
                    ["starting", "training", "training", "writing", "publishing"], 5
                )
                kind = kinds.pop()
                hunt(running, root, kind, chance)
                code = running.kill()
                hit[kind] += code != 0
            else:
                code = running.end()
            assert code in (0, -signal.SIGKILL), running.words
        assert same_bits(files_of(root, "r"), whole)
    return hit


def test_kill_9_again_and_again(
    commands: Commands, packed: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    assert sum(kill_again_and_again(commands, packed, whole, tmp_path, 4, seed=1).values()) == 4


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_thirty_kills(
    commands: Commands, packed: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    hit = kill_again_and_again(commands, packed, whole, tmp_path, 30, seed=2)
    assert min(hit[kind] for kind in ("starting", "training", "writing", "publishing")) >= 3, hit


def test_an_interruption_loses_at_most_what_was_done_since_the_last_checkpoint(
    commands: Commands, packed: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(packed, root)
    command = finetune(root, "r", "--epochs", "200", "--checkpoint-every", "1")
    running = commands.start(*command)
    code = running.stop((root / "heads/r/metrics.jsonl").exists, signal.SIGTERM)
    assert code == 130
    assert running.words.count("error: interrupted") == 1
    assert "Traceback" not in running.words
    second = commands.start(*command)
    assert second.end() == 2
    assert "run r exists" in second.words
    third = commands.start(*command, "--resume")
    third.until(lambda: "continuing r in epoch" in third.words or not third.alive)
    os.kill(third.pid, signal.SIGSTOP)  # it holds the run, and gets no further
    fourth = commands.start(*command, "--resume")
    assert fourth.end() == 1
    assert f"another process (pid {third.pid} " in fourth.words
    third.kill()
