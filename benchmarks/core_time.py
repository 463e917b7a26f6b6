"""What work took on cores that other programs use as well.

Wall-clock time on a shared machine says as much about the others as about the work: a rate halves
when another program takes a core. CPU time does not see that, but it does not see threads that
wait either. `core` is what the work took from the cores it could have had: the time it ran on them
and the time it left them idle. On an idle machine that is wall-clock time times cores; a core that
another program ran on is charged to nobody. What the hypervisor takes without saying so is in all
three; measuring in short turns is the remedy for that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

_STAT = Path("/proc/stat")


class Took(NamedTuple):
    """Seconds of wall-clock time, of CPU time in all threads, and of the cores (see above)."""

    wall: float
    cpu: float
    core: float

    def __add__(self, other: object) -> Took:  # type: ignore[override]
        assert isinstance(other, Took)
        return Took(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class Watch:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._wall, self._cpu, self._idle = _now()

    def read(self) -> Took:
        """What the process has taken since then."""
        wall, cpu, idle = _now()
        wall, cpu = wall - self._wall, cpu - self._cpu
        if idle is None or self._idle is None:
            return Took(wall, cpu, wall * len(usable()))
        return Took(wall, cpu, cpu + idle - self._idle)


def timed(work: Callable[[], Any]) -> tuple[Took, Any]:
    """Run `work`: what it took, what it returned."""
    watch = Watch()
    result = work()
    return watch.read(), result


def usable() -> set[int]:
    """The cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _now() -> tuple[float, float, float | None]:
    """Wall, CPU, and idle seconds of the usable cores; None where the system does not tell."""
    idle = None
    if _STAT.is_file():
        names = {f"cpu{number}" for number in usable()}
        lines = [line.split() for line in _STAT.read_text().splitlines()]
        # Columns: user nice system idle iowait ...; a core that waits for a disk is idle as well.
        ticks = sum(int(line[4]) + int(line[5]) for line in lines if line and line[0] in names)
        idle = ticks / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), time.process_time(), idle
