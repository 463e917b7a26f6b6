"""Every path and command that the documents for contributors name is there."""

from __future__ import annotations

import re

import pytest

from tests.house.rooms import ROOT

PAGES = ["CONTRIBUTING.md", "docs/map.md", "docs/glossary.md"]
PATH = re.compile(r"`((?:pipeline|featstore|heads|cli|tests|benchmarks|docs)/[\w./-]+)`")
LINK = re.compile(r"\]\(([^)#:]+\.md)")


@pytest.mark.parametrize("page", PAGES)
def test_paths_on_the_page_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = [path for path in PATH.findall(text) if "NAME" not in path]
    named += [str((ROOT / page).parent / link) for link in LINK.findall(text)]
    assert len(named) > 5 or page == "docs/glossary.md"
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, f"{page} names what is not there: {', '.join(missing)}"


def test_the_map_answers_where_things_are_added() -> None:
    text = (ROOT / "docs/map.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    for what in ("a data set", "a tower", "a method", "a protocol", "a store codec", "a command"):
        assert f"| {what} |" in text
        assert f"**{what[0].upper()}{what[1:]}.**" in text
