"""Every file and module that a document names is there."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.house.rooms import ROOT

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
PATH = re.compile(r"`((?:pipeline|featstore|heads|cli|tests|benchmarks|docs)/[\w./-]+)`")
IN_A_WORKSPACE = re.compile(r"heads/(RUN|r)/|NAME|benchmarks/results/")
DOTTED = re.compile(r"`((?:pipeline|featstore|heads|cli)(?:\.\w+)+)")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def is_there(dotted: str) -> bool:
    """Whether a module, or a name in one, can be imported."""
    module, names = dotted, list[str]()
    while True:
        try:
            found = import_module(module)
        except ModuleNotFoundError:
            module, _, name = module.rpartition(".")
            names.insert(0, name)
            continue
        break
    for name in names:
        if not hasattr(found, name):
            return False
        found = getattr(found, name)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_the_page_names_exists(page: Path) -> None:
    text = page.read_text()
    files = [ROOT / path for path in PATH.findall(text) if not IN_A_WORKSPACE.search(path)]
    files += [page.parent / link for link in LINK.findall(text)]
    missing = [str(path) for path in files if not path.exists()]
    missing += [name for name in DOTTED.findall(text) if not is_there(name)]
    assert not missing, f"{page.name} names what is not there: {', '.join(missing)}"


def test_the_map_answers_where_things_are_added() -> None:
    text = (ROOT / "docs/map.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    for what in ("a data set", "a tower", "a method", "a protocol", "a store codec", "a command"):
        assert f"| {what} |" in text
        assert f"**{what[0].upper()}{what[1:]}.**" in text
