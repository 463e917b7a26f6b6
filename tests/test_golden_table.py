"""The table of golden files: complete, within tolerance, and able to fail."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.golden.checks import KINDS, Check, check_folder, worst
from tests.support.golden.dist.kinds import DIST_KINDS
from tests.support.golden.methods import kinds_of
from tests.support.golden.msta import MSTA_KINDS
from tests.support.golden.taco import TACO_KINDS
from tests.support.golden.viclip import VICLIP_KINDS

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "benchmarks" / "golden_table.py"
# what a check of another file reads, and what is tested elsewhere
READ_BY_OTHERS = ("README.md", "clip_*_openai_*.pt", "fullmodel_grad_*.npz", "e2e")


def test_every_golden_file_is_checked_and_every_number_holds(golden: Path) -> None:
    checked = set()
    for file, check in check_folder(golden):
        checked.add(file.name)
        assert check.holds, f"{file.name}: {check}"
    others = {path.name for pattern in READ_BY_OTHERS for path in golden.glob(pattern)}
    assert checked | others == {path.name for path in golden.iterdir()}
    missing = [p for p in KINDS if not any(Path(name).match(p) for name in checked)]
    # not kept in the repository; checked where the whole set is at hand
    assert missing == ["tokens_*.npz"]


def test_a_folder_has_the_kinds_of_its_own_methods() -> None:
    """Files of several methods have the same names: videos end to end, frames, tokens."""
    found = {folder.name: kinds_of(folder) for folder in (ROOT / "tests/data").glob("golden*")}
    assert found == {
        "golden": [KINDS],
        "golden_dist": [DIST_KINDS],
        "golden_msta": [MSTA_KINDS],
        "golden_taco": [TACO_KINDS],
        "golden_viclip": [VICLIP_KINDS],
    }


@pytest.mark.slow
def test_the_command_without_a_folder_holds_every_number_of_every_method() -> None:
    result = table()
    assert result.returncode == 0, result.stderr
    assert ", 0 above their tolerance" in result.stdout


def test_an_error_that_is_no_number_does_not_hold() -> None:
    assert Check("x", 0.0, 0.0).holds
    assert not Check("x", math.nan, 1.0).holds
    assert not Check("x", math.inf, 1.0).holds


def test_float32_is_held_relative_to_its_magnitude_and_float64_absolutely() -> None:
    large, small = torch.tensor([-8.0, 1.0]), torch.tensor([0.25, 0.5])
    assert worst(large + 2**-10, large) == 2**-13
    assert worst(small + 2**-10, small) == 2**-10
    assert worst(large.double() + 2**-10, large) == 2**-10
    assert worst(large, large[:1]) == math.inf


def table(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TABLE, *arguments],
        env={"PATH": "", "OMP_NUM_THREADS": "1"},  # as `make golden` calls it: no PYTHONPATH
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("changed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_command_fails_when_a_number_does(golden: Path, tmp_path: Path, changed: bool) -> None:
    data = dict(np.load(golden / "get_logits.npz"))
    if changed:
        data["logits_1_f32"] = data["logits_1_f32"] + 1e-5
    np.savez(tmp_path / "get_logits_7.npz", **data)
    result = table(tmp_path, "--json", tmp_path / "table.json")
    assert result.returncode == int(changed), result.stderr
    assert ("FAILS" in result.stdout) == changed
    lines = json.loads((tmp_path / "table.json").read_text())
    assert [(line["file"], line["quantity"], line["holds"]) for line in lines] == [
        ("get_logits_7.npz", "cosines f32", not changed),
        ("get_logits_7.npz", "cosines f64", True),
    ]


def test_a_folder_without_golden_files_is_an_error(tmp_path: Path) -> None:
    result = table(tmp_path)
    assert result.returncode == 2
    assert "no golden files" in result.stderr
