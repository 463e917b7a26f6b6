"""No module of the store needs, at any moment of a run, a module that needs it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

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
