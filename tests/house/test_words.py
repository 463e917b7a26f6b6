"""Words that are easily used for several things have one meaning a room (docs/glossary.md).

Read are the names that others see: of modules, of public functions, classes and fields, and of
parameters of public functions. Names of what a user types or reads in JSON are as they are
promised; the table lists them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.house import rooms as house

GLOSSARY = (house.ROOT / "docs" / "glossary.md").read_text()
ROOMS = set(house.table(house.PAGE.read_text()))
# word, meaning, where: rooms, and names that stand as they are
ROWS = re.findall(r"^\| (\w+) \| ([^|]+) \| ([^|]+) \|$", GLOSSARY, re.MULTILINE)
WORDS = sorted({word for word, _, where in ROWS if "`" in where})


def words_of(name: str) -> set[str]:
    """The words of an identifier, in the singular: `ShardMap` and `shards_of` have "shard"."""
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return {word.lower().removesuffix("s") for word in found}


def public_names(tree: ast.Module) -> Iterator[str]:
    """Names of functions, classes, fields and parameters that do not begin with "_"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name
            yield from (argument.arg for argument in [*node.args.args, *node.args.kwonlyargs])
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def uses(word: str) -> dict[str, set[str]]:
    """Room -> its public names that hold the word."""
    found: dict[str, set[str]] = {}
    for path in house.MODULES:
        names = [path.stem, *public_names(ast.parse(path.read_text()))]
        held = {name for name in names if not name.startswith("_") and word in words_of(name)}
        if held:
            found.setdefault(house.room_of(house.dotted(path), ROOMS), set()).update(held)
    return found


def test_the_table_is_there() -> None:
    assert {"shard", "partition", "clip", "place", "plan", "record"} <= set(WORDS)


@pytest.mark.parametrize("word", WORDS)
def test_a_word_has_one_meaning_in_a_room(word: str) -> None:
    listed = [re.findall(r"`([\w.]+)`", where) for held, _, where in ROWS if held == word]
    rooms = [name for row in listed for name in row]
    assert len(rooms) == len(set(rooms)), f"{word!r} has two meanings in one room"
    wrong = {
        room: sorted(names - set(rooms))
        for room, names in uses(word).items()
        if room not in rooms and names - set(rooms)
    }
    assert not wrong, f"docs/glossary.md gives {word!r} no meaning here: {wrong}"


def test_every_term_stands_in_the_glossary_once() -> None:
    terms = [
        term
        for line in re.findall(r"^- \*\*.+?\*\*(?:(?:,| and| or) \*\*.+?\*\*)*:", GLOSSARY, re.M)
        for term in re.findall(r"\*\*(.+?)\*\*", line)
    ]
    assert len(terms) > 60
    twice = {term for term in terms if terms.count(term) > 1}
    assert not twice, f"the glossary explains {', '.join(sorted(twice))} twice"
