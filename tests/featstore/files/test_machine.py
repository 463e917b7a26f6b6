"""What this machine can do: one answer for all who ask."""

from __future__ import annotations

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
