"""The descriptions that class texts are held near in training: of what is seen, and of its course.

The file is {class name: {"spatial": ["...", ...], "temporal": ["...", ...]}}.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from featstore.errors import UserError, one_line
from featstore.files.documents import read_json
from pipeline.prompts import PromptSet

log = logging.getLogger(__name__)

KINDS: Final = ("spatial", "temporal")
FALLBACK: Final = {
    "spatial": ("A video about {}.",),
    "temporal": ("A video of {} from its beginning to its end.",),
}
"""What stands for the descriptions of a class where no file is given."""
GUIDES_LIMIT: Final = 1 << 26  # bytes; eight sentences for 10,000 classes are a quarter of it
_SHAPE: Final = '{"class name": {"spatial": ["..."], "temporal": ["..."]}}'


def class_guides(path: Path | None, class_names: Sequence[str]) -> tuple[PromptSet, PromptSet]:
    """Return the spatial and the temporal descriptions of these classes.

    Without a file they are made from the names, which is logged. Raises UserError for a file that
    is not of this kind, that has not exactly these classes, or that lacks sentences.
    """
    if path is None:
        log.warning(
            "no descriptions are given (--guides FILE): class texts are held near %r and %r",
            *(FALLBACK[kind][0] for kind in KINDS),
        )
        spatial, temporal = (PromptSet(kind, FALLBACK[kind]) for kind in KINDS)
        return spatial, temporal
    value = read_json(path, f"write {_SHAPE}, every class once", limit=GUIDES_LIMIT)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path} holds no object with class names: write {_SHAPE}")
    found: dict[str, dict[str, tuple[str, ...]]] = {kind: {} for kind in KINDS}
    for name, of_class in value.items():
        where = f"{path}, class {one_line(repr(name), 60)}"
        if not isinstance(of_class, dict) or sorted(of_class) != sorted(KINDS):
            raise UserError(f"{where}: it must have spatial and temporal sentences: write {_SHAPE}")
        for kind in KINDS:
            lines = of_class[kind]
            fits = isinstance(lines, list) and lines
            if not fits or not all(isinstance(v, str) and v.strip() for v in lines):
                raise UserError(f"{where}: {kind} must be a list of sentences, none of them empty")
            found[kind][name] = tuple(lines)
    spatial, temporal = (PromptSet(kind, (), found[kind], str(path)) for kind in KINDS)
    spatial.require_classes(class_names)
    return spatial, temporal


def guides_hash(sets: Sequence[PromptSet], class_names: Sequence[str]) -> str:
    """Return the sha256 of the descriptions of these classes."""
    return hashlib.sha256(" ".join(each.hash(class_names) for each in sets).encode()).hexdigest()
