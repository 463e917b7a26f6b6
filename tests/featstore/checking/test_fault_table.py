"""The table of docs/reliability.md: every fault that is injected is told, or does no harm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.slow
def test_no_fault_gives_a_wrong_number() -> None:
    ran = subprocess.run(
        [
            *(sys.executable, REPOSITORY / "benchmarks" / "fault_table.py"),
            *("--times", "60", "--rounds", "40", "--kills", "0"),
        ],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "flipped bit in a features shard" in ran.stdout
