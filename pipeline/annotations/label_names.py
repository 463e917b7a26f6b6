"""Finds names for integer labels in a file or in folder names, and corrects exchanged names."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from featstore.errors import UserError, quoted
from featstore.spelling import comparable
from pipeline.annotations.class_names import LabelMap, comparable_words, spellings_shown
from pipeline.annotations.listing import split_from_folder
from pipeline.annotations.text_files import (
    first_and_rest,
    header,
    is_number,
    read_json,
    read_lines,
    table_rows,
)
from pipeline.annotations.video_folder import path_stem

PUBLISHED_EXCHANGES: Final = {
    "hmdb51": (("kick", "kick ball"), ("sword", "sword exercise")),
}
"""For each data set, pairs of classes whose names a published label file exchanges. X-CLIP's file
calls the class "kick" of HMDB51 "kick ball" and vice versa, and so on (Ni et al., ECCV 2022)."""

# (label, path of the file found or as listed, path as listed)
Evidence = tuple[int, str, str]

_AGREEMENT = 0.8  # share of a label's videos that must point to another label


def agreed_changes(votes: Mapping[int, Counter[int]]) -> dict[int, int]:
    """Map a label to another one if at least 80 % of its videos point to that other label."""
    first = {label: counter.most_common(1)[0] for label, counter in votes.items()}
    return {
        label: other
        for label, (other, count) in first.items()
        if other != label and count >= _AGREEMENT * votes[label].total()
    }


def is_name_file(path: Path) -> bool:
    """Whether the file holds class names: a CSV with the header `id,name`, or `labels.json`."""
    return _is_name_table(path) or path.name.lower() == "labels.json"


def _is_name_table(path: Path) -> bool:
    return header(path) == ["id", "name"]


def read_names(path: Path) -> dict[int, str]:
    """Raw class names by number, in order: CSV `id,name`, JSON {name: number}, or one per line.

    Raises UserError when the file is none of these or gives one number or name twice.
    """
    if path.suffix.lower() == ".json":
        pairs = _json_pairs(path)
    elif _is_name_table(path) or path.suffix.lower() == ".csv":
        rows = table_rows(path)[1 if _is_name_table(path) else 0 :]
        # A comma inside a name should be quoted; where it is not, the rest is still the name.
        pairs = [
            first_and_rest(text) if len(row) > 2 else (row[0], "".join(row[1:]))
            for row, text in rows
        ]
    else:
        lines = [text for _, text in read_lines(path)]
        split = [text.split(None, 1) for text in lines]
        if all(len(parts) == 2 and is_number(parts[0]) for parts in split):
            pairs = [(parts[0], parts[1]) for parts in split]
        else:
            pairs = [(str(number), text) for number, text in enumerate(lines)]
    names: dict[int, str] = {}
    for number, name in pairs:
        if not is_number(number) or not name or int(number) in names:
            raise UserError(
                f"{str(path)!r}: {quoted(number, 40)}, {quoted(name, 40)} must be a number that is "
                "not used yet and a class name: correct the file of class names"
            )
        names[int(number)] = name.strip()
    if not names:
        raise UserError(f"file of class names {str(path)!r} is empty: name another")
    first: dict[str, int] = {}
    for place, name in names.items():
        other = first.setdefault(comparable(name), place)
        if other != place:
            both = spellings_shown([names[other], name])
            said = f"the name {both[0]}" if names[other] == name else f"{' and '.join(both)}"
            raise UserError(
                f"{str(path)!r} gives {said} to two numbers, {other} and {place}: correct it"
            )
    return {number: names[number] for number in sorted(names)}


def _json_pairs(path: Path) -> list[tuple[str, str]]:
    value = read_json(path)
    if isinstance(value, list):
        return [(str(number), str(name)) for number, name in enumerate(value)]
    if not isinstance(value, dict):
        raise UserError(f"{str(path)!r} does not map class names to numbers: correct it")
    if all(is_number(str(key)) for key in value):
        return [(str(key), str(name)) for key, name in value.items()]
    return [(str(number), str(name)) for name, number in value.items()]


def names_from_folders(evidence: Sequence[Evidence]) -> dict[int, str] | None:
    """Return names by label if every label has a class folder of its own, otherwise None."""
    folders: dict[int, set[str]] = defaultdict(set)
    for label, found, listed in evidence:
        candidates = (_folder(listed), _folder(found))
        folder = next((name for name in candidates if name and not split_from_folder(name)), None)
        if folder is None:
            return None
        folders[label].add(folder)
    names = {label: next(iter(folders[label])) for label in sorted(folders)}
    consistent = all(len(group) == 1 for group in folders.values())
    return names if consistent and len(set(names.values())) == len(names) else None


def correct_names(
    names: dict[int, str],
    evidence: Sequence[Evidence],
    note: Callable[[str], None],
    label_map: LabelMap = "corrected",
) -> tuple[dict[int, str], str]:
    """Return `names` with exchanges corrected, and what was done: `label_map`, or "" for nothing.

    Some label files inherit the exchanges of `PUBLISHED_EXCHANGES`. A contradiction counts as an
    exchange only where the files of these labels carry one another's names; any other one is left,
    with a note. With "as-published", exchanged names stay as they are, for comparison with
    numbers that were made with such names. Either way a note counts the videos concerned.
    """
    moved = agreed_changes(_votes(names, evidence))
    if moved and set(moved) != set(moved.values()):
        label, other = next(iter(moved.items()))
        note(
            f"label {label} is called {names[label]!r} but its files look like {names[other]!r}: "
            "check the file of class names"
        )
        moved = {}
    if not moved:
        return names, ""
    videos = sum(label in moved for label, _, _ in evidence)
    listed_names = ", ".join(repr(names[label]) for label in sorted(moved))
    exchange = (
        f"the file of class names exchanges {listed_names}, as the names of the videos show, "
        f"which concerns {videos} of {len(evidence)} videos"
    )
    if label_map == "as-published":
        note(f"{exchange}: kept as published, so these videos carry a wrong name")
        return names, label_map
    note(f"{exchange}: corrected (--label-map as-published keeps them)")
    return {label: names[moved.get(label, label)] for label in names}, "corrected"


def shift_of_labels(
    names: dict[int, str], evidence: Sequence[Evidence], note: Callable[[str], None]
) -> int:
    """Return what to add to the labels of a list for the numbers in a file of class names.

    That is 0, or 1 or -1 where one of them begins at 1 and the other at 0: because a label would
    have no name otherwise, or because the folders and files say so. A note says it, and also that
    no video has label 0 where nothing tells.
    """
    labels = {label for label, _, _ in evidence}
    starts = (min(labels), min(names))
    if starts not in ((0, 1), (1, 0)):
        return 0
    shift = starts[1] - starts[0]
    fits = all(label + shift in names for label in labels)
    votes = _votes(names, evidence)
    agreeing = [label + shift for label in votes] == [
        counter.most_common(1)[0][0] for counter in votes.values()
    ]
    if fits and (not labels <= set(names) or (votes and agreeing)):
        note(
            f"the labels of the list begin at {starts[0]} and the numbers of the class names at "
            f"{starts[1]}: label {starts[0]} is {names[starts[1]]!r}"
        )
        return shift
    if starts[1] == 0 and not votes:
        note(
            f"no video has label 0, {names[0]!r}: if the list counts from 1, let the numbers of "
            "the class names begin at 1, too"
        )
    return 0


def _votes(names: dict[int, str], evidence: Sequence[Evidence]) -> dict[int, Counter[int]]:
    """Count for every label the labels by whose names its videos or their folders are called."""
    by_form = {_form(name): label for label, name in names.items()}
    pattern = re.compile(
        "|".join(re.escape(form) for form in sorted(by_form, key=len, reverse=True) if form)
    )
    votes: dict[int, Counter[int]] = defaultdict(Counter)
    for label, found, listed in evidence:
        named = _label_in_path(found, listed, by_form, pattern)
        if named is not None:
            votes[label][named] += 1
    return votes


def _label_in_path(
    found: str, listed: str, by_form: dict[str, int], pattern: re.Pattern[str]
) -> int | None:
    """Return the label that the folder is named after, or else the longest in the file's name."""
    for path in (listed, found):
        folder = _form(_folder(path))
        if folder in by_form:
            return by_form[folder]
    stem = _form(path_stem(found).rpartition("/")[2])
    matches = pattern.findall(stem)
    return by_form[max(matches, key=len)] if matches else None


def _form(name: str) -> str:
    """Put spaces around all words, so that only whole words match: "KickBall" -> " kick ball "."""
    words = re.findall(r"[^\W_]+", comparable_words(name))
    return f" {' '.join(words)} " if words else ""


def _folder(path: str) -> str:
    return path.rpartition("/")[0].rpartition("/")[2]
