"""Tells names that a person reads as the same, however they are spelt: classes, paths, keys."""

from __future__ import annotations

import re
import unicodedata
import urllib.parse
from typing import Final

# Straight, typographic and angle quotes, accents and primes used as quotes.
_QUOTES: Final = (0x22, 0x27, 0x60, 0xB4, *range(0x2018, 0x2020), 0x2032, 0x2033)
_ANGLES: Final = (0xAB, 0xBB, 0x2039, 0x203A)
_SPACES_AND_QUOTES: Final = {**dict.fromkeys((*_QUOTES, *_ANGLES)), ord("_"): " ", 0xFF3F: " "}
_HYPHENS: Final = "[-\u2010-\u2015\u2212\ufe63\uff0d]"
HYPHEN: Final = re.compile(rf"(?<=\S){_HYPHENS}|{_HYPHENS}(?![0-9])")  # no minus: "-1"


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
    return " ".join(HYPHEN.sub(" ", plain).split()) or name


def named_by(key: str) -> str:
    """The name that a key stands for, composed (Unicode NFC): equal for one file on all systems."""
    return unicodedata.normalize("NFC", urllib.parse.unquote(key, errors="surrogateescape"))
