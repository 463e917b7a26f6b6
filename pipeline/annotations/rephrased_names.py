"""Reads class names that a language model has rephrased: "class name: one sentence"."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from featstore.errors import UserError, counted_of, quoted
from featstore.spelling import comparable
from pipeline.annotations.label_names import read_names

log = logging.getLogger(__name__)

_SHOWN: Final = 3  # the most names that a warning shows


def rephrased_names(path: Path) -> dict[str, str]:
    """Read rephrased names by class from a file in the published layout, which is CSV `id,name`.

    The class is what stands before the first colon of a name; the numbers are not used, because
    they differ between lists. The value is the whole name. A warning counts names without a
    sentence, which stay as they are. Other layouts are those of `read_names`. Raises UserError as
    that does, for a name without a class or one for a class that another is for, and where no name
    has a sentence.
    """
    found: dict[str, str] = {}
    forms: dict[str, int] = {}
    bare: list[str] = []
    for number, text in read_names(path).items():
        key, _, sentence = (part.strip() for part in text.partition(":"))
        if not key:
            raise UserError(
                f"{path}: name {number}, {quoted(text, 60)}, names no class: write its name "
                "before the colon"
            )
        first = forms.setdefault(comparable(key), number)
        if first != number:
            raise UserError(
                f"{path}: names {first} and {number} are both for class {quoted(key, 60)}: "
                "leave one out"
            )
        found[key] = text
        if not sentence:
            bare.append(quoted(key, 60))
    if len(bare) == len(found):
        raise UserError(
            f"{path} has plain class names: rephrased ones are written 'class name: one "
            "sentence'; plain names need no file"
        )
    if bare:
        named = ", ".join(bare[:_SHOWN]) + (", ..." if len(bare) > _SHOWN else "")
        log.warning(
            "%s: %s no sentence, which changes nothing: %s",
            *(path, counted_of(len(bare), len(found), "name", "has", "have"), named),
        )
    return found
