"""Composite scores of a head, and its newest results collected into one row.

Known classes against new ones: the harmonic mean of zero-shot sets, and the trade-off score, the
harmonic mean of it and the close-set top-1 (MoTE, Zhu et al., NeurIPS 2024, table 4). Both are
computed from unrounded accuracies and rounded once, when they are printed.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from featstore.errors import UserError, WorkError
from heads.evaluation.comparing.compare import SavedResult, differences, saved_results
from heads.evaluation.protocols.choose import PROTOCOLS
from heads.files.run_files import read_config
from heads.methods.registry import MEAN_OF_FRAMES
from pipeline.annotations.known_sets import known_dataset

log = logging.getLogger(__name__)

Role = Literal["closeset", "zeroshot"]

PAPER_CLOSESET: Final = "k400"
PAPER_ZEROSHOT: Final = ("ucf101", "hmdb51", "k600")
# Fields in which all results of a row must agree: otherwise they are not of one model.
_OF_ONE_HEAD: Final = ("head_fingerprint", "encoder_fingerprint", "blend")
# Settings of the score that a sweep varies, with their usual values (MoTE's).
_USUAL: Final[Mapping[str, Any]] = {
    "modulation_neighbours": 5,
    "modulation_temperature": 0.05,
    "ensemble": None,
}


def harmonic_mean(accuracies: Sequence[float]) -> float:
    """n / (1/a_1 + ... + 1/a_n) of accuracies in percent; 0 when one of them is 0.

    Raises UserError when there is none, or when one is no percentage.
    """
    if not accuracies or not all(0 <= accuracy <= 100 for accuracy in accuracies):
        raise UserError(
            f"the harmonic mean of {list(accuracies)} is not defined: it takes accuracies in "
            "percent, from 0 to 100"
        )
    return float(statistics.harmonic_mean(accuracies))


@dataclass(frozen=True, order=True)
class Setting:
    """How scores were computed from a head's features; a head has a row for each setting."""

    modulated: bool
    changes: tuple[str, ...]
    """What is not as usual, such as "temperature 0.1": sweeps leave such results."""

    @classmethod
    def of(cls, result: SavedResult, prompts: str | None = None) -> Setting:
        """The setting of a result; a field that an old file lacks could not be chosen then.

        `prompts` is the head's own prompt set, if it is known.
        """
        changes = [
            f"{name.removeprefix('modulation_')} {result.values[name]:g}"
            for name, usual in _USUAL.items()
            if result.values.get(name) not in (None, usual)
        ]
        known = PROTOCOLS.get(result.protocol_name or result.role)
        fusion = result.values.get("fusion")
        if known is not None and fusion != known.fusion:
            changes.append(f"fusion {fusion}")
        if prompts is not None and result.values.get("prompt_set") not in (None, prompts):
            changes.append(f"prompts {result.values['prompt_set']}")
        return cls(bool(result.values.get("modulate", False)), tuple(changes))

    @property
    def text(self) -> str:
        """In words: "on", "off", "on, temperature 0.1"."""
        return ", ".join(("on" if self.modulated else "off", *self.changes))

    @property
    def options(self) -> str:
        """The options of `mote-cli eval` for it, each with a space before."""
        own = "" if self.modulated else " --no-modulate"
        for change in self.changes:
            own += " --modulation-" if f"modulation_{change.split()[0]}" in _USUAL else " --"
            own += change
        return own


@dataclass(frozen=True)
class TradeoffRow:
    """One head in one setting; accuracies are in percent, unrounded, None without a result."""

    head: str
    setting: Setting
    results: tuple[SavedResult | None, ...]
    """The close-set result, then one per zero-shot set, in the order of the request."""

    @property
    def found(self) -> list[SavedResult]:
        """The results that are there."""
        return [result for result in self.results if result is not None]

    @property
    def complete(self) -> bool:
        """Whether every result is there."""
        return None not in self.results

    @property
    def top1(self) -> list[float | None]:
        """Top-1 of each of `results`."""
        return [None if result is None else result.top1 for result in self.results]

    @property
    def zeroshot_top1(self) -> float | None:
        """Harmonic mean of the zero-shot sets' top-1."""
        return _mean_of_known(self.top1[1:])

    @property
    def score(self) -> float | None:
        """The trade-off score."""
        return _mean_of_known([self.top1[0], self.zeroshot_top1])

    def to_json(self) -> dict[str, Any]:
        """The numbers, and the files they are from, as strict JSON values."""
        closeset, *zeroshot = self.results
        return {
            "head": self.head,
            "modulated": self.setting.modulated,
            "setting": self.setting.text,
            "closeset_top1": self.top1[0],
            "closeset_file": None if closeset is None else str(closeset.path),
            "zeroshot": {
                result.dataset: {"top1": result.top1, "file": str(result.path)}
                for result in zeroshot
                if result is not None
            },
            "zeroshot_top1": self.zeroshot_top1,
            "tradeoff": self.score,
        }


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    """The harmonic mean; None when one of the values is."""
    known = [value for value in values if value is not None]
    return harmonic_mean(known) if len(known) == len(values) else None


@dataclass(frozen=True)
class Tradeoff:
    """The table: a row per head and setting, and the commands that fill its gaps."""

    closeset: str
    zeroshot: tuple[str, ...]
    rows: tuple[TradeoffRow, ...]
    missing: tuple[str, ...]
    """A line per missing result, with the command that makes it."""
    mixed: tuple[str, ...]
    """A line per protocol field in which heads differ in one column, if that was allowed."""
    unknown: tuple[str, ...]
    """A line per column in which some results lack protocol fields."""

    def to_json(self) -> dict[str, Any]:
        """The table as strict JSON values."""
        return {**vars(self), "rows": [row.to_json() for row in self.rows]}


def collect(
    runs: Sequence[Path],
    *,
    closeset: str | None = None,
    zeroshot: Sequence[str] = (),
    allow_mixed: bool = False,
) -> Tradeoff:
    """The newest results under `eval/` of the run folders, one row per head and setting.

    `closeset` and `zeroshot` name data sets or protocols (docs/protocols.md); by default those of
    the paper if there are results on them, else every data set with results. Raises UserError
    when a column would mix protocols and `allow_mixed` is off (it names the fields), when
    results of one row are of different weights, or when no row is complete.
    """
    found = {run.name: _results_of_new_videos(run) for run in runs}
    prompts = {run.name: own_prompts(run, found[run.name]) for run in runs}
    close = closeset or _default_closeset(_datasets(found, "closeset"))
    known = _datasets(found, "zeroshot")
    usual = PAPER_ZEROSHOT if set(PAPER_ZEROSHOT) & set(known) or not known else tuple(known)
    zero = tuple(zeroshot) or usual
    repeated = [name for name in zero if zero.count(name) > 1]
    if repeated:
        raise UserError(f"zero-shot set {repeated[0]!r} is named twice: name each once")
    wanted: list[tuple[Role, str]] = [("closeset", close), *(("zeroshot", name) for name in zero)]
    rows: list[TradeoffRow] = []
    missing: list[str] = []
    for head, results in found.items():
        by_setting: dict[Setting, list[SavedResult]] = {}
        for result in results:
            by_setting.setdefault(Setting.of(result, prompts[head]), []).append(result)
        made = [
            TradeoffRow(
                head,
                setting,
                tuple(
                    next((r for r in by_setting.get(setting, []) if _is(r, role, name)), None)
                    for role, name in wanted
                ),
            )
            for setting in sorted(by_setting) or [Setting(False, ())]
        ]
        # A sweep leaves settings that were measured on one set only: they are no gaps to fill.
        begun = [row for row in made if row.found and (row.complete or not row.setting.changes)]
        for row in begun or made[-1:]:
            if row.complete:
                _require_one_head(row)
            rows.append(row)
            missing += _missing(row, wanted)
    complete = [row for row in rows if row.complete]
    if not complete:
        raise UserError(
            "no head has a result on every set: " + "; ".join(missing[:6])
            if missing
            else "there is no head with results: train one and evaluate it with mote-cli eval"
        )
    mixed, unsure = _mixed(complete)
    if mixed and not allow_mixed:
        raise UserError(
            f"the results are not of one protocol: {'; '.join(mixed)}: evaluate the heads alike, "
            "name those that were, or show them together with --allow-mixed"
        )
    return Tradeoff(close, zero, tuple(rows), tuple(missing), tuple(mixed), tuple(unsure))


def _results_of_new_videos(run: Path) -> list[SavedResult]:
    """The results of a run, newest first; those on its training videos are logged and left out."""
    fair = []
    for result in saved_results(run):
        if seen := result.values.get("n_trained_on"):
            log.warning(
                "passed over: %s is of %s videos that its head was trained on", result.path, seen
            )
        else:
            fair.append(result)
    return sorted(fair, key=lambda result: result.time_ns, reverse=True)


def is_scored(run: Path) -> bool:
    """Whether a run has results of other protocols than those that train a head for themselves."""
    return any(result.role not in ("fewshot", "base-to-novel") for result in saved_results(run))


def own_prompts(run: Path, results: Sequence[SavedResult]) -> str | None:
    """The prompt set of a run's training; if it is not known, the one that most results have."""
    try:
        own = (read_config(run) or {})["data"]["prompt_set"]
    except (WorkError, OSError, KeyError, TypeError):
        own = None
    if isinstance(own, str):
        return own
    named = [str(r.values["prompt_set"]) for r in results if r.values.get("prompt_set")]
    return max(sorted(set(named)), key=named.count, default=None)


def _is(result: SavedResult, role: Role, name: str) -> bool:
    if result.protocol_name == name:  # a protocol that is named may be half-class
        return (result.role == "closeset") == (role == "closeset")
    return result.role == role and known_dataset(name) == known_dataset(result.dataset)


def _default_closeset(names: Sequence[str]) -> str:
    if PAPER_CLOSESET in names or not names:
        return PAPER_CLOSESET
    if len(names) > 1:
        raise UserError(
            f"there are close-set results on {', '.join(names)}: choose one with --closeset"
        )
    return names[0]


def _datasets(found: Mapping[str, Sequence[SavedResult]], role: Role) -> list[str]:
    return sorted({r.dataset for results in found.values() for r in results if r.role == role})


def _missing(row: TradeoffRow, wanted: Sequence[tuple[Role, str]]) -> list[str]:
    chosen = "" if row.head == MEAN_OF_FRAMES else row.setting.options
    return [
        f"{row.head} has no {role} result on {name}: `mote-cli eval "
        f"{'--protocol' if name in PROTOCOLS else f'--{role}'} {name} --head {row.head}{chosen}`"
        for (role, name), result in zip(wanted, row.results, strict=True)
        if result is None
    ]


def _require_one_head(row: TradeoffRow) -> None:
    """UserError unless the results of a row are of the same weights."""
    first, *others = row.found
    for result, name in itertools.product(others, _OF_ONE_HEAD):
        one, other = first.values.get(name), result.values.get(name)
        if name in first.values and name in result.values and one != other:
            raise UserError(
                f"{row.head}: {name} of {first.path.name} is {one}, of {result.path.name} it is "
                f"{other}: the two are not of one model; evaluate both again"
            )


def _mixed(rows: Sequence[TradeoffRow]) -> tuple[list[str], list[str]]:
    """(a line per field in which two heads differ in one column, one per column with unknowns)."""
    mixed: dict[str, None] = {}
    unsure: dict[str, dict[str, None]] = {}
    for row, other in itertools.combinations(rows, 2):
        for one, two in zip(row.found, other.found, strict=True):
            for found in differences(one, two):
                if found.decisive and found.unknown:
                    unsure.setdefault(one.dataset, {})[found.name] = None
                elif found.decisive:
                    mixed[
                        f"on {one.dataset}, {found.name} is {found.of_a} for {row.head} and "
                        f"{found.of_b} for {other.head}"
                    ] = None
    lines = [f"on {name}, not every result says {', '.join(of)}" for name, of in unsure.items()]
    return list(mixed), lines
