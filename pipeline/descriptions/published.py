"""Class descriptions in files of others, which are keyed by the number of a class.

A pair of files holds `{"0": ["...", ...], ...}`, one of spatial and one of temporal sentences, for
example `2_s_description_hmdb.json` and `2_t_description_hmdb.json` of MSTA (Chen et al., CVPR
2025). The numbers are those of X-CLIP's and ViFi-CLIP's label files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from featstore.errors import UserError, counted, quoted
from featstore.files.durable import write_json
from featstore.spelling import comparable
from pipeline.annotations.class_names import comparable_words
from pipeline.annotations.label_names import PUBLISHED_EXCHANGES, read_names
from pipeline.annotations.text_files import is_number
from pipeline.descriptions.check import DescriptionsCheck, check_descriptions
from pipeline.descriptions.class_descriptions import read_object

log = logging.getLogger(__name__)

_SHAPE: Final = 'it must be {"0": ["...", ...], "1": [...], ...}, keyed by the number of a class'
_NAMED: Final = 5
_KIND_IN_NAME: Final = re.compile(r"(?:^|[_-])([st])_description", re.IGNORECASE)
_WORD: Final = re.compile(r"[^\W_]+")
_Lines = dict[int, Any]


@dataclass(frozen=True)
class Exchange:
    """Two classes, and why the sentences under their numbers were exchanged or left."""

    first: str
    second: str
    exchanged: bool
    reason: str

    def __str__(self) -> str:
        done = "exchanged" if self.exchanged else "left as they are"
        return f"{self.first!r} and {self.second!r}: {done}, {self.reason}"


def import_descriptions(
    spatial: Path, temporal: Path, class_list: Path, out: Path, *, append: bool = False
) -> tuple[DescriptionsCheck, tuple[Exchange, ...]]:
    """Write the descriptions of a pair of numbered files to `out`, keyed by class name.

    `class_list` gives the names of the numbers (`read_names`); for files of half the classes, of
    that half. With `append`, the classes are added to those of `out`, for example the novel half.
    The published files of HMDB51 follow a list that exchanges two pairs of names: sentences go to
    the class that they speak of, or, where they do not say, to that of the published list. Returns
    what a check of the written file finds, and what was decided about each such pair.

    Raises UserError, and writes nothing, for a file of another form, for numbers that are not those
    of the list, for files in the other order, and if `out` exists, or, with `append`, has a class.
    """
    names = read_names(class_list)
    _require_kinds(spatial, temporal)
    lines = [_numbered(path, names, class_list) for path in (spatial, temporal)]
    exchanges = []
    for pair in PUBLISHED_EXCHANGES["hmdb51"]:
        first, second = (_number_of(name, names) for name in pair)
        if first is None or second is None:
            continue
        exchanges.append(_decide(first, second, names, lines))
        if exchanges[-1].exchanged:
            for held in lines:
                held[first], held[second] = held[second], held[first]
    made: dict[str, Any] = {
        name: {"spatial": lines[0][number], "temporal": lines[1][number]}
        for number, name in names.items()
    }
    made = _joined(made, out) if append else made
    if out.exists() and not append:
        raise UserError(
            f"{out} exists already: name another file, or add the classes to it with --append"
        )
    write_json(out, made)
    return check_descriptions(out, list(made)), tuple(exchanges)


def _joined(made: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Return the classes of `out` and the new ones; UserError for one that is in both."""
    held = read_object(out, "name a file that `mote-cli descriptions import` wrote")
    forms = {comparable_words(name): name for name in held}
    both = [name for name in made if comparable_words(name) in forms]
    if both:
        raise UserError(
            f"{out} has {len(both)} of the listed classes already, such as {both[0]!r}: give the "
            "list of the other classes"
        )
    return {**held, **made}


def _require_kinds(spatial: Path, temporal: Path) -> None:
    """Raise UserError where the files' names say that they are the other way round, or the same."""
    for path, kind, other in ((spatial, "spatial", "t"), (temporal, "temporal", "s")):
        said = [letter.lower() for letter in _KIND_IN_NAME.findall(path.stem)]
        if said == [other]:
            raise UserError(
                f"{path} stands where the {kind} file belongs, and its name has {other!r} for the "
                "other kind: name the spatial file first, then the temporal one"
            )


def _numbered(path: Path, names: Mapping[int, str], class_list: Path) -> _Lines:
    """Read a file by number; UserError unless its numbers are those of the list."""
    found: _Lines = {}
    for key, lines in read_object(path, _SHAPE).items():
        if not is_number(key):
            raise UserError(f"{path}: key {quoted(key, 60)} is no number; {_SHAPE}")
        if int(key) in found:
            raise UserError(f"{path} has number {int(key)} twice: keep one of the two")
        found[int(key)] = lines
    missing, unknown = sorted(names.keys() - found.keys()), sorted(found.keys() - names.keys())
    if missing or unknown:
        parts = [
            f"{what} {', '.join(map(str, some[:_NAMED]))}{', ...' * (len(some) > _NAMED)}"
            for what, some in (("it lacks", missing), ("it has, and the list lacks,", unknown))
            if some
        ]
        raise UserError(
            f"{path} has {counted(len(found), 'number')} and {class_list} names {len(names)}: "
            f"{'; '.join(parts)}: give the list in the published order, of that half if the file "
            "is of one half"
        )
    return found


def _number_of(name: str, names: Mapping[int, str]) -> int | None:
    return next((n for n, held in names.items() if comparable_words(held) == name), None)


def _decide(first: int, second: int, names: Mapping[int, str], lines: Sequence[_Lines]) -> Exchange:
    """Say whether the sentences of two numbers belong to each other's names.

    `first` is the number of the name that comes first in the alphabet and last in the published
    list; the second name contains the first one.
    """
    a, b = names[first], names[second]
    shorter = {n: _naming(a, lines, n) - _naming(b, lines, n) for n in (first, second)}
    own = shorter[first] + _naming(b, lines, second)
    other = shorter[second] + _naming(b, lines, first)
    if own != other:
        reason = f"as {max(own, other)} of their sentences name the class"
        return Exchange(a, b, other > own, reason)
    if first < second:
        reason = "as published files follow a list that has these two names the other way round"
        return Exchange(a, b, True, reason)
    return Exchange(a, b, False, "as the list has these two names in the published order")


def _naming(name: str, lines: Sequence[_Lines], number: int) -> int:
    """Count the sentences of a number that hold the words of a name."""
    words = f" {comparable(name)} "
    held = [line for some in lines if isinstance(some[number], list) for line in some[number]]
    texts = [comparable(line) for line in held if isinstance(line, str)]
    return sum(words in f" {' '.join(_WORD.findall(text))} " for text in texts)
