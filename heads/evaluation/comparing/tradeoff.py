"""Computes composite scores of heads from their newest results, one row per head and setting.

The scores weigh known classes against new ones: the harmonic mean of the top-1 on zero-shot sets,
and the trade-off score, the harmonic mean of that and the close-set top-1 (MoTE, Zhu et al.,
NeurIPS 2024, table 4). Both use unrounded accuracies and are rounded once, when they are printed.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from featstore.errors import UserError, WorkError
from heads.evaluation.comparing.baseline import baselines
from heads.evaluation.comparing.compare import SavedResult, differences, saved_results
from heads.evaluation.comparing.tradeoff_rows import Role, Setting, TradeoffRow, eval_option, is_of
from heads.evaluation.comparing.tradeoff_rows import harmonic_mean as harmonic_mean
from heads.files.run_files import read_config
from heads.methods.registry import MEAN_OF_FRAMES

log = logging.getLogger(__name__)

PAPER_CLOSESET: Final = "k400"
PAPER_ZEROSHOT: Final = ("ucf101", "hmdb51", "k600")
# Fields in which all results of a row must agree; otherwise they come from different models.
_OF_ONE_HEAD: Final = ("head_fingerprint", "encoder_fingerprint", "blend")


@dataclass(frozen=True)
class Tradeoff:
    """The table: one row per head and setting, and the commands that fill its gaps."""

    closeset: str
    zeroshot: tuple[str, ...]
    rows: tuple[TradeoffRow, ...]
    missing: tuple[str, ...]
    """One line per missing result, with the command that makes it, if a command can."""
    mixed: tuple[str, ...]
    """One line per protocol field in which heads of one column differ, if that was allowed."""
    unknown: tuple[str, ...]
    """One line per column in which some results lack protocol fields."""
    baselines: tuple[TradeoffRow, ...] = ()
    """CLIP's mean of the same frames, without modulation and ensemble: one row, or one for each
    choice of stores and frames among the heads. Some of their results may be missing."""

    def to_json(self) -> dict[str, Any]:
        """Return the table as strict JSON values."""
        tables = {"rows": self.rows, "baselines": self.baselines}
        listed = {name: [row.to_json() for row in rows] for name, rows in tables.items()}
        return {**vars(self), **listed}


def collect(
    runs: Sequence[Path],
    *,
    closeset: str | None = None,
    zeroshot: Sequence[str] = (),
    held: Sequence[str] = (),
    allow_mixed: bool = False,
    baseline: Path | None = None,
    root_option: str = "",
) -> Tradeoff:
    """Collect the newest results under `eval/` of the run folders, one row per head and setting.

    `closeset` and `zeroshot` name data sets or protocols (docs/protocols.md); the defaults are the
    data sets of the paper if there are results on them, else every data set with results. Where
    there are none, they are the data set that the runs were trained on, and the others that the
    workspace has, `held`.
    `baseline` is the folder of the results of CLIP's mean of frames, which get rows of their own
    beside the heads'. `root_option` is what commands need to find the workspace, " --root DIR".
    Raises UserError when a column would mix protocols and `allow_mixed` is off (the error names
    the fields), when the results of one row have different weights, or when no row is complete.
    """
    found = {run.name: _results_of_new_videos(run) for run in runs}
    prompts = {run.name: own_prompts(run, found[run.name]) for run in runs}
    trained = sorted({name for run in runs if (name := _of_training(run, "dataset")) is not None})
    close = closeset or _default_closeset(_datasets(found, "closeset"), trained)
    known = _datasets(found, "zeroshot")
    zero = tuple(zeroshot) or _usual_zeroshot(known, [name for name in held if name != close])
    if runs and not zero:
        raise UserError(
            f"nothing here has other classes than {close}: name a data set or a protocol of new "
            "classes with --zeroshot, or pack and extract one"
        )
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
                    next((r for r in by_setting.get(setting, []) if is_of(r, role, name)), None)
                    for role, name in wanted
                ),
            )
            for setting in sorted(by_setting) or [Setting(False, ())]
        ]
        if head == MEAN_OF_FRAMES and baseline is not None and len(found) > 1:
            made = [row for row in made if row.setting.changes and row.complete]  # see `baselines`
        # After a sweep, some settings were measured on one set only; these are not gaps to fill.
        begun = [row for row in made if row.found and (row.complete or not row.setting.changes)]
        for row in begun or made[-1:]:
            if row.complete:
                _require_one_head(row)
            rows.append(row)
            missing += _missing(row, wanted, root_option)
    beside: list[TradeoffRow] = []
    without: list[str] = []
    if baseline is not None and any(row.found and row.head != MEAN_OF_FRAMES for row in rows):
        means = found.get(MEAN_OF_FRAMES) or _results_of_new_videos(baseline)
        beside, without = baselines([row for row in rows if row.found], wanted, means, root_option)
    complete = [row for row in (*beside, *rows) if row.complete]
    if not complete:
        raise UserError(
            "no head has a result on every set: " + "; ".join(missing[:6])
            if missing
            else "no head has results: train a head and evaluate it with mote-cli eval"
        )
    mixed, unsure = _mixed([row for row in rows if row.complete or row.closed])
    if mixed and not allow_mixed:
        raise UserError(
            f"the results are not of one protocol: {'; '.join(mixed)}: evaluate all heads in the "
            "same way, name only heads that were, or pass --allow-mixed to show them together"
        )
    lines = (tuple(missing + without), tuple(mixed), tuple(unsure))
    return Tradeoff(close, zero, tuple(rows), *lines, tuple(beside))


def _results_of_new_videos(run: Path) -> list[SavedResult]:
    """Return the results of a run, newest first.

    Results on the run's own training videos are logged and left out.
    """
    fair = []
    for result in saved_results(run):
        seen = result.values.get("n_trained_on") or 0
        # Copies under other keys were said when they were measured; nobody tests them on purpose.
        if seen > (result.values.get("n_copied") or 0):
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
    own = _of_training(run, "prompt_set")
    if own is not None:
        return own
    named = [str(r.values["prompt_set"]) for r in results if r.values.get("prompt_set")]
    return max(sorted(set(named)), key=named.count, default=None)


def _of_training(run: Path, name: str) -> str | None:
    """Return what a run's config.json says of its training data; None if it does not say it."""
    try:
        own = (read_config(run) or {})["data"][name]
    except (WorkError, OSError, KeyError, TypeError):
        return None
    return own if isinstance(own, str) else None


def _usual_zeroshot(known: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """Return the zero-shot sets that are meant: the paper's, where any is among the sets at hand.

    `known` have results; where none has, those that do count, which are `others`.
    """
    papers = tuple(name for name in PAPER_ZEROSHOT if name in {*known, *others})
    at_hand = tuple(known or others)
    return papers if set(papers) & set(at_hand) else at_hand


def _default_closeset(tested: Sequence[str], trained: Sequence[str]) -> str:
    """Return the close-set that is meant: of those with results, else of those trained on."""
    names = tested or trained
    if PAPER_CLOSESET in names or not names:
        return PAPER_CLOSESET
    if len(names) > 1:
        what = "there are close-set results on" if tested else "the heads were trained on"
        raise UserError(f"{what} {', '.join(names)}: choose one with --closeset")
    return names[0]


def _datasets(found: Mapping[str, Sequence[SavedResult]], role: Role) -> list[str]:
    return sorted({r.dataset for results in found.values() for r in results if r.role == role})


def _missing(row: TradeoffRow, wanted: Sequence[tuple[Role, str]], root_option: str) -> list[str]:
    chosen = "" if row.head == MEAN_OF_FRAMES else row.setting.options
    lacking = [w for w, result in zip(wanted, row.results, strict=True) if result is None]
    lines = []
    if row.closed and any(role == "zeroshot" for role, _ in lacking):
        lines = [f"{row.head} knows only its own classes: it has no zero-shot result"]
        lacking = [w for w in lacking if w[0] != "zeroshot"]
    for role, name in lacking:
        command = f"mote-cli eval {eval_option(role, name)} --head {row.head}{chosen}{root_option}"
        lines.append(f"{row.head} has no {role} result on {name}: `{command}`")
    return lines


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
        for one, two in zip(row.results, other.results, strict=True):
            if one is None or two is None:
                continue
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
