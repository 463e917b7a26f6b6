"""Declared dependencies are imported, or say why they are there; imports are declared."""

from __future__ import annotations

import re
import sys
import tomllib

from tests.house.rooms import MODULES, PACKAGES, ROOT, imported_modules

PROJECT = (ROOT / "pyproject.toml").read_text()
# Distributions whose module has another name.
MODULE = {
    "open_clip_torch": "open_clip",
    "nvidia-dali-cuda130": "nvidia",
    "google-crc32c": "google_crc32c",
    "pillow": "PIL",
}


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=;~! ]", requirement, maxsplit=1)[0]


def declared() -> set[str]:
    """Distributions of the package and of its extras, but for those that only developers need."""
    project = tomllib.loads(PROJECT)["project"]
    extras = {name: r for name, r in project["optional-dependencies"].items() if name != "dev"}
    return {name_of(r) for group in (project["dependencies"], *extras.values()) for r in group}


def imported() -> set[str]:
    names = set().union(*map(imported_modules, MODULES))
    texts = "".join(path.read_text() for path in MODULES)
    # What is loaded by name, where it may be missing (importlib.import_module, find_spec).
    names |= set(re.findall(r"(?:import_module|find_spec)\(\s*[\"']([\w.]+)", texts))
    top = {name.partition(".")[0] for name in names}
    return top - set(PACKAGES) - sys.stdlib_module_names


def test_every_import_is_declared() -> None:
    missing = imported() - {MODULE.get(name, name) for name in declared()}
    assert not missing, f"imported and not declared in pyproject.toml: {', '.join(missing)}"


def test_every_declared_dependency_is_imported_or_says_why_it_is_there() -> None:
    used = imported()
    idle = {name for name in declared() if MODULE.get(name, name) not in used}
    silent = {n for n in idle if not re.search(rf'^ *"{n}[^"]*",? *# \w+', PROJECT, re.MULTILINE)}
    assert not silent, f"imported nowhere: {', '.join(silent)}; say why beside it, or take it out"
    reasons = set(re.findall(r'^ *"([\w-]+)[^"]*",? *# not imported: ', PROJECT, re.MULTILINE))
    assert reasons == idle, "the reason stands beside those that are not imported, and only there"
