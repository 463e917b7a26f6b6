"""Turns class names into words that a person would use, as text encoders were trained on them."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from featstore.errors import UserError, counted, one_line, one_of

LabelMap = Literal["corrected", "as-published"]
"""What to do with a file of class names that contradicts the videos."""
NamesAs = Literal["words", "raw"]
"""Class names as natural words, or as the data set spells them."""

_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_CAMEL_CASE = re.compile(r"(?=.*[a-z])[A-Z][A-Za-z0-9]*")
_HUMP = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
# Straight, typographic and angle quotes, accents and primes used as quotes.
_QUOTES: Final = (0x22, 0x27, 0x60, 0xB4, *range(0x2018, 0x2020), 0x2032, 0x2033)
_ANGLES: Final = (0xAB, 0xBB, 0x2039, 0x203A)
_SPACES_AND_QUOTES: Final = {**dict.fromkeys((*_QUOTES, *_ANGLES)), ord("_"): " ", 0xFF3F: " "}
_HYPHENS: Final = "[-\u2010-\u2015\u2212\ufe63\uff0d]"
_HYPHEN: Final = re.compile(rf"(?<=\S){_HYPHENS}|{_HYPHENS}(?![0-9])")  # no minus: "-1"
_SHOWN: Final = 5  # the most classes that a note names


@dataclass(frozen=True)
class Naming:
    """Choices about class names. Raises UserError for an unknown choice."""

    label_map: LabelMap = "corrected"
    names_as: NamesAs = "words"

    def __post_init__(self) -> None:
        for option, value, choices in (
            ("--label-map", self.label_map, get_args(LabelMap)),
            ("--class-names-as", self.names_as, get_args(NamesAs)),
        ):
            if value not in choices:
                raise UserError(f"{option} {value!r} is unknown: {one_of(value, choices)}")

    def names(self, raw: tuple[str, ...]) -> tuple[str, ...]:
        """Return the class names that sentences are made from, given the raw class names."""
        return raw if self.names_as == "raw" else tuple(map(natural_class_name, raw))


USUAL_NAMING: Final = Naming()


def natural_class_name(raw: str) -> str:
    """The class name as natural words: "brush_hair" -> "brush hair", "TaiChi" -> "tai chi".

    Only names with underscores or in CamelCase change, so that Kinetics names such as
    "passing American football (in game)" stay as they are. Capital letters are kept in names
    with underscores unless every word has one. Square brackets of Something-Something V2
    templates are removed; the words in them stay.
    """
    text = _BRACKETS.sub(r"\1", raw).strip()
    words = text.replace("_", " ").split() if "_" in text else [text]
    lettered = [word for word in words if word[0:1].isalpha()]
    if all(word[0].isupper() for word in lettered):
        words = [hump for word in words for hump in _humps(word)]
    return " ".join(words) or raw


def natural_order(text: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a sort key by which numbers in a text count as numbers: "a 2" before "a 10"."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text.lower())
    numbers = [part.lstrip("0") if part[0].isdigit() else None for part in parts]
    return [
        (1, 0, part) if number is None else (0, len(number), number)
        for part, number in zip(parts, numbers, strict=True)
    ], text


def same_letters(text: str) -> str:
    """`text` as other systems may spell the same file name: composed (Unicode NFC), lower case."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())


def comparable(name: str) -> str:
    """The normal form of a name, in which two names are equal if a person reads them as the same.

    That is `same_letters` without quotes, with one space for spaces, underscores and hyphens. The
    minus of a number stays. A name of nothing else is its own form.
    """
    plain = same_letters(name).translate(_SPACES_AND_QUOTES)
    return " ".join(_HYPHEN.sub(" ", plain).split()) or name


def comparable_words(name: str) -> str:
    """The natural words of a class name, comparable."""
    return comparable(natural_class_name(name))


def one_spelling(
    counts: Mapping[str, int], note: Callable[[str], None], kept: Collection[str] = ()
) -> dict[str, str]:
    """Map every label to the spelling to use; labels that are `comparable` are one class.

    `counts` has the number of videos of every label. The spelling is the one of `kept`, the classes
    that the data set has already, else the composed one with spaces. `note` is told what was
    merged.
    """
    chosen: dict[str, str] = {}
    for label in kept:
        chosen.setdefault(comparable(label), label)
    spellings = sorted(counts, key=lambda text: (_unusual(text), text))
    found = {
        label: label if label in kept else chosen.setdefault(comparable(label), label)
        for label in spellings
    }
    together: dict[str, list[str]] = {}
    for label, spelling in found.items():
        together.setdefault(spelling, []).append(label)
    merged = [
        " and ".join(
            f"{shown} ({counted(counts[label], 'video')})"
            for label, shown in zip(group, spellings_shown(group), strict=True)
        )
        + ("" if spelling in group else f" as {spelling!r}")
        for spelling, group in together.items()
        if group != [spelling]
    ]
    if merged:
        more = f"; and {len(merged) - _SHOWN} more" if len(merged) > _SHOWN else ""
        note(
            f"{counted(len(merged), 'class is', 'classes are')} spelt in ways that read the same, "
            "and each is one class: "
            f"{'; '.join(merged[:_SHOWN])}{more}"
        )
    return found


def spellings_shown(names: Sequence[str]) -> list[str]:
    """Return names in quotes; those that a person could not tell apart have escapes."""
    alike = len({unicodedata.normalize("NFC", name) for name in names}) < len(names)
    return [ascii(name) if alike else repr(name) for name in names]


def _unusual(name: str) -> tuple[bool, bool, bool, bool]:
    """Sort spellings of one name: those that other files are most likely to have come first."""
    composed = unicodedata.is_normalized("NFC", name)
    return not composed, "_" in name, bool(_HYPHEN.search(name)), '"' in name


def _humps(word: str) -> list[str]:
    """Return the words of a CamelCase word in lower case; any other text stays as it is.

    UCF101 spells one class HandstandPushups and HandStandPushups; both are "handstand pushups".
    """
    if not _CAMEL_CASE.fullmatch(word):
        return [word]
    humps = " ".join(hump.lower() for hump in _HUMP.findall(word))
    return humps.replace("hand stand", "handstand").split()


def class_list(text: str) -> tuple[str, ...]:
    """Split "a, b, c" into class names; a name with a comma is in quotes: '"cut, chop", run'.

    Raises UserError if there is no name or one is given twice.
    """
    fields = next(csv.reader([" ".join(text.split())], skipinitialspace=True), [])
    names = [name.strip() for name in fields if name.strip()]
    if not names:
        raise UserError(f'--classes {text!r} names no class: separate them with commas, "a,b,c"')
    return distinct_names("--classes", names)


def distinct_names(where: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return the names. Raises UserError, which says `where`, for two that read the same."""
    found: dict[str, str] = {}
    for name in names:
        form = comparable(name)
        if form in found:
            first = found[form]
            both = [one_line(shown, 60) for shown in spellings_shown([first, name])]
            again = f"{both[0]} twice" if first == name else " and ".join(both)
            same = "" if first == name else ", which read the same"
            raise UserError(f"{where} names {again}{same}: name each class once")
        found[form] = name
    return tuple(found.values())
