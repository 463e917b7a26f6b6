"""CSV that a spreadsheet can open safely, and the way back to the values.

A spreadsheet runs a cell that begins like a formula. Such a cell gets a "'" before it, which
`plain_cell` takes away again. Characters that cannot be seen or that change the order of others
are written as escapes (`safe_text`).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Final

from featstore.errors import safe_text

__all__ = ["csv_bytes", "csv_line", "csv_rows", "plain_cell", "safe_cell", "safe_text"]

# What spreadsheets take for the beginning of a formula, in its wide forms too (OWASP, "CSV
# injection"). Quotes before it count as part of it, so that a defused cell can be told apart.
_FORMULA: Final = re.compile(r"[\s']*[=+\-@\uff1d\uff0b\uff0d\uff20]")
_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def safe_cell(value: object) -> str:
    """Write a value for a cell of CSV: None as "", and no text that a spreadsheet would run."""
    text = "" if value is None else safe_text(str(value))
    harmless = isinstance(value, int | float) or _NUMBER.fullmatch(text)
    return text if harmless or not _FORMULA.match(text) else f"'{text}"


def plain_cell(cell: str) -> str:
    """Return the text that `safe_cell` made `cell` of; escapes of `safe_text` stay."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def csv_line(cells: Iterable[object]) -> str:
    """Write one row of CSV with its line end; every cell goes through `safe_cell`."""
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n").writerow(map(safe_cell, cells))
    return line.getvalue()


def csv_bytes(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, bom: bool = False
) -> bytes:
    """Write a table as CSV in UTF-8, a header and one line a row, each cell by `safe_cell`.

    With `bom` it begins with a byte order mark, without which Excel takes UTF-8 for something else.
    """
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(map(safe_cell, columns))
    table.writerows([*map(safe_cell, row)] for row in rows)
    return text.getvalue().encode("utf-8-sig" if bom else "utf-8")


def csv_rows(raw: bytes, column: str = "") -> list[list[str]]:
    """Read the rows of CSV that `csv_bytes` wrote, or that an earlier version wrote as it was.

    Where the first row has no `column` but has one with semicolons or tabs in place of commas, the
    table has these: spreadsheets write them so in many countries. Raises ValueError
    (UnicodeDecodeError among them) if the bytes are no CSV in UTF-8.
    """
    try:
        text = raw.decode("utf-8-sig")
        first = text.splitlines()[:1]
        found = (s for s in ",;\t" if column in chain(*csv.reader(first, delimiter=s)))
        separator = next(found, ",") if column else ","
        rows = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
        return [[*map(plain_cell, row)] for row in rows]
    except csv.Error as error:
        raise ValueError(f"no CSV: {error}") from error
