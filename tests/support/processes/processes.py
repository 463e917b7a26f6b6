"""Starts `mote-cli` in processes of its own, waits for a moment of their work, and signals them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEADLINE_S = 120

REPOSITORY = Path(__file__).parents[3]


@dataclass
class Commands:
    """Starts commands as forks of one process that has loaded torch already (forking.py)."""

    driver: subprocess.Popen[str]
    folder: Path
    started: int = 0
    at_work: set[int] = field(default_factory=set)  # pids
    codes: dict[int, int] = field(default_factory=dict)  # by pid: negative for a signal

    def start(self, *arguments: str | Path, environment: dict[str, str] | None = None) -> Running:
        """Start `mote-cli ARGUMENTS`, with more of an environment; others may be at work."""
        self.started += 1
        out, err = (self.folder / f"{self.started}.{name}" for name in ("out", "err"))
        line = {
            "arguments": list(map(str, arguments)),
            "out": str(out),
            "err": str(err),
            "environment": environment or {},
        }
        assert self.driver.stdin is not None
        self.driver.stdin.write(json.dumps(line) + "\n")
        self.driver.stdin.flush()
        while "code" in (answer := self._answer()):
            self._ended(answer)
        self.at_work.add(answer["pid"])
        return Running(self, answer["pid"], out, err)

    def wait(self, pid: int) -> int:
        """Exit code of a command once it has ended."""
        while pid not in self.codes:
            self._ended(self._answer())
        return self.codes.pop(pid)

    def _ended(self, answer: dict[str, int]) -> None:
        self.codes[answer["pid"]] = answer["code"]
        self.at_work.discard(answer["pid"])

    def _answer(self) -> dict[str, int]:
        assert self.driver.stdout is not None
        answer: dict[str, int] = json.loads(self.driver.stdout.readline())
        return answer


@dataclass
class Running:
    """A command at work."""

    commands: Commands
    pid: int
    out: Path
    err: Path

    def until(self, moment: Callable[[], bool]) -> None:
        """Return as soon as `moment` is there."""
        deadline = time.monotonic() + DEADLINE_S
        while not moment():
            time.sleep(0.0002)  # a test that spins takes the core that the command needs
            assert time.monotonic() < deadline, self.words

    def stop(self, moment: Callable[[], bool], *signals: int) -> int:
        """Signal the command once `moment` is there; returns the exit code."""
        self.until(moment)
        for number in signals:
            os.kill(self.pid, number)
        return self.end()

    def kill(self) -> int:
        """Kill it with kill -9, if it has not ended by itself; returns the exit code."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.end()

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def end(self) -> int:
        """Wait for the end; returns the exit code."""
        return self.commands.wait(self.pid)

    @property
    def words(self) -> str:
        """What it wrote to stderr so far."""
        return self.err.read_text() if self.err.exists() else ""

    @property
    def json(self) -> Any:
        """The one JSON object that it printed."""
        return json.loads(self.out.read_text())


@contextmanager
def command_starter(folder: Path, *before: str) -> Iterator[Commands]:
    """Start commands, with the words `before` a program; what they print lies in `folder`."""
    driver = subprocess.Popen(
        [*before, sys.executable, str(Path(__file__).with_name("forking.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    commands = Commands(driver, folder)
    yield commands
    for pid in commands.at_work:  # of a test that failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert driver.stdin is not None
    driver.stdin.close()
    assert driver.wait(DEADLINE_S) == 0
