"""The scripts of benchmarks/ find the packages of this checkout without any PYTHONPATH."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.rooms import PACKAGES, ROOT
from tests.house.test_map import is_there

SCRIPTS = sorted(p for p in (ROOT / "benchmarks").glob("*.py") if "argparse" in p.read_text())


def test_no_folder_that_a_script_puts_on_the_path_hides_a_package() -> None:
    """`tests/` has folders called like the packages: on the path, it would stand before them."""
    for script in (ROOT / "benchmarks").glob("*.py"):
        for folder in re.findall(r"sys\.path\.insert\(0, str\((.+)\)\)\n", script.read_text()):
            added = eval(folder, {"Path": Path, "__file__": str(script), "TESTS": ROOT / "tests"})
            hidden = [n for n in PACKAGES if (added / n).is_dir() and added != ROOT]
            assert not hidden, f"{script.name}: {added} hides {', '.join(hidden)}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_imports_of_us_is_there(script: Path) -> None:
    missing = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES
        for alias in node.names
        if not is_there(f"{node.module}.{alias.name}")
    ]
    assert not missing, f"{script.name} imports what is not there: {', '.join(missing)}"


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_starts(script: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, script, "--help"],
        env={"PATH": "", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
