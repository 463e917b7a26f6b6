"""The classes of Kinetics-600 that Kinetics-400 does not have, and the splits they are tested in.

Source: Chen and Huang, Elaborative Rehearsal for Zero-Shot Action Recognition, ICCV 2021: of the
232 new names 12 are old classes under another name, which leaves 220. There are three random splits
of 60 validation and 160 test classes. The published splits are files of names or numbers, which a
user may have. Splits drawn here differ, so results on the two cannot be compared.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from featstore.errors import UserError, counted
from pipeline.annotations.class_names import comparable_words, natural_class_name
from pipeline.annotations.label_names import read_names
from pipeline.annotations.tables import TABLES
from pipeline.annotations.text_files import is_number, list_files

log = logging.getLogger(__name__)

RENAMED: Final = frozenset(TABLES["kinetics600"]["renamed"])
"""Kinetics-600 names of classes that Kinetics-400 has under another name."""

NEW_NAMES: Final = 232
UNSEEN: Final = 220
SPLITS: Final = 3
TEST_CLASSES: Final = 160

OWN_DRAW: Final = "own draw (not comparable with published numbers)"


@dataclass(frozen=True)
class UnseenClasses:
    """Label ids of Kinetics-600: all unseen ones, and those tested in split1, split2, ...

    `source` says where the splits come from: file names, or `OWN_DRAW`. `notes` are sentences the
    user should read, one for every count that differs from the published one.
    """

    unseen: tuple[int, ...]
    splits: Mapping[str, tuple[int, ...]]
    source: str
    notes: tuple[str, ...]


def unseen_classes(
    k600_names: Sequence[str], k400_names: Sequence[str], lists: Sequence[Path] = ()
) -> UnseenClasses:
    """Return the unseen classes and their test splits, from `lists` (files or one folder) or drawn.

    A class is unseen if Kinetics-400 lacks its name and it is not a renamed one. Names are
    compared as `comparable_words`. A drawn split takes 160 of
    220 classes, or the same share of fewer, by a hash of split and name.
    Raises UserError if the two lists of names have no name in common or no class is unseen, and
    for a class list with a class that Kinetics-600 lacks or Kinetics-400 has.
    """
    known = {comparable_words(name) for name in k400_names}
    old = known | {comparable_words(name) for name in RENAMED}
    forms = [comparable_words(name) for name in k600_names]
    if not known.intersection(forms):
        example = next(iter(k400_names), "")
        raise UserError(
            f"none of the {len(known)} names of Kinetics-400 (such as {example!r}) is one of the "
            f"{len(forms)} names of Kinetics-600: name the right list of classes"
        )
    unseen = tuple(label for label, form in enumerate(forms) if form not in old)
    if not unseen:
        raise UserError("Kinetics-600 has no class here that Kinetics-400 lacks: nothing to test")
    notes = []
    if len(unseen) != UNSEEN:
        notes.append(
            f"{len(unseen)} classes of Kinetics-600 are unseen here; with the full lists {UNSEEN} "
            f"are ({NEW_NAMES} new names without {len(RENAMED)} renamed ones)"
        )
    if not lists:
        splits = {f"split{number}": _drawn(number, k600_names, unseen) for number in (1, 2, 3)}
        notes.append(
            "the three class splits are drawn by this program: name the published lists with "
            "--class-lists to get comparable numbers"
        )
        return UnseenClasses(unseen, splits, OWN_DRAW, tuple(notes))
    files = _class_lists(lists)
    splits = {
        f"split{number}": _read_split(path, k600_names, unseen)
        for number, path in enumerate(files, 1)
    }
    if len(splits) != SPLITS:
        notes.append(f"{counted(len(splits), 'class list')} given; {SPLITS} are published")
    notes += [
        f"class list {path.name} has {len(labels)} classes; the published ones have {TEST_CLASSES}"
        for path, labels in zip(files, splits.values(), strict=True)
        if len(labels) != TEST_CLASSES
    ]
    source = "lists " + ", ".join(path.name for path in files)
    return UnseenClasses(unseen, splits, source, tuple(notes))


def _class_lists(lists: Sequence[Path]) -> list[Path]:
    files = [
        file
        for path in lists
        for file in (
            [f for f in list_files(path) if f.suffix.lower() in (".txt", ".csv", ".json")]
            if path.is_dir()
            else [path]
        )
    ]
    if not files:
        raise UserError(f"{str(lists[0])!r} holds no class lists: it needs .txt, .csv or .json")
    missing = next((path for path in files if not path.is_file()), None)
    if missing is not None:
        raise UserError(f"class list {str(missing)!r} does not exist: name a file or a folder")
    return files


def _read_split(path: Path, names: Sequence[str], unseen: Sequence[int]) -> tuple[int, ...]:
    listed = list(read_names(path).values())
    by_form = {comparable_words(name): label for label, name in enumerate(names)}
    numbers = all(is_number(name) for name in listed)
    labels = []
    for name in listed:
        label = int(name) if numbers else by_form.get(comparable_words(name), -1)
        if not 0 <= label < len(names):
            raise UserError(
                f"{str(path)!r} lists {name!r}, which is none of the {len(names)} classes of the "
                "packed Kinetics-600: name the list that belongs to it"
            )
        labels.append(label)
    seen = [names[label] for label in labels if label not in set(unseen)]
    if seen:
        raise UserError(
            f"{str(path)!r} lists {counted(len(seen), 'class', 'classes')} that Kinetics-400 "
            f"has (such as {seen[0]!r}): zero-shot takes classes that were not trained on; "
            "correct the list"
        )
    return tuple(sorted(labels))


def _drawn_by(name: str) -> str:
    """The form of a name that the draw hashes, which must never change: a draw is a result."""
    plain = natural_class_name(name).lower().replace("_", " ")
    return " ".join(plain.replace('"', "").replace("'", "").split())


def _drawn(number: int, names: Sequence[str], unseen: Sequence[int]) -> tuple[int, ...]:
    def place(label: int) -> tuple[bytes, int]:
        text = f"k600-unseen/{number}/{_drawn_by(names[label])}".encode()
        return hashlib.blake2b(text, digest_size=16).digest(), label

    count = max(1, round(len(unseen) * TEST_CLASSES / UNSEEN))
    return tuple(sorted(sorted(unseen, key=place)[:count]))
