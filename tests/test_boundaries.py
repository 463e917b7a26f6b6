"""The direction in which the packages may import each other (docs/decisions/0001)."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "featstore", "heads", "cli")
ALLOWED = {
    "featstore": set(),
    "pipeline": {"featstore"},
    "heads": {"featstore"},
    "cli": {"featstore", "pipeline", "heads"},
}
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of everything a module imports, inside functions as well."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively: write the package's name"
            names.add((node.module or "").partition(".")[0])
    return names


def allowed(path: Path) -> set[str]:
    package, *inner = path.relative_to(ROOT).with_suffix("").parts
    neighbours = ALLOWED[package] | {package}
    # The end-to-end mode trains the tower, so it decodes and preprocesses videos itself.
    if package == "heads" and inner and inner[0] == "end_to_end":
        neighbours |= {"pipeline"}
    return neighbours


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_in_the_allowed_direction(path: Path) -> None:
    forbidden = imported(path) & set(PACKAGES) - allowed(path)
    assert not forbidden, f"{path.relative_to(ROOT)} must not import {', '.join(forbidden)}"


def test_every_package_was_read() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(PACKAGES)


def test_the_check_sees_a_forbidden_import(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("def late():\n    from pipeline.sampling import parse_sampling\n")
    assert "pipeline" in imported(module)
    assert "pipeline" not in allowed(ROOT / "featstore" / "reader.py")


def test_every_third_party_import_is_a_declared_dependency() -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    distribution = {
        "open_clip": "open_clip_torch",
        "nvidia": "nvidia-dali-cuda130",
        "google_crc32c": "google-crc32c",
        "PIL": "pillow",
    }
    found = set().union(*map(imported, MODULES)) - set(PACKAGES) - sys.stdlib_module_names
    missing = {name for name in found if f'"{distribution.get(name, name)}' not in declared}
    assert not missing, f"imported and not declared in pyproject.toml: {', '.join(missing)}"


def test_no_module_takes_the_name_of_a_library() -> None:
    taken = {path.relative_to(ROOT / path.relative_to(ROOT).parts[0]).parts[0] for path in MODULES}
    top_level = {name.removesuffix(".py") for name in taken}
    assert not top_level & set(sys.stdlib_module_names) - {"__init__"}
