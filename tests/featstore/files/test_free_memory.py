"""Free memory is the least of what the machine and the process's control groups leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from featstore.files.machine import available_memory

MIB = 2**20


def machine(root: Path, groups: str, files: dict[str, str]) -> int:
    """Free memory in MiB on a machine with 1,000 MiB free, whose files these are."""
    files = {
        "proc/meminfo": f"MemTotal: 9 kB\nMemAvailable: {1000 * 1024} kB\nHugePages_Free: 0\n"
    } | {
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return available_memory(root) // MIB


def version_2(folder: str, limit: int | None, used: int = 0, cached: int = 0) -> dict[str, str]:
    """The files of a group, sizes in MiB."""
    return {
        f"{folder}memory.max": "max\n" if limit is None else f"{limit * MIB}\n",
        f"{folder}memory.current": f"{used * MIB}\n",
        f"{folder}memory.stat": f"anon 5\nactive_file {cached * MIB}\ninactive_file 0\n",
    }


def version_1(folder: str, limit: int, used: int, cached: int) -> dict[str, str]:
    return {
        f"memory/{folder}memory.limit_in_bytes": f"{limit * MIB}\n",
        f"memory/{folder}memory.usage_in_bytes": f"{used * MIB}\n",
        f"memory/{folder}memory.stat": (
            f"active_file 1\ntotal_active_file {cached * MIB}\ntotal_inactive_file {MIB}\n"
        ),
    }


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, 1000),
        ("0::/\n", {}, 1000),
        ("0::/\n", version_2("", None), 1000),
        ("0::/\n", version_2("", 600, used=100), 500),
        ("0::/\n", version_2("", 5000, used=100), 1000),  # more than the machine has
        ("0::/\n", version_2("", 600, used=700), 0),
        # Files that were read fill the group and are given back.
        ("0::/\n", version_2("", 600, used=600, cached=450), 450),
        # The limit of a group further out holds, too, and so does that of the group itself.
        ("0::/job/step\n", version_2("job/step/", None) | version_2("job/", 300, used=100), 200),
        ("0::/job/step\n", version_2("job/step/", 150) | version_2("job/", 300, used=100), 150),
        # A container's own group is its top, whatever it is called outside.
        ("0::/kubepods/pod1\n", version_2("", 400, used=100), 300),
        ("4:cpu,memory:/docker/1\n0::/\n", version_1("", 400, used=300, cached=199), 300),
        ("4:memory:/job\n", version_1("job/", 400, used=300, cached=99), 200),
        ("3:cpu:/job\n", version_1("job/", 400, used=300, cached=99), 1000),
    ],
)
def test_the_least_that_anything_leaves(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    assert machine(tmp_path, groups, files) == expected


def test_of_this_machine() -> None:
    assert available_memory() > 2**20
