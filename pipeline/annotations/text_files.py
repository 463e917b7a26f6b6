"""Reads annotation files as text, tables and JSON; every error names the file and the remedy."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from featstore.errors import UserError, one_line
from featstore.files import documents
from featstore.files.documents import LISTS_LIMIT

# A label or a path never comes near this; a file that is one endless field is no table.
csv.field_size_limit(1_000_000)

_QUOTED = re.compile(r'"((?:[^"]|"")*)"', re.DOTALL)
_QUOTED_FIRST = re.compile(rf"{_QUOTED.pattern}\s*,(.*)", re.DOTALL)


def read_text(path: Path) -> str:
    """Return the text without a byte-order mark. Raises UserError when it is not UTF-8."""
    raw = documents.read_document(path, "make it readable or name another", limit=LISTS_LIMIT)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"annotation file {str(path)!r} is not UTF-8 text: save it as UTF-8 or name another"
        ) from error


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return (line number, text) of every line that is not blank, without its line end."""
    lines = enumerate(read_text(path).splitlines(), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def read_table(path: Path, separator: str = ",") -> list[list[str]]:
    """The rows of a table with quoted cells; blank rows are left out, cells are stripped."""
    return [row for row, _ in table_rows(path, separator)]


def table_rows(path: Path, separator: str = ",") -> list[tuple[list[str], str]]:
    """The rows of `read_table`, each with its text as it stands in the file."""
    lines = read_text(path).splitlines()
    reader, rows, done = csv.reader(lines, delimiter=separator), [], 0
    try:
        for row in reader:
            text, done = "\n".join(lines[done : reader.line_num]), reader.line_num
            if any(cell.strip() for cell in row):
                rows.append(([cell.strip() for cell in row], text))
    except csv.Error as error:
        raise UserError(f"{str(path)!r} is not a table: {one_line(error)}; correct it") from error
    return rows


def first_and_rest(text: str, at: int = 0) -> tuple[str, str]:
    """Split the text of a row of CSV into its first cell and the rest, which keeps its bytes.

    So an unquoted name may hold commas. `at` passes over so many commas of the first cell, which
    is then not quoted. A rest that is quoted as a whole is what the quotes hold.
    """
    quoted_first = _QUOTED_FIRST.fullmatch(text) if at == 0 else None
    if quoted_first is not None:
        first, rest = quoted_first[1].replace('""', '"'), quoted_first[2]
    else:
        cells = text.split(",")
        first, rest = ",".join(cells[: at + 1]), ",".join(cells[at + 1 :])
    rest = rest.strip()
    whole = _QUOTED.fullmatch(rest)
    return first.strip(), rest if whole is None else whole[1].replace('""', '"').strip()


def read_json(path: Path) -> Any:
    """The file's JSON value. Raises UserError when it is not JSON."""
    return documents.read_json(path, "fetch it again", limit=LISTS_LIMIT, foreign=True)


def is_number(text: str) -> bool:
    """Whether a cell is a label's number or a count: ASCII digits, and no more than 18."""
    return text.isascii() and text.isdecimal() and len(text) <= 18


def list_files(folder: Path) -> list[Path]:
    """The files directly in a folder, sorted, without hidden ones; UserError when unreadable."""
    try:
        return sorted(
            path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
        )
    except OSError as error:
        raise UserError(
            f"cannot read folder {str(folder)!r}: {error.strerror}; make it readable"
        ) from error


def opening(path: Path, size: int = 65536) -> str:
    """The first characters of a file, to tell its format; empty when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(size).decode("utf-8-sig", "replace")
    except OSError:
        return ""


def header(path: Path) -> list[str]:
    """Return the cells of the first line in lower case, split at commas."""
    lines = opening(path).lstrip().splitlines()
    row = next(csv.reader(lines[:1]), []) if lines else []
    return [cell.strip().lower() for cell in row]
