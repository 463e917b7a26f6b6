"""The direction in which packages may import each other (docs/decisions/0001 and 0021)."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("pipeline", "featstore", "heads", "cli")
ALLOWED = {
    "featstore": set(),
    "pipeline": {"featstore"},
    "heads": {"featstore"},
    "cli": {"featstore", "pipeline", "heads"},
}
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Dotted names of everything a module imports, inside functions as well.

    Of `from a import b` both `a` and `a.b`, which may be a module.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively: write the package's name"
            module = node.module or ""
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def imported(path: Path) -> set[str]:
    """Top-level names of everything a module imports."""
    return {name.partition(".")[0] for name in imported_modules(path)}


def of_evaluation(names: set[str]) -> set[str]:
    """Those of the imported `names` that load or pass on `heads.evaluation`."""
    return {name for name in names if name == "heads" or f"{name}.".startswith("heads.evaluation.")}


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


def test_models_and_training_know_nothing_of_evaluation() -> None:
    outside = [
        path
        for path in (ROOT / "heads").rglob("*.py")
        if "evaluation" not in path.relative_to(ROOT).parts and path != ROOT / "heads/__init__.py"
    ]
    assert len(outside) > 20
    wrong = {
        str(path.relative_to(ROOT)): sorted(found)
        for path in outside
        if (found := of_evaluation(imported_modules(path)))
    }
    assert not wrong, f"only heads/evaluation may import these: {wrong}"


@pytest.mark.parametrize(
    "line",
    [
        "from heads.evaluation.results import EvalResult",
        "from heads.evaluation import results",
        "from heads import evaluation",
        "from heads import EvalResult",
        "import heads.evaluation.results",
    ],
)
def test_the_check_sees_an_import_of_evaluation(tmp_path: Path, line: str) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        f"from heads.methods.mote.model import TemporalHead\n\ndef late():\n    {line}\n"
    )
    assert of_evaluation(imported_modules(module))
    module.write_text(
        "from heads.methods.mote.model import TemporalHead\nimport heads.scoring.scores\n"
    )
    assert not of_evaluation(imported_modules(module))


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


def test_every_package_is_installed() -> None:
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert find == {"find": {"include": [f"{p}*" for p in PACKAGES], "namespaces": False}}
    assert all((path.parent / "__init__.py").exists() for path in MODULES)


def test_no_module_takes_the_name_of_a_library() -> None:
    taken = {path.relative_to(ROOT / path.relative_to(ROOT).parts[0]).parts[0] for path in MODULES}
    top_level = {name.removesuffix(".py") for name in taken}
    assert not top_level & set(sys.stdlib_module_names) - {"__init__"}
