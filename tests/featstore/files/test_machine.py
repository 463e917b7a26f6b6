"""What this machine can do: one answer for all who ask."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from featstore.files.machine import cpu_has_bf16
from heads import arithmetic
from pipeline import clip_encoder

INTEL = "model name\t: Intel(R) Xeon(R)\nflags\t\t: fpu avx512f{0}\nbugs\t\t: spectre_v1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd sve{0} i8mm\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("text", "has"),
    [
        (INTEL.format(" amx_bf16 avx512_bf16 amx_tile"), True),
        (INTEL.format(" amx_bf16"), True),
        (INTEL.format(" avx512_bf16").replace("Intel(R) Xeon(R)", "AMD EPYC"), True),
        (INTEL.format(""), False),
        ("model name\t: with bf16\nflags\t\t: fpu\nvmx flags\t: bf16\n", False),
        (ARM.format(" bf16"), True),
        (ARM.format(""), False),
        ("", False),
    ],
)
def test_which_processors_multiply_bf16(tmp_path: Path, text: str, has: bool) -> None:
    folder = tmp_path / "proc"
    folder.mkdir()
    (folder / "cpuinfo").write_text(text)
    assert cpu_has_bf16(tmp_path) is has


def test_a_system_that_does_not_tell_has_none(tmp_path: Path) -> None:
    assert not cpu_has_bf16(tmp_path)


def test_encoder_and_heads_ask_the_same() -> None:
    assert vars(clip_encoder)["cpu_has_bf16"] is cpu_has_bf16
    assert vars(arithmetic)["cpu_has_bf16"] is cpu_has_bf16


HOLES = """
import ctypes, mmap
from featstore.files import machine
for name in {asked}:
    getattr(machine, name)()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE
def block(size):
    found = libc.malloc(size)
    ctypes.memset(found, 1, size)
    return found
libc.free(block(31 << 20))  # raises the limit, where it may rise
before = held()
blocks = [block(8 << 20) for _ in range(10)]
for freed in blocks[:-1]:
    libc.free(freed)
print(held() - before)
"""
RETURN, KEEP = "return_large_blocks", "keep_freed_blocks"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_blocks_go_back_to_the_system() -> None:
    """Although a later block is still held; unless they are to be kept."""
    left = [
        int(subprocess.check_output([sys.executable, "-c", HOLES.format(asked=asked)]))
        for asked in ((), (RETURN,), (RETURN, KEEP))
    ]
    assert left[0] > 9 * 2**23
    assert left[1] < 2 * 2**23
    assert left[2] > 5 * 2**23  # the first block, kept as well, holds the others
