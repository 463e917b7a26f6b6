"""Sentences that guide the text of a class: what is seen (spatial), in which order (temporal).

A file is JSON, `{"class name": {"spatial": ["...", ...], "temporal": ["...", ...]}, ...}`, with the
same number of sentences in every list (MSTA, Chen et al., CVPR 2025). C classes, N sentences.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from featstore.errors import UserError
from featstore.files.documents import read_json
from featstore.files.durable import write_json
from featstore.spelling import comparable
from pipeline.annotations.class_names import comparable_words
from pipeline.prompts import DESCRIPTIONS_LIMIT, PromptSet

Kind = Literal["spatial", "temporal"]
KINDS: Final[tuple[Kind, ...]] = ("spatial", "temporal")
SHAPE: Final = '{"class name": {"spatial": ["...", ...], "temporal": ["...", ...]}, ...}'


@dataclass(frozen=True)
class ClassDescriptions:
    """The sentences of C classes, N spatial and N temporal ones for each, in the order of the data.

    `spatial` and `temporal` hold a tuple of N sentences for every name of `class_names`. `source`
    is the file they came from, for messages, or "" for sentences that a program made.
    """

    class_names: tuple[str, ...]
    spatial: tuple[tuple[str, ...], ...]
    temporal: tuple[tuple[str, ...], ...]
    source: str = ""

    @property
    def per_class(self) -> int:
        """N, the spatial sentences of a class, and the temporal ones."""
        return len(self.spatial[0])

    @property
    def hash(self) -> str:
        """sha256 of names and sentences in their order; it belongs into provenance."""
        held = [self.class_names, self.spatial, self.temporal]
        return hashlib.sha256(json.dumps(held).encode()).hexdigest()

    def of(self, class_names: Sequence[str]) -> ClassDescriptions:
        """Return those of some classes, for example of the base half, under the names given.

        Raises UserError for a class without descriptions.
        """
        spelt = as_spelt(class_names, self.class_names)
        missing = [name for name in class_names if name not in spelt]
        if missing:
            raise UserError(
                f"{self.source or 'the descriptions'} has no sentences for class {missing[0]!r}: "
                "add some"
            )
        at = {name: number for number, name in enumerate(self.class_names)}
        chosen = [at[spelt[name]] for name in class_names]
        spatial, temporal = ([lines[i] for i in chosen] for lines in (self.spatial, self.temporal))
        return ClassDescriptions(tuple(class_names), tuple(spatial), tuple(temporal), self.source)

    def prompt_set(self, kind: Kind, name: str) -> PromptSet:
        """Return the sentences of one kind as a prompt set with that name."""
        lines = self.spatial if kind == "spatial" else self.temporal
        held = dict(zip(self.class_names, lines, strict=True))
        return PromptSet(name, (), held, self.source)

    def write(self, path: Path) -> None:
        """Write the file; UserError if something is there already."""
        if path.exists():
            raise UserError(f"{path} exists already: name another file, or move it away")
        write_json(path, self.to_json())

    def to_json(self) -> dict[str, dict[str, list[str]]]:
        """Return what a file holds."""
        rows = zip(self.class_names, self.spatial, self.temporal, strict=True)
        return {name: {"spatial": [*seen], "temporal": [*steps]} for name, seen, steps in rows}


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Return a JSON object of at most `DESCRIPTIONS_LIMIT` bytes that holds something.

    Raises UserError in one line for anything else.
    """
    value = read_json(path, remedy, limit=DESCRIPTIONS_LIMIT)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path} holds no object with classes; {remedy}")
    return value


def as_spelt(names: Sequence[str], held: Sequence[str]) -> dict[str, str]:
    """Map each name to its spelling in `held`: the same, a comparable one, or the same words.

    Names that have none are left out.
    """
    known = set(held)
    forms: list[Mapping[str, str]] = [
        {form(name): name for name in held} for form in (comparable, comparable_words)
    ]
    found: dict[str, str] = {}
    for name in names:
        near = name if name in known else forms[0].get(comparable(name))
        near = near or forms[1].get(comparable_words(name))
        if near is not None:
            found[name] = near
    return found
