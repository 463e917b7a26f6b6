"""Two saved results side by side: first in what they differ, then by how much.

A number is compared with another only after everything it stands for. Fields are those of the
result files (docs/comparing.md); a field that a file lacks is unknown, and unknown is not equal.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from featstore.errors import UserError
from featstore.workspace import FIRST_STAGE, Workspace
from heads.evaluation.outcomes import Paired, paired_outcomes
from heads.evaluation.results import GROUPS, EvalResult, Group

log = logging.getLogger(__name__)

RESULT_LIMIT: Final = 64 * 2**20  # bytes; a result of 700 classes is some kilobytes
EVAL_FOLDER: Final = "eval"

ALL_SETS: Final = "mean of all test sets"

# Group and decisiveness by the name a difference is told under: `EvalResult` declares both.
_DECLARED: Final = {
    "splits" if field.name == "per_split" else field.name: field.metadata
    for field in dataclasses.fields(EvalResult)
}
FIELDS: Final[dict[str, tuple[Group, bool]]] = {
    name: (said["group"], said.get("decisive", False))
    for name, said in _DECLARED.items()
    if "group" in said
}
# What results say that is not compared, also those of earlier versions and those printed by `eval`.
_NO_FIELDS: Final = frozenset(
    {"per_split", "file", "count_notes", "published", "nearest"} | _DECLARED.keys() - FIELDS.keys()
)
_NONE_IS_KNOWN: Final = {name for name, said in _DECLARED.items() if said.get("none_known")}
_UNKNOWN: Final = "unknown"


@dataclass(frozen=True)
class SavedResult:
    """One result file: `values` is its JSON object, `time_ns` when it was written."""

    path: Path
    values: Mapping[str, Any]
    time_ns: int

    @property
    def head(self) -> str:
        """Name of the run it is of."""
        return str(self.values["head"])

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
        name = self.values.get("protocol_name")
        return None if name is None else str(name)

    @property
    def modulated(self) -> bool:
        """Whether the head was modulated."""
        return bool(self.values.get("modulate", False))

    @property
    def top1(self) -> float:
        """Top-1 in percent, unrounded; over several splits their mean."""
        return float(self.values["top1"])

    @property
    def splits(self) -> dict[str, Mapping[str, Any]]:
        """The test sets by name."""
        return {str(split["split"]): split for split in self.values["per_split"]}

    def field(self, name: str) -> tuple[bool, Any]:
        """(known, value) of a field; splits are the names of the test sets with their counts."""
        if name == "splits":
            parts = self.splits.values()
            return True, {str(part["split"]): part.get("n_listed") for part in parts}
        if name == "shots" and self.role not in ("fewshot", "base-to-novel"):
            return True, None
        value = self.values.get(name)
        known = name in self.values and (value is not None or name in _NONE_IS_KNOWN)
        return known, value


@dataclass(frozen=True)
class Difference:
    """One field in which two results differ, or of which one does not say what it was."""

    name: str
    group: Group
    of_a: str
    of_b: str
    decisive: bool
    """A difference here makes the numbers incomparable."""
    unknown: bool
    """One of the results, or both, does not say: they may or may not differ."""


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
    """What `compare` found: differences before numbers."""

    a: Path
    b: Path
    differences: tuple[Difference, ...]
    numbers: tuple[Number, ...]
    only_a: tuple[str, ...]
    """Test sets that only A has."""
    only_b: tuple[str, ...]
    paired: tuple[Paired, ...]
    """Per test set, where the outcome of every video lies beside both results."""

    @property
    def incomparable(self) -> tuple[str, ...]:
        """Fields whose difference makes the numbers incomparable."""
        return tuple(d.name for d in self.differences if d.decisive and not d.unknown)

    @property
    def unsure(self) -> tuple[str, ...]:
        """Fields that would, and that one of the results does not tell."""
        return tuple(d.name for d in self.differences if d.decisive and d.unknown)

    def to_json(self) -> dict[str, Any]:
        """The comparison as strict JSON values; `comparable` is null when it cannot be told."""
        return {
            "a": str(self.a),
            "b": str(self.b),
            "comparable": False if self.incomparable else None if self.unsure else True,
            "incomparable": list(self.incomparable),
            "unknown": list(self.unsure),
            "differences": [asdict(difference) for difference in self.differences],
            "numbers": [asdict(number) for number in self.numbers],
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "paired": [asdict(paired) for paired in self.paired],
        }


def read_result(path: Path) -> SavedResult:
    """Read a result file of `eval`, of any version; UserError when it is none."""
    try:
        with open(path, "rb") as file:
            raw = file.read(RESULT_LIMIT + 1)
        time_ns = path.stat().st_mtime_ns
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name a result file") from error
    try:
        values = json.loads(raw) if len(raw) <= RESULT_LIMIT else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not _is_result(values):
        raise UserError(
            f"{path} is not a result of `mote-cli eval`: name one of the files under "
            f"heads/RUN/{EVAL_FOLDER}/"
        )
    return SavedResult(path, values, time_ns)


def _is_result(values: Mapping[str, Any]) -> bool:
    texts = all(isinstance(values.get(name), str) for name in ("protocol", "dataset", "head"))
    parts = values.get("per_split")
    return (
        texts
        and _is_number(values.get("top1"))
        and isinstance(parts, list)
        and all(
            isinstance(p, dict) and isinstance(p.get("split"), str) and _is_number(p.get("top1"))
            for p in parts
        )
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def saved_results(run_dir: Path) -> list[SavedResult]:
    """The results kept under a run's `eval/`; other JSON files there are passed over, logged."""
    found = []
    for path in sorted((run_dir / EVAL_FOLDER).glob("*.json")):
        try:
            found.append(read_result(path))
        except UserError as error:
            log.warning("passed over: %s", error)
    return found


def newest_result(run_dir: Path, like: SavedResult | None = None) -> SavedResult:
    """The result of a run that was written last; with `like`, of those on the same data set.

    Where the run has none on that data set, the newest of all. UserError when it has none.
    """
    results = saved_results(run_dir)
    if not results:
        raise UserError(
            f"{run_dir} has no results: run `mote-cli eval --zeroshot NAME --head {run_dir.name}`"
        )
    if like is not None:
        same = [r for r in results if (r.role, r.dataset) == (like.role, like.dataset)]
        results = same or results
    return max(results, key=lambda result: result.time_ns)


def evaluated_runs(workspace: Workspace) -> list[Path]:
    """Folders of the runs that have results, sorted by name."""
    return sorted({file.parent.parent for file in workspace.root.glob("heads/*/eval/*.json")})


def choose_result(workspace: Workspace, text: str, like: SavedResult | None = None) -> SavedResult:
    """The result that `text` means: a file, or the newest of a run, by its folder or name.

    `like` as for `newest_result`. UserError when it means neither.
    """
    path = Path(text)
    if path.is_file():
        return read_result(path)
    if path.is_dir() and (path / EVAL_FOLDER).is_dir():
        return newest_result(path, like)
    if "/" not in text.removesuffix(f"/{FIRST_STAGE}"):
        run_dir = workspace.head_dir(text)
        if (run_dir / EVAL_FOLDER).is_dir():
            return newest_result(run_dir, like)
    known = ", ".join(path.name for path in evaluated_runs(workspace)) or "none"
    raise UserError(
        f"{text!r} is neither a result file nor a run with results (with results are: {known}): "
        "`mote-cli eval` makes them"
    )


def differences(a: SavedResult, b: SavedResult) -> list[Difference]:
    """The fields in which two results differ or of which one says nothing, group by group."""
    others = (a.values.keys() | b.values.keys()) - FIELDS.keys() - _NO_FIELDS
    fields = {**FIELDS, **dict.fromkeys(sorted(others), ("other", False))}
    found: list[Difference] = []
    for name, (group, decisive) in fields.items():
        (knows_a, of_a), (knows_b, of_b) = a.field(name), b.field(name)
        if knows_a and knows_b:
            found += [
                Difference(label, group, one, other, decisive, False)
                for label, one, other in _unequal(name, of_a, of_b)
            ]
        else:
            shown = [_text(v) if knows else _UNKNOWN for knows, v in ((knows_a, of_a),
                     (knows_b, of_b))]  # fmt: skip
            found.append(Difference(name, group, shown[0], shown[1], decisive, True))
    return sorted(found, key=lambda difference: GROUPS.index(difference.group))


def compare(a: SavedResult, b: SavedResult) -> Comparison:
    """What two results differ in, and then their numbers.

    Numbers are compared on test sets of the same name, and the means over all test sets where
    there are several or they have other names.
    """
    one, other = a.splits, b.splits
    numbers = []
    for name in one.keys() & other.keys():
        numbers += _numbers(name, one[name], other[name], ("top1", "top5"))
    numbers.sort(key=lambda number: (list(one).index(number.split), number.measure))
    if one.keys() != other.keys() or len(one) > 1:
        numbers += _numbers(ALL_SETS, a.values, b.values, ("top1", "top5"))
    same_list = a.field("list_hash") == b.field("list_hash") and a.field("list_hash")[0]
    return Comparison(
        a=a.path,
        b=b.path,
        differences=tuple(differences(a, b)),
        numbers=tuple(numbers),
        only_a=tuple(name for name in one if name not in other),
        only_b=tuple(name for name in other if name not in one),
        paired=tuple(paired_outcomes(a.path, b.path)) if same_list else (),
    )


def _numbers(
    split: str, a: Mapping[str, Any], b: Mapping[str, Any], measures: tuple[str, ...]
) -> list[Number]:
    return [
        Number(split, name, float(a[name]), float(b[name]), float(b[name]) - float(a[name]))
        for name in measures
        if _is_number(a.get(name)) and _is_number(b.get(name))
    ]


def _unequal(name: str, a: Any, b: Any) -> list[tuple[str, str, str]]:
    """(label, value of A, value of B) where two known values differ; of objects the entries."""
    if a == b:
        return []
    if isinstance(a, dict) and isinstance(b, dict):
        if name == "splits" and not a.keys() & b.keys():
            return [(name, _text(", ".join(a)), _text(", ".join(b)))]
        keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
        return [(f"{name} {key}", _text(a.get(key)), _text(b.get(key))) for key in keys]
    return [(name, _text(a), _text(b))]


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
