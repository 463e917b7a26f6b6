"""Commands parse, call and print: no arithmetic and no choice between methods stands in `cli`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from heads.methods.registry import names
from tests.house import rooms as house

MODULES = [path for path in house.MODULES if path.is_relative_to(house.ROOT / "cli")]
WORK = {"torch", "numpy", "zarr", "av", "open_clip", "einops"}


@pytest.mark.parametrize("path", MODULES, ids=house.dotted)
def test_a_command_imports_no_library_that_does_the_work(path: Path) -> None:
    found = {name.partition(".")[0] for name in house.imported_modules(path)}
    assert not found & WORK


@pytest.mark.parametrize("path", MODULES, ids=house.dotted)
def test_a_command_names_no_method(path: Path) -> None:
    """Methods come from the registry: no name of one is compared with, listed or handed on."""
    words = {
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not words & set(names())
    lists = {word for word in words if len(set(word.split("|")) & set(names())) > 1}
    assert not lists
