"""How much memory this process may still take: of the machine, and of the groups it is in.

Containers and batch systems limit a process by control groups (cgroups v1 and v2, Linux kernel
documentation), while /proc/meminfo speaks of the whole machine. What files left in the page cache
counts as used there, too, and is given back when memory is wanted, so that it is free here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# Limit, usage, and what the lines of `memory.stat` begin with that count the groups below, too.
_VERSION_2: Final = ("memory.max", "memory.current", "")
_VERSION_1: Final = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def available_memory(root: Path = Path("/")) -> int:
    """Bytes this process may still take; `root` is the folder that holds `proc` and `sys`."""
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = _numbers(meminfo)["MemAvailable"] * 1024
    rooms = [_room(folder, *files) for folder, files in _groups(root)]
    return max(0, min([free, *(room for room in rooms if room is not None)]))


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The memory groups of this process, up to the outermost that can be seen, and their files."""
    mounts = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, files = mounts, _VERSION_2
        elif "memory" in controllers.split(","):
            top, files = mounts / "memory", _VERSION_1
        else:
            continue
        # A container may see its own group as the top, and be told its path outside.
        group = top / path.lstrip("/")
        yield from ((folder, files) for folder in [group, *group.parents] if top in folder.parents)
        yield top, files


def _room(group: Path, limit: str, usage: str, prefix: str) -> int | None:
    """Bytes that a group leaves, None where it sets no limit."""
    try:
        most = int((group / limit).read_text())  # "max" where there is none
        used = int((group / usage).read_text())
        counts = _numbers(group / "memory.stat")
    except (OSError, ValueError):
        return None
    files = sum(counts.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
    return most - max(0, used - files)


def _numbers(path: Path) -> dict[str, int]:
    """First number of each line by its first word."""
    fields = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {name: int(number) for name, number, *_ in fields}
