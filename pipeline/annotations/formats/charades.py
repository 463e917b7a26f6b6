"""Charades: CSV files with a row a video, and `Charades_v1_classes.txt` with the classes.

The column `actions` holds `c092 11.90 21.20;c147 0.00 12.60`: class, start and end in seconds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from featstore.errors import UserError, quoted
from pipeline.annotations.formats.multi_label import note_reversed, seconds
from pipeline.annotations.listing import ClassSpan, Listing, ListingBuilder, split_from_file_name
from pipeline.annotations.text_files import (
    header,
    list_files,
    opening,
    read_lines,
    read_table,
)
from pipeline.annotations.video_folder import VideoFolder

_CLASS = re.compile(r"(c\d{3})\s+(\S.*)")


def is_charades(path: Path) -> bool:
    """Whether the file is one of the official tables, or the list of classes."""
    if path.suffix.lower() == ".csv":
        return {"id", "actions"} <= set(header(path))
    return path.suffix.lower() == ".txt" and _CLASS.match(opening(path, 200).lstrip()) is not None


def read_charades(files: Sequence[Path], folder: VideoFolder) -> Listing:
    """List all videos; the split comes from a file's name. Classes are in the order of the list.

    Raises UserError for an action that is no class with two times, and without a table.
    """
    tables = [path for path in files if path.suffix.lower() == ".csv"]
    if not tables:
        raise UserError(
            f"{str(files[0])!r} lists classes but no videos: name the folder with "
            "Charades_v1_train.csv and Charades_v1_test.csv"
        )
    builder = ListingBuilder(multi_label=True)
    beside = [path for path in (*files, *list_files(tables[0].parent)) if path.suffix == ".txt"]
    names = next((_read_classes(path) for path in beside if is_charades(path)), {})
    if not names:
        builder.note(
            "Charades_v1_classes.txt is not beside the tables, so the classes are called c000 and "
            "so on: zero-shot needs words"
        )
    unknown: set[str] = set()
    for path in tables:
        split = split_from_file_name(path.stem)
        rows = read_table(path)
        place = {word.lower(): at for at, word in enumerate(rows[0])}
        reversed_spans = []
        for row in rows[1:]:
            if len(row) != len(rows[0]) or not row[place["id"]]:
                raise UserError(
                    f"{str(path)!r}: the row {quoted(','.join(row))} is not whole: fetch the "
                    "official file again"
                )
            video, spans = row[place["id"]], []
            for action in filter(None, row[place["actions"]].split(";")):
                span = _span(path, action, names)
                if span.end is not None and span.start is not None and span.end < span.start:
                    reversed_spans.append(video)
                    span = ClassSpan(span.class_name)
                spans.append(span)
                unknown.add(span.class_name)
            found, reason = folder.find_listed(f"{video}.mp4", split)
            builder.add(
                video,
                source=f"{video}.mp4",
                class_name="",
                split=split,
                path=found,
                reason=reason,
                spans=spans,
            )
        note_reversed(builder.note, reversed_spans)
    return builder.build(list(names.values()) or sorted(unknown))


def _span(path: Path, action: str, names: dict[str, str]) -> ClassSpan:
    name, *times = action.split()
    start, end = (seconds(text) for text in times) if len(times) == 2 else (None, None)
    if start is None or end is None or (names and name not in names):
        raise UserError(
            f"{str(path)!r}: {quoted(action)} is not `c092 11.90 21.20` with one of the "
            f"{len(names)} classes: fetch the official files again"
        )
    return ClassSpan(names.get(name, name), start, end)


def _read_classes(path: Path) -> dict[str, str]:
    names: dict[str, str] = {}
    for line, text in read_lines(path):
        match = _CLASS.fullmatch(text)
        if match is None or match[1] in names or match[2] in names.values():
            raise UserError(
                f"{str(path)!r} line {line}: {quoted(text)} is not `c000 Name of the class` with a "
                "new number and name: fetch the official file again"
            )
        names[match[1]] = match[2]
    return names
