"""Lists of videos by key: commands write them for people to correct, and take them back.

A list is a text file with one key a line, or CSV with a column `key`. If the CSV has a column
`exclude`, only the rows that say "yes" there count, so that it can be corrected in a spreadsheet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from featstore.errors import UserError, counted, one_line, safe_text
from featstore.files.documents import LISTS_LIMIT, read_document
from featstore.files.tables import csv_rows
from featstore.spelling import comparable, named_by

KEY: Final = "key"
EXCLUDE: Final = "exclude"
YES: Final = "yes"

_NAMED: Final = 5  # unknown keys that a line names before it counts the rest


@dataclass(frozen=True)
class Excluded:
    """What a list left out: the `keys` that were found, and those that were not, in list order.

    `source` is the list, `where` says in words where its keys were looked for.
    """

    source: str
    keys: tuple[str, ...]
    unknown: tuple[str, ...]
    where: str = "the data set"

    @property
    def words(self) -> str:
        """One line for people."""
        said = f"{counted(len(self.keys), 'video')} of {self.source}"
        if not self.unknown:
            return said
        named = ", ".join(map(safe_text, self.unknown[:_NAMED]))
        more = f" and {len(self.unknown) - _NAMED} more" if len(self.unknown) > _NAMED else ""
        lacking = counted(len(self.unknown), "of its keys is", "of its keys are")
        return f"{said}; {lacking} not in {self.where}: {named}{more}"

    @property
    def of_training(self) -> str:
        """What to add to the description of training videos."""
        return f", {len(self.keys)} excluded by a list"

    def require_some_of(self, keys: Iterable[str], what: str) -> None:
        """Raise UserError if the list names all of these keys of `what`, unless there are none."""
        needed = frozenset(keys)
        if needed and needed.issubset(self.keys):
            raise UserError(f"{self.source} names all {len(needed)} {what}: leave some of them in")

    def to_json(self) -> dict[str, Any]:
        """All keys, JSON-ready."""
        return {
            "file": self.source,
            "videos": len(self.keys),
            "keys": list(self.keys),
            "unknown": list(self.unknown),
        }

    @classmethod
    def of(cls, path: Path, known: Collection[str], where: str = "the data set") -> Excluded:
        """Read the list at `path` and look its keys up in `known`; errors as `read_keys`.

        A key that is not there means the only one that reads the same, if there is one.
        """
        keys = read_keys(path)
        there = frozenset(known)
        unknown = tuple(key for key in keys if key not in there)
        alike = _only_ones(there) if unknown else {}
        meant = {key: key if key in there else alike.get(_read(key), "") for key in keys}
        found = tuple(dict.fromkeys(filter(None, meant.values())))
        return cls(str(path), found, tuple(key for key in unknown if not meant[key]), where)


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the keys that a list names, each once, in its order; () for an empty list.

    Raises UserError if the file cannot be read, is no text, or is a table without keys.
    """
    remedy = "give a text file with one key a line, or CSV with a column key"
    raw = read_document(path, remedy, limit=LISTS_LIMIT)
    try:
        lines = raw.decode("utf-8-sig").splitlines()
        header = csv_rows(lines[0].encode(), KEY)[0] if lines and lines[0].strip() else []
        if KEY not in header:
            if EXCLUDE in header:
                raise ValueError(f"its first line has a column {EXCLUDE} but no column {KEY}")
            found: Sequence[str] = [line.strip() for line in lines]
        else:
            found = _of_table(header, csv_rows(raw, KEY)[1:])
    except ValueError as error:
        raise UserError(f"{path} is no list of keys ({one_line(error, 120)}): {remedy}") from None
    return tuple(dict.fromkeys(key for key in found if key))


def superfluous(copies: Iterable[tuple[str, Collection[str], object]]) -> tuple[str, ...]:
    """Return the keys to leave out of several copies (key, splits, class) of one video.

    One copy stays: one outside the training splits if there is any, so that test lists keep their
    videos, else the first by key. If the copies have different classes, nobody knows which one is
    right, so none stays.
    """
    found = sorted(copies, key=lambda copy: (_trained_on(copy[1]), copy[0]))
    agreed = len({copy[2] for copy in found}) < 2
    return tuple(key for key, *_ in found[agreed:])


def _read(key: str) -> str:
    return comparable(named_by(key))


def _only_ones(keys: Collection[str]) -> Mapping[str, str]:
    """Return the keys that no other reads the same as, by how they read."""
    counts = Counter(map(_read, keys))
    return {form: key for key in keys if counts[form := _read(key)] == 1}


def _trained_on(splits: Collection[str]) -> bool:
    return any(split.startswith("train") for split in splits)


def _of_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the keys of the rows that count."""
    key, said = header.index(KEY), header.index(EXCLUDE) if EXCLUDE in header else None
    keys = []
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        if len(row) <= max(key, said or 0):
            raise ValueError(f"row {number} has {len(row)} columns")
        answer = YES if said is None else row[said].strip().lower()
        if answer not in (YES, "no", ""):
            raise ValueError(f"row {number} has {answer!r} in column {EXCLUDE}, not yes or no")
        if answer == YES:
            keys.append(row[key])
    return keys
