"""Composite scores of a head, and its newest results collected into one row.

Known classes against new ones: the harmonic mean of zero-shot sets, and the trade-off score, the
harmonic mean of close-set top-1 and that (MoTE, Zhu et al., NeurIPS 2024, table 4). Both are
computed from unrounded accuracies; whoever prints rounds once.
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
from heads.evaluation.protocols.choose import PROTOCOLS, known_dataset
from heads.files.run_files import read_config
from heads.methods.registry import MEAN_OF_FRAMES

log = logging.getLogger(__name__)

Role = Literal["closeset", "zeroshot"]

PAPER_CLOSESET: Final = "k400"
PAPER_ZEROSHOT: Final = ("ucf101", "hmdb51", "k600")
# What one head must have in common over its columns: else they are not of one model.
_OF_ONE_HEAD: Final = ("head_fingerprint", "encoder_fingerprint", "blend")
# Settings of the score that a sweep varies, with their usual values (MoTE's).
_USUAL: Final[Mapping[str, Any]] = {
    "modulation_neighbours": 5,
    "modulation_temperature": 0.05,
    "ensemble": None,
}


def harmonic_mean(accuracies: Sequence[float]) -> float:
    """n / (1/a_1 + ... + 1/a_n) of accuracies in percent; 0 when one of them is 0.

    Raises UserError when there is none, or one is no percentage.
    """
    if not accuracies or not all(0 <= accuracy <= 100 for accuracy in accuracies):
        raise UserError(
            f"the harmonic mean of {list(accuracies)} is not defined: it takes accuracies in "
            "percent, from 0 to 100"
        )
    return float(statistics.harmonic_mean(accuracies))


@dataclass(frozen=True, order=True)
class Setting:
    """How scores were made of a head's features; a head has a row for each."""

    modulated: bool
    changes: tuple[str, ...]
    """What is not as usual, "temperature 0.1": sweeps leave such results."""

    @classmethod
    def of(cls, result: SavedResult, prompts: str | None = None) -> Setting:
        """That of a result; what its file does not say was not to be chosen when it was written.

        `prompts` is the head's own prompt set, where it is known.
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
        return cls(result.modulated, tuple(changes))

    @property
    def text(self) -> str:
        """ "on", "off", "on, temperature 0.1"."""
        return ", ".join(("on" if self.modulated else "off", *self.changes))

    @property
    def options(self) -> str:
        """What `mote-cli eval` takes for it, with a space before."""
        own = "" if self.modulated else " --no-modulate"
        names = {"neighbours": "modulation-neighbours", "temperature": "modulation-temperature"}
        for change in self.changes:
            name, value = change.split()
            own += f" --{names.get(name, name)} {value}"
        return own


@dataclass(frozen=True)
class TradeoffRow:
    """One head in one setting; percent, unrounded, None where a result is missing."""

    head: str
    setting: Setting
    closeset: SavedResult | None
    zeroshot: tuple[SavedResult | None, ...]
    """In the order of the zero-shot sets asked for."""

    @property
    def modulated(self) -> bool:
        """Whether the head was modulated."""
        return self.setting.modulated

    @property
    def complete(self) -> bool:
        """Whether every result is there."""
        return self.closeset is not None and None not in self.zeroshot

    @property
    def begun(self) -> bool:
        """Whether any result is there."""
        return self.closeset is not None or any(result is not None for result in self.zeroshot)

    @property
    def closeset_top1(self) -> float | None:
        """Close-set top-1."""
        return None if self.closeset is None else self.closeset.top1

    @property
    def zeroshot_top1(self) -> float | None:
        """Harmonic mean of the zero-shot sets' top-1."""
        values = [result.top1 for result in self.zeroshot if result is not None]
        return harmonic_mean(values) if len(values) == len(self.zeroshot) else None

    @property
    def score(self) -> float | None:
        """The trade-off score."""
        closeset, zeroshot = self.closeset_top1, self.zeroshot_top1
        return None if closeset is None or zeroshot is None else harmonic_mean([closeset, zeroshot])

    def to_json(self) -> dict[str, Any]:
        """The numbers, and the files they are from, as strict JSON values."""
        found = {
            result.dataset: {"top1": result.top1, "file": str(result.path)}
            for result in self.zeroshot
            if result is not None
        }
        return {
            "head": self.head,
            "modulated": self.modulated,
            "setting": self.setting.text,
            "closeset_top1": self.closeset_top1,
            "closeset_file": None if self.closeset is None else str(self.closeset.path),
            "zeroshot": found,
            "zeroshot_top1": self.zeroshot_top1,
            "tradeoff": self.score,
        }


@dataclass(frozen=True)
class Tradeoff:
    """The table: a row per head and setting, and what it takes to fill the gaps."""

    closeset: str
    zeroshot: tuple[str, ...]
    rows: tuple[TradeoffRow, ...]
    missing: tuple[str, ...]
    """A line per result that is not there, with the command that makes it."""
    mixed: tuple[str, ...]
    """A line per protocol field in which heads differ in one column, where that was allowed."""
    unknown: tuple[str, ...]
    """A line per column whose results do not all say how they came about."""

    def to_json(self) -> dict[str, Any]:
        """The table as strict JSON values."""
        return {
            "closeset": self.closeset,
            "zeroshot": list(self.zeroshot),
            "rows": [row.to_json() for row in self.rows],
            "missing": list(self.missing),
            "mixed": list(self.mixed),
            "unknown": list(self.unknown),
        }


def collect(
    runs: Sequence[Path],
    *,
    closeset: str | None = None,
    zeroshot: Sequence[str] = (),
    allow_mixed: bool = False,
) -> Tradeoff:
    """The newest results under `eval/` of the run folders, one row per head and setting.

    `closeset` and `zeroshot` name data sets or protocols (docs/protocols.md); by default those of
    the paper where there are results on them, else every data set with results. Raises UserError
    when a column would mix protocols and `allow_mixed` is off (the fields are named), when
    results of one row are of different weights, or when no row is complete.
    """
    found = {run.name: _newest(_of_new_videos(saved_results(run))) for run in runs}
    prompts = {run.name: own_prompts(run, found[run.name]) for run in runs}
    close = closeset or _default_closeset(found)
    zero = tuple(zeroshot) or _default_zeroshot(found)
    repeated = [name for name in zero if zero.count(name) > 1]
    if repeated:
        raise UserError(f"zero-shot set {repeated[0]!r} is named twice: name each once")
    rows: list[TradeoffRow] = []
    missing: list[str] = []
    for head, results in found.items():
        by_setting: dict[Setting, list[SavedResult]] = {}
        for result in results:
            by_setting.setdefault(Setting.of(result, prompts[head]), []).append(result)
        made = [
            _row(head, setting, by_setting.get(setting, []), close, zero)
            for setting in sorted(by_setting) or [Setting(False, ())]
        ]
        # A sweep leaves settings that were measured on one set only, and nobody asked for more.
        begun = [row for row in made if row.begun and (row.complete or not row.setting.changes)]
        for row in begun or made[-1:]:
            if row.complete:
                _require_one_head(row)
            rows.append(row)
            missing += _missing(row, close, zero)
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


def _of_new_videos(results: Sequence[SavedResult]) -> list[SavedResult]:
    """Results without those that `eval --allow-overlap` left of training videos; they are told."""
    fair = []
    for result in results:
        seen = result.values.get("n_trained_on")
        if seen:
            log.warning(
                "passed over: %s is of %s videos that its head was trained on", result.path, seen
            )
        else:
            fair.append(result)
    return fair


def is_scored(run: Path) -> bool:
    """Whether a run has results that a table may hold: others than of what was trained for them."""
    return any(result.role not in ("fewshot", "base-to-novel") for result in saved_results(run))


def own_prompts(run: Path, results: Sequence[SavedResult]) -> str | None:
    """The prompt set of a run's training; of a run that does not say, that of most results."""
    try:
        own = (read_config(run) or {})["data"]["prompt_set"]
    except (WorkError, OSError, KeyError, TypeError):
        own = None
    if isinstance(own, str):
        return own
    named = [str(r.values["prompt_set"]) for r in results if r.values.get("prompt_set")]
    return max(sorted(set(named)), key=named.count, default=None)


def _newest(results: Sequence[SavedResult]) -> list[SavedResult]:
    return sorted(results, key=lambda result: result.time_ns, reverse=True)


def _row(
    head: str,
    setting: Setting,
    results: Sequence[SavedResult],
    closeset: str,
    zeroshot: Sequence[str],
) -> TradeoffRow:
    def newest(role: Role, name: str) -> SavedResult | None:
        return next((result for result in results if _is(result, role, name)), None)

    return TradeoffRow(
        head,
        setting,
        newest("closeset", closeset),
        tuple(newest("zeroshot", name) for name in zeroshot),
    )


def _is(result: SavedResult, role: Role, name: str) -> bool:
    if result.protocol_name == name:  # one that is named may be half-class too
        return (result.role == "closeset") == (role == "closeset")
    return result.role == role and known_dataset(name) == known_dataset(result.dataset)


def _default_closeset(found: Mapping[str, Sequence[SavedResult]]) -> str:
    names = _datasets(found, "closeset")
    if PAPER_CLOSESET in names or not names:
        return PAPER_CLOSESET
    if len(names) > 1:
        raise UserError(
            f"there are close-set results on {', '.join(names)}: choose one with --closeset"
        )
    return names[0]


def _default_zeroshot(found: Mapping[str, Sequence[SavedResult]]) -> tuple[str, ...]:
    names = _datasets(found, "zeroshot")
    return PAPER_ZEROSHOT if set(PAPER_ZEROSHOT) & set(names) or not names else tuple(names)


def _datasets(found: Mapping[str, Sequence[SavedResult]], role: Role) -> list[str]:
    return sorted({r.dataset for results in found.values() for r in results if r.role == role})


def _missing(row: TradeoffRow, closeset: str, zeroshot: Sequence[str]) -> list[str]:
    wanted = [("closeset", closeset, row.closeset)]
    wanted += [
        ("zeroshot", name, result) for name, result in zip(zeroshot, row.zeroshot, strict=True)
    ]
    chosen = "" if row.head == MEAN_OF_FRAMES else row.setting.options
    return [
        f"{row.head} has no {role} result on {name}: `mote-cli eval "
        f"{'--protocol' if name in PROTOCOLS else f'--{role}'} {name} --head {row.head}{chosen}`"
        for role, name, result in wanted
        if result is None
    ]


def _require_one_head(row: TradeoffRow) -> None:
    """The results of a row must be of the same weights; a head trained anew has old results."""
    assert row.closeset is not None
    for result in row.zeroshot:
        assert result is not None
        for name in _OF_ONE_HEAD:
            one, other = row.closeset.values.get(name), result.values.get(name)
            if name in row.closeset.values and name in result.values and one != other:
                raise UserError(
                    f"{row.head}: {name} of {row.closeset.path.name} is {one}, of "
                    f"{result.path.name} it is {other}: the two are not of one model; evaluate "
                    "both again"
                )


def _mixed(rows: Sequence[TradeoffRow]) -> tuple[list[str], list[str]]:
    """(lines for fields that differ between heads in one column, for those that one lacks)."""
    mixed: dict[str, None] = {}
    unsure: dict[str, dict[str, None]] = {}
    for row, other in itertools.combinations(rows, 2):
        columns = zip((row.closeset, *row.zeroshot), (other.closeset, *other.zeroshot), strict=True)
        for one, two in columns:
            assert one is not None
            assert two is not None
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
