"""Sentences that the code prints: verbs agree with counts, and names are escaped once."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from featstore.errors import counted, counted_of, quoted

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for room in ("featstore", "pipeline", "heads", "cli")
    for path in (ROOT / room).rglob("*.py")
)
# A count, then its noun, then a verb that is right for every number but 1.
PLURAL = re.compile(r"(?:<len\([^>]*>|%d)(?: of)?(?: [a-z]+){0,4} (?:are|were|have|do)\b")
MORE_THAN_ONE = {
    ("listing.py", "<len(ordered)> splits are"),  # more than MAX_SPLITS
    ("removal.py", "<len(found)> stores have"),
    ("begun_head.py", "<len(names)> classes that are"),  # "is not" would say less
    ("plan.py", "<len(old)> classes and are"),
    ("prompts.py", "<len(files)> are"),
}


def sentences(tree: ast.AST) -> Iterator[str]:
    """All texts of a module, in f-strings the code of a value between < and >."""
    inside = {
        part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value)
                if isinstance(part, ast.Constant)
                else f"<{ast.unparse(part.value)}>"
                for part in node.values
                if isinstance(part, ast.Constant | ast.FormattedValue)
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            yield node.value


def test_verbs_agree_with_counts() -> None:
    """`counted` and `counted_of` write a count with its verb."""
    found = {
        (path.name, match[0])
        for path in FILES
        for text in sentences(ast.parse(path.read_text()))
        for match in PLURAL.finditer(text)
    }
    assert found - MORE_THAN_ONE == set()
    assert found >= MORE_THAN_ONE  # the list has nothing else


def test_no_name_is_escaped_twice() -> None:
    twice = re.compile(r"one_line\([^{}\n]*\)!r|repr\((?:one_line|safe_text)\(")
    assert [path.name for path in FILES if twice.search(path.read_text())] == []


@pytest.mark.parametrize(
    ("name", "written"),
    [("a b", "'a b'"), ("it's", '"it\'s"'), ("\x1b[31m", "'\\x1b[31m'"), ("\u202ex", "'\\u202ex'")],
)
def test_names_in_quotes(name: str, written: str) -> None:
    assert quoted(name) == written
    assert len(quoted(name * 100, 20)) == 22


def test_counts_in_words() -> None:
    assert [counted(n, "view") for n in (0, 1, 2)] == ["0 views", "1 view", "2 views"]
    assert [counted(n, "class has", "classes have") for n in (1, 3)] == [
        "1 class has",
        "3 classes have",
    ]
    assert counted_of(1, 1, "tar", "does", "do") == "1 of 1 tar does"
    assert counted_of(2, 5, "video") == "2 of 5 videos are"
