"""Compares two saved results: first the fields in which they differ, then their numbers.

docs/comparing.md describes the fields of result files. A field that a file lacks is unknown, and
an unknown value is never equal to another.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from featstore.errors import UserError, meant
from featstore.files.documents import parse_json, read_document
from featstore.workspace import FIRST_STAGE, HEAD_FILE, LAST_EPOCH, Workspace
from heads.evaluation.next_steps import evaluation_of, newest_evaluation
from heads.evaluation.outcomes import Paired, paired_outcomes
from heads.evaluation.results import GROUPS, EvalResult, Group
from heads.evaluation.several_classes import MEASURE
from heads.methods.registry import keeps_several_weights

log = logging.getLogger(__name__)

RESULT_LIMIT: Final = 64 * 2**20  # bytes; a result of 700 classes is some kilobytes
EVAL_FOLDER: Final = "eval"

# The metadata of each field of `EvalResult`, by the name under which a difference is reported.
_DECLARED: Final = {
    "splits" if field.name == "per_split" else field.name: field.metadata
    for field in fields(EvalResult)
}
FIELDS: Final[dict[str, tuple[Group, bool]]] = {
    name: (declared["group"], declared.get("decisive", False))
    for name, declared in _DECLARED.items()
    if "group" in declared
}
_NONE_IS_KNOWN: Final = {name for name, said in _DECLARED.items() if said.get("none_known")}
# Choices that only some methods have: beside a method without them they forbid no comparison.
_OWN_CHOICES: Final = ("weights", "projection")
# Entries that are not compared, including entries of earlier versions and those `eval` prints.
_NO_FIELDS: Final = frozenset(
    {"per_split", "file", "count_notes", "published", "nearest"} | _DECLARED.keys() - FIELDS.keys()
)


@dataclass(frozen=True)
class SavedResult:
    """One result file: `values` is its JSON object, `time_ns` the time when it was written."""

    path: Path
    values: Mapping[str, Any]
    time_ns: int

    @property
    def dataset(self) -> str:
        """The tested data set."""
        return str(self.values["dataset"])

    @property
    def role(self) -> str:
        """The kind of protocol: "closeset", "zeroshot", ..."""
        return str(self.values["protocol"])

    @property
    def protocol_name(self) -> str | None:
        """Name of the protocol; None in files written before protocols had names."""
        name: str | None = self.values.get("protocol_name")
        return name

    @property
    def measure(self) -> str:
        """The name of `number` in the file: "top1", or "mean_ap" of several classes a video."""
        return "mean_ap" if self.values.get("measure") == MEASURE else "top1"

    @property
    def number(self) -> float:
        """What was measured, in percent, unrounded; the mean if there are several test sets."""
        return float(self.values[self.measure])

    @property
    def splits(self) -> dict[str, Mapping[str, Any]]:
        """The test sets by name."""
        return {str(split["split"]): split for split in self.values["per_split"]}

    def field(self, name: str) -> tuple[bool, Any]:
        """Return (known, value) of a field; "splits" has the number of videos per test set."""
        if name == "splits":
            return True, {split: part.get("n_listed") for split, part in self.splits.items()}
        if name == "shots" and self.role not in ("fewshot", "base-to-novel"):
            return True, None
        if name == "measure":  # results of one class a video do not say that it is top-1
            return True, self.measure
        if name == "class_names_as":  # nor that their names are plain
            return True, self.values.get(name, "plain")
        if name == "weights":  # of several kinds it may not be known which these are
            value = self.values.get(name)
            return value is not None or not keeps_several_weights(self.values.get("kind")), value
        if name == "projection":
            return True, self.values.get(name)
        value = self.values.get(name)
        return value is not None or name in self.values.keys() & _NONE_IS_KNOWN, value


@dataclass(frozen=True)
class Difference:
    """One field in which two results differ, or which one of them lacks."""

    name: str
    group: Group
    of_a: str
    of_b: str
    decisive: bool
    """A difference in this field makes the numbers incomparable."""
    unknown: bool
    """At least one of the results lacks the field, so that they may or may not differ."""


@dataclass(frozen=True)
class Number:
    """One accuracy of both results in percent; the difference is B minus A, in points."""

    split: str
    measure: str
    a: float
    b: float
    difference: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: the two files, their differences and their numbers."""

    a: str
    b: str
    differences: tuple[Difference, ...]
    numbers: tuple[Number, ...]
    only_a: tuple[str, ...]
    """Test sets that only A has."""
    only_b: tuple[str, ...]
    paired: tuple[Paired, ...]
    """One entry per test set, if the outcomes of all videos are saved beside both results."""

    @property
    def incomparable(self) -> tuple[str, ...]:
        """Fields whose difference makes the numbers incomparable."""
        return tuple(d.name for d in self.differences if d.decisive and not d.unknown)

    @property
    def unsure(self) -> tuple[str, ...]:
        """Fields that one result lacks and whose difference would make the numbers incomparable."""
        return tuple(d.name for d in self.differences if d.decisive and d.unknown)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as strict JSON values; `comparable` is null if it is not known."""
        verdict = {
            "a": self.a,
            "b": self.b,
            "comparable": False if self.incomparable else None if self.unsure else True,
            "incomparable": self.incomparable,
            "unknown": self.unsure,
        }
        return verdict | asdict(self)


def read_result(path: Path) -> SavedResult:
    """Read a result file that any version of `eval` wrote; UserError if it is another file."""
    try:
        raw = read_document(path, "name a result file", limit=RESULT_LIMIT)
        time_ns = path.stat().st_mtime_ns
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a result file") from error
    try:
        values = parse_json(raw)
        texts = [values[name] for name in ("protocol", "dataset", "head")]
        texts += [part["split"] for part in values["per_split"]]
        measure = "mean_ap" if values.get("measure") == MEASURE else "top1"
        numbers = [values[measure], *(part[measure] for part in values["per_split"])]
        if not all(isinstance(text, str) for text in texts) or not all(map(_is_number, numbers)):
            raise ValueError("a name or a number is something else")
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is not a result of `mote-cli eval`: name one of the files under "
            f"heads/RUN/{EVAL_FOLDER}/"
        ) from error
    return SavedResult(path, values, time_ns)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def saved_results(run_dir: Path) -> list[SavedResult]:
    """Return the results under a run's `eval/`; other JSON files there are logged and left out."""
    found = []
    for path in sorted((run_dir / EVAL_FOLDER).glob("*.json")):
        try:
            found.append(read_result(path))
        except UserError as error:
            log.warning("skipped: %s", error)
    return found


def newest_result(run_dir: Path, like: SavedResult | None = None) -> SavedResult:
    """Return the newest result of a run; UserError when the run has no result.

    With `like`, results of the same kind of protocol on the same data set come first.
    """
    results = saved_results(run_dir)
    if not results:
        raise UserError(f"{run_dir} has no results: run `{evaluation_of(run_dir)}`")
    if like is not None:
        same = [r for r in results if (r.role, r.dataset) == (like.role, like.dataset)]
        results = same or results
    return max(results, key=lambda result: result.time_ns)


def evaluated_runs(workspace: Workspace) -> list[Path]:
    """Return the folders of the runs that have results, sorted by name."""
    return sorted({file.parent.parent for file in workspace.root.glob("heads/*/eval/*.json")})


def choose_result(workspace: Workspace, text: str, like: SavedResult | None = None) -> SavedResult:
    """Return the result in the file `text`, or the newest one of the run `text` (folder or name).

    `like` as for `newest_result`. UserError if `text` is neither.
    """
    path = Path(text)
    if path.is_file():
        return read_result(path)
    folders = [path]
    if "/" not in text.removesuffix(f"/{FIRST_STAGE}").removesuffix(f"/{LAST_EPOCH}"):
        folders.append(workspace.head_dir(text))
    for folder in folders:
        if (folder / EVAL_FOLDER).is_dir():
            return newest_result(folder, like)
    for folder in folders:
        if (folder / HEAD_FILE).is_file():
            raise UserError(
                f"head {text} has no result yet: make one with `{evaluation_of(folder)}`"
            )
    names = [path.name for path in evaluated_runs(workspace)]
    known = ", ".join(names) or "none"
    raise UserError(
        f"{text!r} is neither a result file nor a run with results (runs with results: {known}): "
        f"{meant(text, names)}make a result with `{newest_evaluation(workspace)}`"
    )


def differences(a: SavedResult, b: SavedResult) -> list[Difference]:
    """List the fields in which two results differ or which one of them lacks, group by group."""
    others = (a.values.keys() | b.values.keys()) - FIELDS.keys() - _NO_FIELDS
    compared = {**FIELDS, **dict.fromkeys(sorted(others), ("other", False))}
    found: list[Difference] = []
    for name, (group, decisive) in compared.items():
        (knows_a, of_a), (knows_b, of_b) = a.field(name), b.field(name)
        known = knows_a and knows_b
        unequal = [(name, of_a, of_b)] if of_a != of_b or not known else []
        if known and unequal and isinstance(of_a, dict) and isinstance(of_b, dict):
            if name == "splits" and not of_a.keys() & of_b.keys():
                unequal = [(name, ", ".join(of_a), ", ".join(of_b))]
            else:
                entries = [(f"{name} {key}", of_a.get(key), of_b.get(key)) for key in of_a | of_b]
                unequal = [entry for entry in entries if entry[1] != entry[2]]
        found += [
            Difference(
                label,
                group,
                _text(one) if knows_a else "unknown",
                _text(other) if knows_b else "unknown",
                decisive and not (known and name in _OWN_CHOICES and None in (one, other)),
                not known,
            )
            for label, one, other in unequal
        ]
    return sorted(found, key=lambda difference: GROUPS.index(difference.group))


def compare(a: SavedResult, b: SavedResult) -> Comparison:
    """Compare two results: their fields, then their numbers.

    Numbers are compared on test sets of the same name. If the names differ or there are several
    test sets, the means over all test sets are compared as well.
    """
    one, other = a.splits, b.splits
    pairs = [(name, one[name], other[name]) for name in one if name in other]
    if one.keys() != other.keys() or len(one) > 1:
        pairs.append(("mean of all test sets", a.values, b.values))
    same_list = a.field("list_hash") == b.field("list_hash") and a.field("list_hash")[0]
    return Comparison(
        a=str(a.path),
        b=str(b.path),
        differences=tuple(differences(a, b)),
        numbers=tuple(
            Number(split, name, of_a[name], of_b[name], of_b[name] - of_a[name])
            for split, of_a, of_b in pairs
            for name in ("top1", "top5", "mean_ap")
            if _is_number(of_a.get(name)) and _is_number(of_b.get(name))
        ),
        only_a=tuple(name for name in one if name not in other),
        only_b=tuple(name for name in other if name not in one),
        paired=tuple(paired_outcomes(a.path, b.path)) if same_list else (),
    )


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
