"""Reads lists of videos and labels as repositories write them: `path label`, CSV and TSV.

Formats differ in separator, header, order and number of columns, extension, and in whether labels
are numbers or names (mmaction2, VideoMAE, SlowFast, X-CLIP, Text4Vis all differ). Where the text
alone can be read in several ways, the way that finds the files is taken.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from featstore.errors import UserError, counted, quoted
from featstore.remote.urls import is_url
from featstore.spelling import comparable, same_letters
from pipeline.annotations.class_names import LabelMap, one_spelling, spellings_shown
from pipeline.annotations.formats.class_folders import note_unlabelled
from pipeline.annotations.label_names import (
    correct_names,
    is_name_file,
    names_from_folders,
    read_names,
    shift_of_labels,
)
from pipeline.annotations.listing import (
    Listing,
    ListingBuilder,
    split_from_file_name,
    split_from_word,
)
from pipeline.annotations.tables import TABLES
from pipeline.annotations.text_files import (
    first_and_rest,
    is_number,
    read_json,
    read_lines,
    read_table,
    table_rows,
)
from pipeline.annotations.video_folder import (
    VIDEO_EXTENSIONS,
    VideoFolder,
    extension,
    normal_path,
    path_stem,
)

LIST_SUFFIXES = frozenset({".txt", ".csv", ".tsv", ".list", ".lst"})

_COLUMNS = TABLES["columns"]
_SAMPLE = 100  # rows looked up in the folder to find the separator
_FILE_THEN_REST = re.compile(
    rf"(.*\.(?:{'|'.join(sorted(VIDEO_EXTENSIONS))}))\s+(\S.*)", re.IGNORECASE
)


_Found = tuple[str | None, str]


@dataclass(frozen=True, slots=True)
class ListRow:
    """One line: the path and the label as written, and the split, empty where there is none."""

    path: str
    label: str
    split: str


def read_lists(
    files: Sequence[Path],
    folder: VideoFolder,
    class_names_file: Path | None = None,
    label_map: LabelMap = "corrected",
    *,
    unlabelled: bool = False,
    kept: Collection[str] = (),
) -> Listing:
    """List the videos of all rows; integer labels get names from a file or consistent folders.

    A list without labels gives videos without a class, and with `unlabelled` so does any other.

    A file of names that exchanges names of classes is corrected, or kept if `label_map` is
    "as-published"; the listing says which. `kept` as in `one_spelling`.

    Raises UserError for a line without a label, a table of unknown shape, a number that the file
    of names does not hold, and numbers and names mixed as labels.
    """
    named = [path for path in files if is_name_file(path)]
    lists = [path for path in files if path not in named]
    if not lists:
        raise UserError(f"{str(files[0].parent)!r} holds class names but no list of videos")
    if class_names_file is None and len(named) == 1:
        class_names_file = named[0]
    builder = ListingBuilder()
    rows = [row for path in lists for row in read_list(path, folder.find_listed, unlabelled)]
    found = [folder.find_listed(row.path, row.split) for row in rows]
    found = _told_apart(rows, found, builder.note)
    paths = [path for path, _ in found]
    names: dict[str, str] = {"": ""}
    order = None
    if all(not row.label for row in rows):
        note_unlabelled(builder, len(rows))
    else:
        if bare := next((row for row in rows if not row.label), None):
            raise UserError(
                f"some lists have labels and others have none ({bare.path!r}): name only those "
                "with labels, or take all without, with --unlabelled"
            )
        labelled = label_names(
            *(rows, paths, class_names_file, folder.root, builder.note, label_map), kept
        )
        names, order, builder.label_map = labelled
    for row, (path, reason) in zip(rows, found, strict=True):
        if is_url(row.path):
            listed = row.path.partition("://")[2]
            path = path and row.path
        else:
            listed = normal_path(row.path, folder.root)
        name = path if path is not None and listed.startswith(("/", "../")) else listed
        builder.add(
            path_stem(name.lstrip("/")),
            source=row.path,
            class_name=names[row.label],
            split=row.split,
            path=path,
            reason=reason,
        )
    return builder.build(order)


def _told_apart(
    rows: Sequence[ListRow], found: Sequence[_Found], note: Callable[[str], None]
) -> list[_Found]:
    """Return what was found for the rows, without files that are only spelt like what is listed.

    A file that another row names as it is called is that row's, and one that differs from two
    listed names belongs to neither. A note counts the others and names the first.
    """
    names: dict[str, set[str]] = defaultdict(set)
    for row, (path, _) in zip(rows, found, strict=True):
        if path is not None and not is_url(path):
            names[path].add(_file_name(row.path))
    told: list[_Found] = []
    otherwise: dict[str, str] = {}
    for row, (path, reason) in zip(rows, found, strict=True):
        if (
            path is not None
            and not is_url(path)
            and (listed := _file_name(row.path)) != (there := _file_name(path))
        ):
            alike = names[path] if same_letters(listed) != same_letters(there) else {listed}
            if len({same_letters(name) for name in alike}) > 1:
                told.append((None, f"no such file in the videos folder; {path} only reads alike"))
                continue
            otherwise[listed] = there
        told.append((path, reason))
    if otherwise:
        first, *_ = otherwise.items()
        spelt = " for ".join(spellings_shown(first))
        many = counted(len(otherwise), "listed name is", "listed names are")
        note(f"{many} spelt otherwise in the folder (first: {spelt})")
    return told


def _file_name(path: str) -> str:
    return path_stem(path.replace("\\", "/") if "/" not in path else path).rpartition("/")[2]


# Returns the video that a list's entry means, or None, and the reason why there is none.
Finder = Callable[[str], _Found]


def read_list(path: Path, find: Finder, unlabelled: bool = False) -> list[ListRow]:
    """Read the rows of one list with the separator by which most of its files are found.

    The rows of a list of paths alone have no label, and with `unlabelled` those of any list.
    """
    if path.suffix.lower() == ".json":
        read_json(path)  # says what is wrong with it
        raise UserError(
            f"{str(path)!r} is JSON, but has the shape of neither Kinetics nor Something-Something "
            "V2: name a CSV list of path,label"
        )
    lines = read_lines(path)
    if not lines:
        raise UserError(f"annotation file {str(path)!r} is empty: name one that lists videos")
    if alone := _paths_alone(path, [text for _, text in lines], find, unlabelled):
        return alone
    if unlabelled:
        return [replace(row, label="") for row in read_list(path, find)]
    best: tuple[float, str, list[list[str]]] | None = None
    for separator in ("\t", ",", ";", " "):
        table = _split_at_spaces(lines, find) if separator == " " else _table(path, separator)
        if separator == "," and (table is None or not (_header(table[0]) or _known(table))):
            table = _unquoted_names(path, find) or table
        if table is None:
            continue
        sample = [row for row in table[1 : _SAMPLE + 1] or table if row]
        columns = _header(table[0]) or {"path": 0}
        place = columns["path"]
        score = sum(find(row[place])[0] is not None for row in sample) / len(sample)
        if best is None or score > best[0]:
            best = score, separator, table
    if best is None or (best[1] == " " and best[0] == 0):
        commas = read_table(path)
        uneven = next((row for row in commas if len(row) != len(commas[0])), None)
        if uneven is not None and len(commas[0]) > 1:
            raise UserError(
                f"{str(path)!r}: the row {quoted(','.join(uneven))} has {len(uneven)} columns, the "
                f"first row {len(commas[0])}: quote cells that hold a comma"
            )
    if best is None:
        number, text = next((line for line in lines if len(line[1].split()) < 2), lines[0])
        raise UserError(
            f"{str(path)!r} line {number}: {quoted(text)} is not `path label`: every line needs a "
            "path and a label, separated by a space, a comma or a tab"
        )
    return _rows(path, best[2])


def _paths_alone(path: Path, lines: Sequence[str], find: Finder, unlabelled: bool) -> list[ListRow]:
    """Return the rows of a list that has paths and perhaps splits, but no labels; else none."""
    for separator in ("\t", ",", ";"):
        table = _table(path, separator) or [[""]]
        words = [cell.lower() for cell in table[0]]
        at = next((at for at, word in enumerate(words) if word in _COLUMNS["path"]), None)
        split = next((at for at, word in enumerate(words) if word in _COLUMNS["split"]), None)
        known = {at, split} - {None}
        if at is not None and (unlabelled or len(words) == len(known)):
            cells = [(row[at], "" if split is None else row[split]) for row in table[1:]]
            return [ListRow(listed, "", _split(word, path)) for listed, word in cells if listed]
    names = [line.strip('"') for line in lines]
    names = names[1:] if names[0].lower() in _COLUMNS["path"] else names
    if not all(extension(name) in VIDEO_EXTENSIONS or find(name)[0] is not None for name in names):
        return []
    return [ListRow(name, "", _split("", path)) for name in names]


def _split(word: str, path: Path) -> str:
    return split_from_word(word) if word else split_from_file_name(path.stem)


def _table(path: Path, separator: str) -> list[list[str]] | None:
    """Return the file as a table, or None if its rows differ in width or have only one cell."""
    rows = read_table(path, separator)
    width = len(rows[0]) if rows else 0
    return rows if width >= 2 and all(len(row) == width for row in rows) else None


def _unquoted_names(path: Path, find: Finder) -> list[list[str]] | None:
    """Return rows `path,label` whose labels hold commas without quotes; None if these are not it.

    A row with more cells is split at its first comma, or at a later one if the file's name is found
    only so. Some row must show that there are two columns: the header, or one without such commas.
    """
    rows = table_rows(path)
    widths = {len(row) for row, _ in rows}
    columns = _header(rows[0][0])
    spaced = all(text.count(",") == text.count(", ") + 1 for row, text in rows if len(row) > 2)
    if (
        1 in widths
        or not (2 in widths or spaced)
        or (columns and columns != {"path": 0, "label": 1})
    ):
        return None
    table = []
    for row, text in rows:
        splits = (
            [row] if len(row) == 2 else [first_and_rest(text, at) for at in range(len(row) - 1)]
        )
        held = (each for each in splits if find(each[0])[0] is not None)
        table.append([*next(held, splits[0])])
    return table


def _split_at_spaces(lines: Sequence[tuple[int, str]], find: Finder) -> list[list[str]] | None:
    """Split lines `path label` or `path frames label`; paths and label names may hold spaces."""
    table = []
    for _, text in lines:
        if match := _FILE_THEN_REST.fullmatch(text):
            path, label = match[1], match[2]
            frames, _, last = label.partition(" ")
            if is_number(frames) and is_number(last.strip()):
                label = last.strip()
        else:
            path, label = _last_space(text)
            shorter, frames = _last_space(path)
            if shorter and is_number(frames) and is_number(label):
                # `x 300 4`, unless "x 300" is the name of a file
                path = path if find(path)[0] is not None else shorter
        if not path:
            return None
        table.append([path, label])
    return table


def _last_space(text: str) -> tuple[str, str]:
    parts = text.rsplit(None, 1)
    return (parts[0], parts[1]) if len(parts) == 2 else ("", text)


def _header(row: Sequence[str]) -> dict[str, int] | None:
    """Map kinds of columns to column numbers; None if the row is no header.

    If there are several label columns, the one with names is taken.
    """
    words = [cell.strip().lower() for cell in row]
    places = {
        kind: [place for place, word in enumerate(words) if word in names]
        for kind, names in _COLUMNS.items()
    }
    labels = places.pop("name") + places["label"]
    if not places["path"] or not labels:
        return None
    return {kind: found[0] for kind, found in {**places, "label": labels}.items() if found}


def _rows(path: Path, table: list[list[str]]) -> list[ListRow]:
    columns = _header(table[0])
    body = table[1:] if columns else table
    if not body:
        raise UserError(f"annotation file {str(path)!r} has a header and no rows")
    columns = columns or _known(body)
    if columns is None:
        raise UserError(
            f"{str(path)!r} has {len(body[0])} columns of unknown meaning: give it a header line "
            "such as path,label,split"
        )
    rows = []
    for row in body:
        listed, label = row[columns["path"]], row[columns["label"]]
        if not listed or not label:
            raise UserError(
                f"{str(path)!r}: the row {quoted(','.join(row))} lacks a path or a "
                "label: complete it"
            )
        word = row[columns["split"]] if "split" in columns else ""
        rows.append(ListRow(listed, label, _split(word, path)))
    return rows


def _known(body: list[list[str]]) -> dict[str, int] | None:
    """Return the columns of a table without a header; None if their meaning is not known."""
    width = len(body[0])
    if width == 2:
        return {"path": 0, "label": 1}
    if width == 3 and all(split_from_word(row[2]) in TABLES["splits"] for row in body):
        return {"path": 0, "label": 1, "split": 2}
    if width == 3 and all(is_number(row[1]) for row in body):
        return {"path": 0, "label": 2}  # the middle is a number of frames
    return None


def label_names(
    rows: Sequence[ListRow],
    paths: Sequence[str | None],
    class_names_file: Path | None,
    root: Path,
    note: Callable[[str], None],
    label_map: LabelMap,
    kept: Collection[str] = (),
) -> tuple[dict[str, str], list[str] | None, str]:
    """Return the raw class name of every label text, the class order and `Listing.label_map`.

    `paths` are the videos of the rows below `root`, None where there is none. The order is None
    where classes have no other order than that of their names. `kept` as in `one_spelling`. Raises
    UserError as `read_lists`.
    """
    labels = sorted({row.label for row in rows})
    numbers = [label for label in labels if is_number(label)]
    names = read_names(class_names_file) if class_names_file is not None else None
    if numbers and len(numbers) < len(labels):
        other = next(label for label in labels if not is_number(label))
        raise UserError(
            f"labels are a mix of numbers and names ({numbers[0]!r} and {other!r}): use one kind"
        )
    if not numbers:
        if names is None:
            return one_spelling(Counter(row.label for row in rows), note, kept), None, ""
        known = {comparable(name): name for name in names.values()}
        for label in labels:
            if comparable(label) not in known:
                raise UserError(
                    f"label {label!r} is not a name in {str(class_names_file)!r}: correct one "
                    "of them"
                )
        return {label: known[comparable(label)] for label in labels}, list(names.values()), ""

    done = ""
    evidence = [
        (int(row.label), path or normal_path(row.path, root), row.path)
        for row, path in zip(rows, paths, strict=True)
    ]
    shift = 0
    if names is not None:
        shift = shift_of_labels(names, evidence, note)
        evidence = [(label + shift, file, listed) for label, file, listed in evidence]
        absent = sorted({label for label, _, _ in evidence} - set(names))
        if absent:
            raise UserError(
                f"label {absent[0]} has no name in {str(class_names_file)!r}, which holds "
                f"{min(names)} to {max(names)}: name the file that belongs to the list"
            )
        names, done = correct_names(names, evidence, note, label_map)
    else:
        names = names_from_folders(evidence)
        if names is None:
            note(
                "class names are the numbers of the list: no file of names was given and folders "
                "do not show any; zero-shot needs words, so pack with a CSV of id,name"
            )
            names = {number: str(number) for number in sorted({n for n, _, _ in evidence})}
        else:
            note("class names are those of the folders that the labels point at")
        first = min(label for label, _, _ in evidence)
        if first == 1:
            note(f"the labels of the list begin at 1: label 1 is class number 0, {names[1]!r}")
    return {label: names[int(label) + shift] for label in numbers}, list(names.values()), done
