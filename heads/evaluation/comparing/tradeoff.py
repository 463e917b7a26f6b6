"""Computes composite scores of heads from their newest results, one row per head and setting.

The scores weigh known classes against new ones: the harmonic mean of the top-1 on zero-shot sets,
and the trade-off score, the harmonic mean of that and the close-set top-1 (MoTE, Zhu et al.,
NeurIPS 2024, table 4). Both use unrounded accuracies and are rounded once, when they are printed.
"""

from __future__ import annotations

import itertools
import logging
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from featstore.commands import command
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
# Fields in which all results of a row must agree; otherwise they come from different models.
_OF_ONE_HEAD: Final = ("head_fingerprint", "encoder_fingerprint", "blend")
# The score settings that a sweep varies, with their usual values (MoTE's).
_USUAL: Final[Mapping[str, Any]] = {
    "modulation_neighbours": 5,
    "modulation_temperature": 0.05,
    "ensemble": None,
}


def harmonic_mean(accuracies: Sequence[float]) -> float:
    """Return n / (1/a_1 + ... + 1/a_n) of accuracies in percent; 0 when one of them is 0.

    Raises UserError when there are no accuracies, or when one is not a percentage.
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
    """The settings that differ from the usual ones, such as "temperature 0.1", as in a sweep."""

    @classmethod
    def of(cls, result: SavedResult, prompts: str | None = None) -> Setting:
        """Return the setting of a result; `prompts` is the head's own prompt set, if known.

        A field that an old file lacks counts as usual: it could not be chosen at that time.
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
        """The setting in words: "on", "off" or "on, temperature 0.1"."""
        return ", ".join(("on" if self.modulated else "off", *self.changes))

    @property
    def options(self) -> str:
        """The options of `mote-cli eval` for the setting, each with a space before it."""
        own = "" if self.modulated else " --no-modulate"
        for change in self.changes:
            own += " --modulation-" if f"modulation_{change.split()[0]}" in _USUAL else " --"
            own += change
        return own


@dataclass(frozen=True)
class TradeoffRow:
    """One head in one setting; accuracies are in percent, unrounded, and None without a result."""

    head: str
    setting: Setting
    results: tuple[SavedResult | None, ...]
    """The close-set result, then one per zero-shot set, in the order of the request."""

    @property
    def found(self) -> list[SavedResult]:
        """The results that exist."""
        return [result for result in self.results if result is not None]

    @property
    def complete(self) -> bool:
        """Whether every result exists."""
        return None not in self.results

    @property
    def top1(self) -> list[float | None]:
        """Top-1 of each of `results`."""
        return [None if result is None else result.top1 for result in self.results]

    @property
    def zeroshot_top1(self) -> float | None:
        """The harmonic mean of the top-1 on the zero-shot sets; None if one is missing."""
        return _mean_of_known(self.top1[1:])

    @property
    def score(self) -> float | None:
        """The trade-off score; None if a result is missing."""
        return _mean_of_known([self.top1[0], self.zeroshot_top1])

    def to_json(self) -> dict[str, Any]:
        """Return the numbers, and the files that they come from, as strict JSON values."""
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
    """Return the harmonic mean of the values; None when one of them is None."""
    known = [value for value in values if value is not None]
    return harmonic_mean(known) if len(known) == len(values) else None


@dataclass(frozen=True)
class Tradeoff:
    """The table: one row per head and setting, and the commands that fill its gaps."""

    closeset: str
    zeroshot: tuple[str, ...]
    rows: tuple[TradeoffRow, ...]
    missing: tuple[str, ...]
    """One line per missing result, with the command that makes it."""
    mixed: tuple[str, ...]
    """One line per protocol field in which heads of one column differ, if that was allowed."""
    unknown: tuple[str, ...]
    """One line per column in which some results lack protocol fields."""

    def to_json(self) -> dict[str, Any]:
        """Return the table as strict JSON values."""
        return {**vars(self), "rows": [row.to_json() for row in self.rows]}


def collect(
    runs: Sequence[Path],
    *,
    closeset: str | None = None,
    zeroshot: Sequence[str] = (),
    allow_mixed: bool = False,
) -> Tradeoff:
    """Collect the newest results under `eval/` of the run folders, one row per head and setting.

    `closeset` and `zeroshot` name data sets or protocols (docs/protocols.md); the defaults are the
    data sets of the paper if there are results on them, else every data set with results. Raises
    UserError when a column would mix protocols and `allow_mixed` is off (the error names the
    fields), when the results of one row have different weights, or when no row is complete.
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
    root = runs[0].parent.parent if runs and runs[0].parent.name == "heads" else None
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
        # After a sweep, some settings were measured on one set only; these are not gaps to fill.
        begun = [row for row in made if row.found and (row.complete or not row.setting.changes)]
        for row in begun or made[-1:]:
            if row.complete:
                _require_one_head(row)
            rows.append(row)
            missing += _missing(row, wanted, root)
    complete = [row for row in rows if row.complete]
    if not complete:
        raise UserError(
            "no head has a result on every set: " + "; ".join(missing[:6])
            if missing
            else "no head has results: train a head, and evaluate it with the command that is "
            "printed then"
        )
    mixed, unsure = _mixed(complete)
    if mixed and not allow_mixed:
        raise UserError(
            f"the results are not of one protocol: {'; '.join(mixed)}: evaluate all heads in the "
            "same way, name only heads that were, or pass --allow-mixed to show them together"
        )
    return Tradeoff(close, zero, tuple(rows), tuple(missing), tuple(mixed), tuple(unsure))


def _results_of_new_videos(run: Path) -> list[SavedResult]:
    """Return the results of a run, newest first.

    Results on the run's own training videos are logged and left out.
    """
    fair = []
    for result in saved_results(run):
        if seen := result.values.get("n_trained_on"):
            log.warning(
                "skipped: %s tests %s videos that its head was trained on", result.path, seen
            )
        else:
            fair.append(result)
    return sorted(fair, key=lambda result: result.time_ns, reverse=True)


def is_scored(run: Path) -> bool:
    """Whether a run has results of protocols that do not train heads of their own."""
    return any(result.role not in ("fewshot", "base-to-novel") for result in saved_results(run))


def own_prompts(run: Path, results: Sequence[SavedResult]) -> str | None:
    """Return the prompt set a run was trained with; if unknown, the one that most results have."""
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


def _missing(row: TradeoffRow, wanted: Sequence[tuple[Role, str]], root: Path | None) -> list[str]:
    chosen = [] if row.head == MEAN_OF_FRAMES else shlex.split(row.setting.options)
    return [
        f"{row.head} has no {role} result on {name}: `"
        + command(
            *("eval", "--protocol" if name in PROTOCOLS else f"--{role}", name),
            *("--head", row.head, *chosen),
            root=root,
        )
        + "`"
        for (role, name), result in zip(wanted, row.results, strict=True)
        if result is None
    ]


def _require_one_head(row: TradeoffRow) -> None:
    """Raise UserError unless all results of a row come from the same weights."""
    first, *others = row.found
    for result, name in itertools.product(others, _OF_ONE_HEAD):
        one, other = first.values.get(name), result.values.get(name)
        if name in first.values and name in result.values and one != other:
            raise UserError(
                f"{row.head}: {name} is {one} in {first.path.name} and {other} in "
                f"{result.path.name}: they come from different models; evaluate both again"
            )


def _mixed(rows: Sequence[TradeoffRow]) -> tuple[list[str], list[str]]:
    """Return a line per field in which two heads of one column differ, and per unsure column."""
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
