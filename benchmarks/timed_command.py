"""Commands as a user runs them, each in a process of its own, and when things happened in them.

As a program it runs `mote-cli` with progress reports turned into moments:
`python timed_command.py MOMENTS.json extract --dataset ...`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent


class Ran(NamedTuple):
    """`seconds` from start to end, `monotonic` when it was started, its standard output."""

    seconds: float
    monotonic: float
    output: str


class Moments(NamedTuple):
    """Seconds since the command was started; `first` is None where there was nothing to do."""

    began: float
    first: float | None
    end: float


def run(command: Sequence[str | Path]) -> Ran:
    """Run a command with PyTorch's default threads; ends the program when it fails."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    # The packages are found in this checkout wherever the commands are started.
    found = [str(HERE.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, found))
    started = time.monotonic()
    ran = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    seconds = time.monotonic() - started
    if ran.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed: {ran.stderr.strip()}")
    return Ran(seconds, started, ran.stdout)


def mote_cli(*arguments: str | Path) -> Ran:
    """Run `mote-cli` as it is."""
    return run([sys.executable, "-m", "cli.main", *arguments])


def mote_cli_moments(scratch: Path, *arguments: str | Path) -> Moments:
    """Run `mote-cli` and note when its work began and its first unit (video) was done."""
    file = scratch / "moments.json"
    file.unlink(missing_ok=True)
    ran = run([sys.executable, __file__, file, *arguments])
    moments = json.loads(file.read_text())
    first = moments.get("first")
    return Moments(
        moments["began"] - ran.monotonic,
        None if first is None else first - ran.monotonic,
        ran.seconds,
    )


def _main() -> None:
    import cli.output

    file = Path(sys.argv.pop(1))
    moments: dict[str, float] = {}

    @contextmanager
    def progress_of(what: str, unit: str) -> Iterator[Any]:
        def sink(done: float, total: float, **details: object) -> None:
            moments.setdefault("began", time.monotonic())
            if done >= 1:
                moments.setdefault("first", time.monotonic())

        yield sink

    cli.output.progress_of = progress_of  # before the commands import it
    from cli.main import main

    try:
        main()
    finally:
        file.write_text(json.dumps(moments))


if __name__ == "__main__":
    _main()
