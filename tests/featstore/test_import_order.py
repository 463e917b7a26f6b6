"""What importing a part of the store loads: no circle, and nothing heavy where it is not needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import featstore

FOLDER = Path(featstore.__file__).parent


def imported(node: ast.AST) -> Iterator[str]:
    """Modules of featstore that are imported, inside functions as well; not those of types only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.ImportFrom) and (child.module or "").startswith("featstore."):
            yield str(child.module).removeprefix("featstore.")
        yield from imported(child)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(FOLDER).with_suffix("").parts)


def test_there_is_no_circle() -> None:
    needs = {
        module_name(path): set(imported(ast.parse(path.read_text())))
        for path in FOLDER.rglob("*.py")
        if path.stem != "__init__"
    }
    assert needs["opening"] >= {"reading.store", "remote.writer"}
    TopologicalSorter(needs).prepare()  # CycleError names the modules of a circle


# What the command line loads before it knows which command it is to run.
LIGHT = "featstore.errors, featstore.workspace, featstore.progress, featstore.files.machine"


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        (f"import {LIGHT}", {"zarr", "torch", "numcodecs", "numpy"}),
        ("from featstore import open_store, StoreWriter, verify", {"zarr", "torch", "numcodecs"}),
    ],
)
def test_importing_loads_no_more_than_it_needs(statement: str, unwanted: set[str]) -> None:
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=FOLDER.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not unwanted & set(done.stdout.split())


def test_every_name_of_the_package_is_there() -> None:
    assert {name: getattr(featstore, name) for name in featstore.__all__}
    assert callable(featstore.verify)
    assert set(featstore.__all__) <= set(dir(featstore))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = featstore.nothing
