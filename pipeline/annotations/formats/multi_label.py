"""Reads lists in which a video has several classes: CSV or TSV, a row a video or a row a class.

Whether a list is meant so, and what parts the classes in a cell, the user says with
`--multi-label`: the text alone can be read in several ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from featstore.errors import UserError, one_of, quoted
from pipeline.annotations.class_names import LabelMap
from pipeline.annotations.formats.path_label_lists import ListRow, label_names
from pipeline.annotations.label_names import is_name_file
from pipeline.annotations.listing import (
    ClassSpan,
    Listing,
    ListingBuilder,
    split_from_file_name,
    split_from_word,
)
from pipeline.annotations.tables import TABLES
from pipeline.annotations.text_files import opening, read_table
from pipeline.annotations.video_folder import VideoFolder, path_stem

ROWS: Final = "rows"
"""A row has one class, and a video as many rows as it has classes."""
CELLS: Final = (ROWS, "|", ";")
"""How the classes of a video are listed: in rows, or in one cell with this between them."""

LABEL_FIELDS: Final = ("labels", "classes", "actions", "class_names")
"""What columns and fields with several classes are usually called."""
_COLUMNS: Final = {
    "path": TABLES["columns"]["path"],
    "label": [*LABEL_FIELDS, *TABLES["columns"]["name"], *TABLES["columns"]["label"]],
    "split": TABLES["columns"]["split"],
    **TABLES["span_columns"],
}

Times = tuple[float | None, float | None]


def check_cells(cells: str) -> None:
    """Raise UserError unless `cells` is one of `CELLS`."""
    if cells == "list":
        raise UserError("--multi-label list is for --tars: give rows, '|' or ';' for a list")
    if cells not in CELLS:
        raise UserError(
            f"--multi-label {cells!r} is unknown: {one_of(cells, CELLS)} (rows: a row a class; "
            "else what parts the classes in a cell)"
        )


def read_multi_label(
    files: Sequence[Path],
    folder: VideoFolder,
    cells: str,
    class_names_file: Path | None = None,
    label_map: LabelMap = "corrected",
) -> Listing:
    """List videos with all classes of each, and the times in the columns `start` and `end`.

    A row with an empty cell is a video that shows none of the classes. Numbers get names as in
    other lists. Raises UserError for a table that cannot be read and when no row has a class.
    """
    check_cells(cells)
    lists = [path for path in files if not is_name_file(path)]
    named = [path for path in files if path not in lists]
    if class_names_file is None and len(named) == 1:
        class_names_file = named[0]
    builder = ListingBuilder(multi_label=True)
    rows: list[ListRow] = []
    times: list[Times] = []
    for path in lists:
        for row, span in multi_label_rows(path, cells, builder.note):
            rows.append(row)
            times.append(span)
    found = [folder.find_listed(row.path, row.split) for row in rows]
    labelled = [(row, path) for row, (path, _) in zip(rows, found, strict=True) if row.label]
    if not labelled:
        raise UserError("no row of the list has a class: name another list, or --unlabelled")
    names, order, builder.label_map = label_names(
        [row for row, _ in labelled],
        [path for _, path in labelled],
        *(class_names_file, folder.root, builder.note, label_map),
    )
    for row, (file, reason), (start, end) in zip(rows, found, times, strict=True):
        builder.add(
            path_stem(row.path if file is None else file).lstrip("/"),
            source=row.path,
            class_name="",
            split=row.split,
            path=file,
            reason=reason,
            spans=[ClassSpan(names[row.label], start, end)] if row.label else [],
        )
    return builder.build(order)


def multi_label_rows(
    path: Path, cells: str, note: Callable[[str], object]
) -> list[tuple[ListRow, Times]]:
    """Return a row for every class of a list; the label is "" for a video without one.

    `cells` is one of `CELLS`; `note` is told of times that were dropped. Raises UserError for a
    table that cannot be read.
    """
    first = opening(path).lstrip().partition("\n")[0]
    table = read_table(path, "\t" if "\t" in first else ",")
    if not table:
        raise UserError(f"annotation file {str(path)!r} is empty: name one that lists videos")
    words = [cell.strip().lower() for cell in table[0]]
    columns = {kind: at for kind in _COLUMNS if (at := _column(words, kind)) is not None}
    header = "path" in columns and "label" in columns
    if not header:
        columns = {"path": 0, "label": 1}
    found = []
    reversed_spans = []
    for row in table[header:]:
        if len(row) != len(table[0]) or (not header and len(row) != 2):
            raise UserError(
                f"{str(path)!r}: the row {quoted(','.join(row))} has {len(row)} columns, not "
                f"{len(table[0]) if header else 2}: quote cells that hold a comma, and begin the "
                "list with a header such as path,labels or path,label,start,end"
            )
        listed, cell = row[columns["path"]], row[columns["label"]]
        if not listed:
            raise UserError(f"{str(path)!r}: the row {quoted(','.join(row))} lacks a path: add it")
        word = row[columns["split"]] if "split" in columns else ""
        split = split_from_word(word) if word else split_from_file_name(path.stem)
        labels = [cell] if cells == ROWS else [part.strip() for part in cell.split(cells)]
        start, end = _times(path, row, columns)
        if start is not None and end is not None and end < start:
            reversed_spans.append(listed)
            start = end = None
        times: Times = (start, end)
        found += [(ListRow(listed, label, split), times) for label in labels if label or cell == ""]
    note_reversed(note, reversed_spans)
    return found


def note_reversed(note: Callable[[str], object], listed: Sequence[str]) -> None:
    """Say which videos have classes whose end comes before their start."""
    if listed:
        note(
            f"{len(listed)} times end before they begin (first: {listed[0]!r}): those classes are "
            "kept without times"
        )


def _column(words: Sequence[str], kind: str) -> int | None:
    return next((at for at, word in enumerate(words) if word in _COLUMNS[kind]), None)


def _times(path: Path, row: Sequence[str], columns: dict[str, int]) -> Times:
    texts = [row[columns[kind]] if kind in columns else "" for kind in ("start", "end")]
    if not any(texts):
        return None, None
    start, end = seconds(texts[0]), seconds(texts[1])
    if start is None or end is None:
        raise UserError(
            f"{str(path)!r}: the times {texts[0]!r}, {texts[1]!r} of {row[columns['path']]!r} are "
            "not seconds: correct the row, or leave both empty"
        )
    return start, end


def seconds(text: str) -> float | None:
    """Return a time in seconds from 0 up; None if the text is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
