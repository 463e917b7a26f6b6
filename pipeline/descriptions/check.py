"""Checks a file of class descriptions against the classes of a data set and a text tower."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from featstore.commands import command
from featstore.errors import UserError, counted, meant, one_line, quoted
from featstore.spelling import comparable
from pipeline.descriptions.class_descriptions import (
    KINDS,
    SHAPE,
    ClassDescriptions,
    Kind,
    as_spelt,
    read_object,
)
from pipeline.prompts import MAX_SENTENCE, MAX_SENTENCES

if TYPE_CHECKING:  # an encoder imports torch
    from pipeline.clip_encoder import Encoder

log = logging.getLogger(__name__)

_NAMED: Final = 3  # the most findings that an error of training names
_SHOWN: Final = 60  # letters of a sentence or a name


@dataclass(frozen=True)
class Finding:
    """Something about the sentences of one class."""

    class_name: str
    reason: str

    def __str__(self) -> str:
        return f"class {quoted(self.class_name, _SHOWN)}: {self.reason}"


@dataclass(frozen=True)
class Longest:
    """The longest sentence; `tokens` is None if they were not counted."""

    class_name: str
    sentence: str
    characters: int
    tokens: int | None


@dataclass(frozen=True)
class DescriptionsCheck:
    """What a check found. `descriptions` is None if anything is `wrong`.

    `room` is the number of tokens that the tower `encoder` takes, None if none was asked about, or
    if its tokeniser cannot say how many tokens a sentence has.
    """

    file: str
    classes: int
    described: int
    sentences: int
    descriptions: ClassDescriptions | None
    wrong: tuple[Finding, ...]
    doubtful: tuple[Finding, ...]
    longest: Longest | None
    encoder: str | None
    room: int | None

    def to_json(self) -> dict[str, Any]:
        """Return the check as strict JSON values."""
        made = self.descriptions
        return {
            "ok": not self.wrong,
            **{name: getattr(self, name) for name in ("file", "classes", "described", "sentences")},
            "per_class": None if made is None else made.per_class,
            "hash": None if made is None else made.hash,
            "encoder": self.encoder,
            "room": self.room,
            "longest": None if self.longest is None else vars(self.longest),
            "wrong": [vars(finding) for finding in self.wrong],
            "doubtful": [vars(finding) for finding in self.doubtful],
        }


def read_class_descriptions(
    path: Path, class_names: Sequence[str], encoder: Encoder | None = None
) -> ClassDescriptions:
    """Read the descriptions of exactly these classes, whose sentences fit the encoder, if given.

    What is doubtful is logged. Raises UserError, in one line that names the first classes, for
    whatever `check_descriptions` finds wrong.
    """
    checked = check_descriptions(path, class_names, encoder)
    if checked.descriptions is None:
        more = len(checked.wrong) - _NAMED
        said = "; ".join(map(str, checked.wrong[:_NAMED])) + (f"; and {more} more" * (more > 0))
        asked = command("descriptions", "check", path, classes="FILE")
        raise UserError(f"{path}: {said}: correct it (`{asked}` lists everything)")
    for finding in checked.doubtful:
        log.warning("%s: %s", path, finding)
    return checked.descriptions


def check_descriptions(
    path: Path, class_names: Sequence[str], encoder: Encoder | None = None
) -> DescriptionsCheck:
    """Compare a file with classes and, if it is given, with the room of an encoder's text tower.

    Everything that is wrong is listed by class: one that is missing, unknown or given twice, a list
    that is missing, empty or of another length, something that is no sentence, a sentence that is
    too long. A sentence that a class has twice is doubtful. Raises UserError, in one line, only for
    a file that cannot be read as such a JSON object, and for one whose keys are numbers.
    """
    value = read_object(path, f"write {SHAPE}, every class once")
    if all(name.isascii() and name.isdigit() for name in value):
        asked = command("descriptions", "import", "S.json", "T.json", classes="FILE", out="OUT")
        raise UserError(
            f"{path}: its keys are numbers, as in published files, and which class has which "
            f"number differs between lists: give the classes their names with `{asked}`"
        )
    findings = _Findings()
    spelt = _spellings(value, class_names, findings)
    lists = {
        (name, kind): lines
        for name, key in spelt.items()
        for kind, lines in _lists(name, value[key], findings)
    }
    _require_equal(lists, findings)
    _find_doubles(lists, findings)
    tokens = _count_tokens(lists, encoder, findings)
    wrong = tuple(findings.wrong)
    made = None
    if not wrong:
        seen, steps = (tuple(lists[name, kind] for name in class_names) for kind in KINDS)
        made = ClassDescriptions(tuple(class_names), seen, steps, str(path))
    return DescriptionsCheck(
        file=str(path),
        classes=len(class_names),
        described=len(spelt),
        sentences=sum(map(len, lists.values())),
        descriptions=made,
        wrong=wrong,
        doubtful=tuple(findings.doubtful),
        longest=_longest(lists, tokens),
        encoder=None if encoder is None else encoder.name,
        room=None if encoder is None else encoder.token_room,
    )


@dataclass
class _Findings:
    wrong: list[Finding] = field(default_factory=list)
    doubtful: list[Finding] = field(default_factory=list)


_Lists = Mapping[tuple[str, Kind], tuple[str, ...]]


def _spellings(
    value: Mapping[str, Any], class_names: Sequence[str], findings: _Findings
) -> dict[str, str]:
    """Map the classes to the file's keys, and note those that have none, and keys without class."""
    twice = defaultdict(list)
    for key in value:
        twice[comparable(key)].append(key)
    for first, *others in twice.values():
        for other in others:
            findings.wrong.append(
                Finding(other, f"{quoted(first, _SHOWN)} reads the same: keep one of the two")
            )
    spelt = as_spelt(class_names, list(value))
    used = {*spelt.values(), *(key for keys in twice.values() for key in keys[1:])}
    unknown = [key for key in value if key not in used]
    missing = [name for name in class_names if name not in spelt]
    findings.wrong += [Finding(name, "it has no sentences: add some") for name in missing]
    findings.wrong += [
        Finding(key, f"it is no class of these: {meant(key, missing)}correct or remove it")
        for key in unknown
    ]
    return spelt


def _lists(name: str, held: Any, findings: _Findings) -> Iterator[tuple[Kind, tuple[str, ...]]]:
    """Yield the lists of a class that hold sentences; note what is wrong with the others."""
    if not isinstance(held, dict):
        reason = f"its value is of type {type(held).__name__}: write {SHAPE}"
        findings.wrong.append(Finding(name, reason))
        return
    for key in held.keys() - set(KINDS):
        said = f"{quoted(key, _SHOWN)} is neither spatial nor temporal"
        findings.wrong.append(Finding(name, f"{said}: {meant(key, KINDS)}remove it"))
    for kind in KINDS:
        lines = held.get(kind)
        if problem := _problem(kind, lines):
            findings.wrong.append(Finding(name, problem))
        else:
            yield kind, tuple(line.strip() for line in lines or ())


def _problem(kind: Kind, lines: Any) -> str:
    """Return what is wrong with a list of sentences, "" if nothing is."""
    if not isinstance(lines, list):
        return f"it has no list {kind!r}: add one"
    if not 1 <= len(lines) <= MAX_SENTENCES:
        return f"{kind} has {counted(len(lines), 'sentence')}: write 1 to {MAX_SENTENCES}"
    for number, line in enumerate(lines, start=1):
        here = f"{kind} sentence {number}"
        if not isinstance(line, str) or not line.strip():
            return f"{here} is {one_line(repr(line), _SHOWN)}: write text"
        if len(line) > MAX_SENTENCE:
            return f"{here} has {len(line)} characters, at most {MAX_SENTENCE} are read: shorten it"
    return ""


def _require_equal(lists: _Lists, findings: _Findings) -> None:
    """Note the lists that have another number of sentences than most."""
    counts = Counter(map(len, lists.values()))
    usual = max(counts, key=lambda n: (counts[n], n), default=0)
    findings.wrong += [
        Finding(
            name,
            f"{kind} has {counted(len(lines), 'sentence')}, most lists have {usual}: every list "
            "needs as many",
        )
        for (name, kind), lines in lists.items()
        if len(lines) != usual
    ]


def _find_doubles(lists: _Lists, findings: _Findings) -> None:
    first: dict[tuple[str, str], str] = {}
    for (name, kind), lines in lists.items():
        for number, line in enumerate(lines, start=1):
            here = f"{kind} sentence {number}"
            before = first.setdefault((name, comparable(line)), here)
            if before != here:
                said = f"{here} is {before} again ({quoted(line, _SHOWN)})"
                findings.doubtful.append(Finding(name, said))


def _count_tokens(lists: _Lists, encoder: Encoder | None, findings: _Findings) -> dict[str, int]:
    """Count the tokens of every sentence, and note those that the encoder has no room for."""
    if encoder is None or encoder.token_room is None:
        return {}
    distinct = list(dict.fromkeys(line for lines in lists.values() for line in lines))
    tokens = dict(zip(distinct, encoder.token_counts(distinct), strict=True))
    for (name, kind), lines in lists.items():
        for number, line in enumerate(lines, start=1):
            if tokens[line] > encoder.token_room:
                said = f"{kind} sentence {number} has {tokens[line]} tokens, {encoder.name} takes"
                shown = one_line(line, _SHOWN)
                reason = f"{said} {encoder.token_room}: shorten {shown!r}"
                findings.wrong.append(Finding(name, reason))
    return tokens


def _longest(lists: _Lists, tokens: Mapping[str, int]) -> Longest | None:
    held = [(name, line) for (name, _), lines in lists.items() for line in lines]
    if not held:
        return None
    name, line = max(held, key=lambda each: (tokens.get(each[1], 0), len(each[1])))
    return Longest(name, line, len(line), tokens.get(line))
