"""`mote-cli finetune` as several real processes, and what happens when one of them dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes.processes import DEADLINE_S, Commands, Running, command_starter
from tests.support.worlds.tuning import (
    difference,
    files_of,
    finetune,
    start_lines,
    start_ranks,
    tuning_workspace,
)

TOLERANCE = 1e-5  # of weights that several steps of AdamW moved by up to 3e-3, in float32


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with command_starter(tmp_path_factory.mktemp("output")) as commands:
        yield commands


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuning_workspace(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def root(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "root")
    return tmp_path / "root"


def ended(running: list[Running]) -> list[int]:
    return [process.end() for process in running]


def require_equal(root: Path, one: str, other: str) -> None:
    a, b = files_of(root, one), files_of(root, other)
    assert difference(a["tower"], b["tower"]) < TOLERANCE
    assert difference(a["head"], b["head"]) < TOLERANCE
    for mine, theirs in zip(a["metrics"], b["metrics"], strict=True):
        for name in ("loss", "expert_loss", "merged_loss", "feature_loss", "logit_scale"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5)
        assert mine["evaluation"] == theirs["evaluation"]
        assert mine["samples"] == theirs["samples"]


ACCUMULATED = ("--accumulation", "2", "--epochs", "3")


@pytest.fixture(scope="module")
def one(commands: Commands, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which one process trained on batches of ten."""
    root = tmp_path_factory.mktemp("one") / "root"
    shutil.copytree(packed, root)
    alone = commands.start(*finetune(root, "one", *ACCUMULATED, batch_size=10))
    assert alone.end() == 0, alone.words
    return root


@pytest.mark.parametrize("shard", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_are_one_with_twice_the_batch(
    commands: Commands, one: Path, shard: str
) -> None:
    """Five videos per process: of the second batch's two, each has one."""
    running = start_ranks(
        commands, 2, *finetune(one, shard, *ACCUMULATED, "--shard", shard, batch_size=5)
    )
    assert ended(running) == [0, 0], running[0].words + running[1].words
    summary = running[0].json
    assert summary["videos_per_step"] == 10
    assert summary["processes"] == 2
    assert summary["sharded"] == (shard == "fsdp")
    assert running[1].out.read_text() == ""
    assert "error" not in running[1].words
    require_equal(one, "one", shard)


def damage(root: Path, keys: set[str]) -> None:
    """Overwrite the middle of some packed videos; their places and sizes stay."""
    for tar in sorted((root / "datasets/clips/shards").glob("*.tar")):
        with tarfile.open(tar) as archive:
            members = [m for m in archive if m.name.endswith(".mp4")]
        with open(tar, "r+b") as file:
            for member in members:
                if member.name.removesuffix(".mp4") in keys:
                    file.seek(member.offset_data + 40)
                    file.write(b"\xff" * (member.size - 80))


def keys_of(root: Path, split: str) -> list[str]:
    dataset = json.loads((root / "datasets/clips/dataset.json").read_text())
    return sorted(dataset["splits"][split])


@pytest.mark.slow
def test_bad_videos_weigh_the_same_wherever_they_are(commands: Commands, root: Path) -> None:
    """Some batches of a process have no good video at all: it takes part with weight zero."""
    damage(root, set(keys_of(root, "train")[:5]) | set(keys_of(root, "val")[:2]))
    allowed = ("--max-failures", "0.5")
    alone = commands.start(*finetune(root, "one", *allowed, batch_size=2))
    assert alone.end() == 0, alone.words
    running = start_ranks(commands, 2, *finetune(root, "two", *allowed, batch_size=1))
    assert ended(running) == [0, 0], running[0].words + running[1].words
    for summary in (alone.json, running[0].json):
        assert (summary["n_listed"], summary["n_failed"]) == (12, 5)
        assert (summary["n_evaluated"], summary["n_evaluated_failed"]) == (6, 2)
    require_equal(root, "one", "two")
    assert files_of(root, "one")["failures"] == files_of(root, "two")["failures"]
    again = start_ranks(commands, 2, *finetune(root, "three", batch_size=1))
    assert ended(again) == [1, 1]
    assert again[0].words.count("error: 7 of 18 videos failed") == 1
    assert "error" not in again[1].words


@pytest.mark.slow
def test_draws_of_each_process_differ(commands: Commands, root: Path) -> None:
    running = start_ranks(commands, 2, *finetune(root, "two", "--draws", "per-rank", batch_size=2))
    assert ended(running) == [0, 0], running[0].words
    shared = start_ranks(commands, 2, *finetune(root, "one", batch_size=2))
    assert ended(shared) == [0, 0], shared[0].words
    assert difference(files_of(root, "one")["head"], files_of(root, "two")["head"]) > TOLERANCE
    other = finetune(root, "two", "--draws", "per-rank", "--resume", batch_size=4)
    refused = commands.start(*other)
    assert refused.end() == 2
    assert "batch.processes is 2 in the run, asked for 1" in refused.words


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_run_everywhere_and_it_resumes(
    commands: Commands, root: Path, victim: int
) -> None:
    other = 1 - victim
    command = finetune(root, "r", "--epochs", "12", "--checkpoint-every", "1", batch_size=1)
    state = root / "heads/r/state/last.safetensors"
    running = start_ranks(commands, 2, *command)
    running[1].until(state.exists)
    assert running[victim].kill() == -signal.SIGKILL
    assert running[other].end() == 1
    words = running[other].words
    (line,) = [line for line in words.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: rank {other} of 2 lost the others (")
    assert line.endswith("continue with the same command and --resume")
    assert "Traceback" not in words
    assert not (root / "heads/r/head.safetensors").exists()
    # The order is a global one: one process with the same global batch may go on.
    refused = commands.start(*command, "--resume")
    assert refused.end() == 2
    assert "batch.videos_per_step is 2 in the run, asked for 1" in refused.words
    alone = commands.start(*command, "--resume", "--batch-size", "2")
    assert alone.end() == 0, alone.words
    assert 0 < alone.json["resumed_from"] < 72
    records = files_of(root, "r")["metrics"]
    assert [record["epoch"] for record in records] == list(range(1, 13))
    assert all(record["samples"] == 12 for record in records)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["ddp", "fsdp"])
def test_resumed_processes_continue_as_if_uninterrupted(
    commands: Commands, root: Path, shard: str
) -> None:
    more = ("--epochs", "8", "--accumulation", "2", "--checkpoint-every", "1", "--shard", shard)
    whole = start_ranks(commands, 2, *finetune(root, "whole", *more, batch_size=2))
    assert ended(whole) == [0, 0], whole[0].words
    running = start_ranks(commands, 2, *finetune(root, "r", *more, batch_size=2))
    running[1].until((root / "heads/r/state/last.safetensors").exists)
    for process in running:
        assert process.kill() == -signal.SIGKILL
    running = start_ranks(commands, 2, *finetune(root, "r", *more, "--resume", batch_size=2))
    assert ended(running) == [0, 0], running[0].words + running[1].words
    assert 0 < running[0].json["resumed_from"] < 24
    require_equal(root, "whole", "r")


def test_a_mistake_is_told_once(commands: Commands, root: Path) -> None:
    running = start_ranks(commands, 2, *finetune(root, "r", "--train", "tower-last-9"))
    assert ended(running) == [2, 2]
    words = running[0].words + running[1].words
    assert words.count("error:") == 1
    assert "tower-last-9: the image tower has 2 blocks" in words
    assert not (root / "heads/r/config.json").exists()


def test_processes_that_were_started_differently(commands: Commands, root: Path) -> None:
    lines = [finetune(root, "r"), finetune(root, "r", "--lr", "0.5")]
    running = start_lines(commands, lines)
    assert ended(running) == [2, 2]
    words = running[0].words + running[1].words
    assert words.count("error:") == 1
    assert "the processes differ in training.lr: start all of them" in words


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_all_and_names_the_videos(
    commands: Commands, root: Path
) -> None:
    more = ("--lr", "1e30", "--warmup-epochs", "0", "--checkpoint-every", "1")
    running = start_ranks(commands, 2, *finetune(root, "r", *more, batch_size=2))
    assert ended(running) == [1, 1]
    words = running[0].words + running[1].words
    assert words.count("error:") == 1, words
    noted = json.loads((root / "heads/r/state/not-finite.json").read_text())
    assert noted["epoch"] == 1
    assert len(noted["keys"]) == 4  # of both processes
    assert all(key in words for key in noted["keys"])


@pytest.mark.timeout(120)
def test_torchrun_starts_and_stops_the_processes(root: Path) -> None:
    """The documented command; torchrun's own agent ends the others when one is killed."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m")
    command = finetune(root, "r", "--epochs", "200", "--checkpoint-every", "1", batch_size=1)
    log = root / "log"
    with log.open("w") as file:
        running = subprocess.Popen(
            [*torchrun, "cli.main", *command],
            stdout=file,
            stderr=file,
            cwd=Path(__file__).parent.parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        waiting = Running(Commands(running, root), running.pid, log, log)
        waiting.until((root / "heads/r/state/last.safetensors").exists)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        of_rank = {
            pid: dict(
                part.partition("=")[::2]
                for part in Path(f"/proc/{pid}/environ").read_text().split("\0")
            ).get("RANK")
            for pid in children
        }
        (victim,) = [pid for pid, rank in of_rank.items() if rank == "1"]
        os.kill(int(victim), signal.SIGKILL)
        assert running.wait(DEADLINE_S) == 1
    lines = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: rank 0 of 2 ")
    assert lines[0].endswith("continue with the same command and --resume")
