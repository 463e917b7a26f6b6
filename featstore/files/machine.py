"""What this process may use of the machine: memory, cores, bfloat16 products.

Containers and batch systems limit a process by control groups (cgroups v1 and v2, Linux kernel
documentation), while /proc/meminfo describes the whole machine. Control groups count the page cache
as used, but the system gives it back when memory is needed, so it counts as free here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# Limit, usage, and what the lines of `memory.stat` begin with that count the groups below, too.
_VERSION_2: Final = ("memory.max", "memory.current", "")
_VERSION_1: Final = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
# Of /proc/cpuinfo: Intel's and AMD's names of the instructions, and Arm's.
_MMAP_THRESHOLD: Final = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_LARGE_BLOCK: Final = 4 << 20
_TRIM_THRESHOLD: Final = -1  # M_TRIM_THRESHOLD
_LARGEST_KEPT: Final = 32 << 20  # glibc takes no higher limit
_MOST_KEPT: Final = 512 << 20
_BF16_FLAGS: Final = {"avx512_bf16", "amx_bf16", "bf16"}


def usable_cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_rss_mb() -> float:
    """The most memory this process has held so far, in megabytes of 10^6 bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1 if sys.platform == "darwin" else 1024) / 1e6


def return_large_blocks() -> None:
    """Make the C library return blocks of 4 MB and more to the system when they are freed.

    Else glibc raises its limit up to 32 MB as such blocks are freed, and keeps smaller ones in a
    heap with holes: a training step of ViT-B/16 held a tenth more than it used, one of DiST beside
    it a quarter. Other C libraries are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)


def keep_freed_blocks() -> None:
    """Make the C library keep up to 512 MB of freed blocks of up to 32 MB for the next ones.

    This is for work in small parts of the same sizes: the system clears every page that it gives,
    which took a quarter of the time of a training step of MSTA. It undoes `return_large_blocks`.
    Other C libraries are left as they are.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        library.mallopt(_TRIM_THRESHOLD, _MOST_KEPT)


def cpu_has_bf16(root: Path = Path("/")) -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16, AMX or Arm's bf16).

    `root` is the folder that holds `proc`; False where the system has no /proc/cpuinfo.
    """
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    names = (line.partition(":") for line in lines)
    return any(
        not _BF16_FLAGS.isdisjoint(flags.split())
        for name, _, flags in names
        if name.strip() in ("flags", "Features")
    )


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
    """Return the bytes that a group leaves free, or None if it sets no limit."""
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
