"""Reads the classes that a user names: in a text with commas, or in a file, with descriptions."""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from featstore.errors import UserError, counted, one_line, quoted
from featstore.files.documents import parse_json
from featstore.files.tables import plain_cell
from pipeline.annotations.class_names import class_list, distinct_names
from pipeline.annotations.tables import TABLES
from pipeline.annotations.text_files import read_text
from pipeline.prompts import DESCRIPTIONS_LIMIT, PromptSet, read_descriptions

logger = logging.getLogger(__name__)

# No class is called like this, so that a name with such an ending is taken for a file.
FILE_SUFFIXES: Final = (
    *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".list", ".lst", ".yaml", ".yml", ".toml"),
    *(".xls", ".xlsx", ".ods", ".npy", ".md"),
)
_CLASS_COLUMNS: Final = (*TABLES["columns"]["name"], "class", "name", "label")
_SET: Final = "classes"  # the name of the prompt set that descriptions become
_DESCRIPTION: Final = "description"


@dataclass(frozen=True)
class NamedClasses:
    """Classes in the order given; `descriptions` are the sentences of each, if it has its own.

    Raises UserError if there is only one.
    """

    names: tuple[str, ...]
    descriptions: PromptSet | None = None

    def __post_init__(self) -> None:
        if len(self.names) == 1:
            raise UserError(
                f"there is one class to choose from, {quoted(self.names[0], 60)}, and its "
                "score would always be 1: name at least two, for example what else happens in the "
                "videos"
            )


def read_classes(text: str) -> NamedClasses:
    """Read the classes that `text` names: "a, b, c", or a file.

    In a text a name with a comma is in quotes: 'run, "cut, chop"'. A file has one name a line, or
    is CSV with a column class or name and perhaps description, or JSON: a list of names, or
    {class: [descriptions]}. Raises UserError for a file that is named and does not exist, one that
    cannot be read, no name, and a name given twice.
    """
    path = Path(text)
    if _is_file(path):
        found = _from_file(path)
        logger.info(
            "--classes %s: %s read from this file",
            text,
            counted(len(found.names), "class", "classes"),
        )
        return found
    if text.strip().lower().endswith(FILE_SUFFIXES):
        raise UserError(
            f"--classes {text!r} looks like a file and there is none: correct its path, or name "
            'the classes themselves, "a,b,c"'
        )
    names = class_list(text)
    for name in names:
        if name.lower().endswith(FILE_SUFFIXES):
            raise UserError(
                f"--classes names the file {name!r} among classes: give one file alone, or names"
            )
    return NamedClasses(names)


def _is_file(path: Path) -> bool:
    """Whether there is a file, or a pipe that a shell made of a command's output."""
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):  # a text that is too long for a path
        return False


def _from_file(path: Path) -> NamedClasses:
    if path.is_file() and path.stat().st_size > DESCRIPTIONS_LIMIT:
        raise UserError(
            f"{path} has more than {DESCRIPTIONS_LIMIT} bytes: it is no list of classes"
        )
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _from_json(path)
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if suffix in (".csv", ".tsv"):
        return _from_table(path, lines)
    # A name that is quoted as a whole, as a table would have it, is the name inside.
    names = [
        line[1:-1] if line[0] == line[-1] == '"' and line.count('"') == 2 else line
        for line in lines
        if not line.startswith("#")
    ]
    if len(names) == 1 and "," in names[0]:
        raise UserError(f"{path} has the one line {quoted(names[0], 60)}: write one class a line")
    return NamedClasses(_some_names(path, names))


def _from_json(path: Path) -> NamedClasses:
    try:
        value: Any = parse_json(read_text(path), foreign=True)
    except ValueError as error:
        raise UserError(
            f'{path} is not JSON ({one_line(error, 80)}): write ["a", "b"] or '
            '{"a": ["a sentence", ...], ...}'
        ) from error
    if isinstance(value, dict):
        descriptions = read_descriptions(path, _SET)
        assert descriptions.descriptions is not None
        return NamedClasses(tuple(descriptions.descriptions), descriptions)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(
            f'{path} holds no list of names: write ["a", "b"] or {{"a": ["a sentence", ...], ...}}'
        )
    return NamedClasses(_some_names(path, value))


def _from_table(path: Path, lines: Sequence[str]) -> NamedClasses:
    """Read CSV or TSV; without a header it must have one column."""
    columns: dict[str, int] = {}
    separators = "\t" if path.suffix.lower() == ".tsv" else ",;\t"
    rows: list[list[str]] = []
    for separator in separators:
        rows = [
            [plain_cell(cell.strip()) for cell in row]
            for row in csv.reader(lines, delimiter=separator, skipinitialspace=True)
        ]
        columns = _columns(rows[0]) if rows else {}
        if columns:
            break
    if not columns:
        wide = next((row for row in csv.reader(lines, skipinitialspace=True) if len(row) > 1), None)
        if wide is not None:
            raise UserError(
                f"{path} has {len(wide)} columns and its first line names none of them class: "
                "begin it with the line class, or class,description"
            )
        rows, columns = [["class"], *csv.reader(lines)], {"class": 0}
    place, described = columns["class"], columns.get(_DESCRIPTION)
    for number, row in enumerate(rows, start=1):
        if len(row) <= max(columns.values()) or len(row) > len(rows[0]):
            raise UserError(
                f"{path} row {number} has {len(row)} columns, the first row {len(rows[0])}: "
                "complete it, and quote cells that hold a comma"
            )
    names = _some_names(path, [row[place] for row in rows[1:]])
    if described is None:
        return NamedClasses(names)
    sentences = {row[place]: (row[described],) for row in rows[1:]}
    for name, (sentence,) in sentences.items():
        if not sentence:
            raise UserError(
                f"{path} has no description of {name!r}: write one for every class, or leave the "
                "column out"
            )
    return NamedClasses(names, PromptSet(_SET, (), sentences, str(path)))


def _columns(row: Sequence[str]) -> dict[str, int]:
    """Return the places of "class" and "description"; {} if the row is no header."""
    words = [cell.lower() for cell in row]
    places = [words.index(word) for word in _CLASS_COLUMNS if word in words]
    described = [
        place for place, word in enumerate(words) if word in (_DESCRIPTION, f"{_DESCRIPTION}s")
    ]
    if not places:
        return {}
    return {"class": places[0], **({_DESCRIPTION: described[0]} if described else {})}


def _some_names(path: Path, names: Sequence[str]) -> tuple[str, ...]:
    if not any(name.strip() for name in names):
        raise UserError(f"{path} names no class: write one a line, at least two")
    for number, name in enumerate(names, start=1):
        if not name.strip():
            raise UserError(f"{path}: the name of class {number} is empty: write or remove it")
    return distinct_names(str(path), [name.strip() for name in names])
