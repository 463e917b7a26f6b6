"""How `mote-cli eval` prints its results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.commands.answers.compare import published_shown
from cli.output import Shown, percent, report, table, warn
from featstore.errors import counted, safe_text

if TYPE_CHECKING:
    from rich.table import Table

    from heads.evaluation.details import ClassSummary
    from heads.evaluation.request import Evaluation
    from heads.evaluation.results import EvalResult
    from heads.evaluation.several_classes import PrecisionSummary
    from heads.evaluation.trained.run import ShotOutcome

_BESIDE = "beside it: .videos.csv (a row a video), .per-class.csv, .confusion.csv and .png"
_BESIDE_SEVERAL = (
    "beside it: .videos.csv (a row a video), .per-class.csv and .png, .scores.npz; no confusions, "
    "for a video may show several classes"
)


def report_evaluation(
    json: bool,
    evaluation: Evaluation,
    files: Sequence[Path | None],
    beside: Mapping[str, Any],
    is_sweep: bool,
) -> None:
    """Report an evaluation, its files, and the published figures `beside` the first result.

    A file is None if it could not be written.
    """
    from heads.evaluation.answers import answer_files
    from heads.evaluation.details import ClassSummary, SplitDetail
    from heads.evaluation.several_classes import SCORES_ENDING, LabelsDetail, PrecisionSummary

    measured = [result for result, _ in evaluation.measured]
    for gap in evaluation.missing:
        remedy = "" if gap["remedy"] in gap["reason"] else f"; {gap['remedy']}"
        what = f"blend {gap['blend']:g} is" if "blend" in gap else f"{gap['weights']} weights are"
        warn(f"{what} not measured: {gap['reason']}{remedy}")
    result = measured[0]
    rows = [
        {**r.to_json(), "file": None if f is None else str(f)}
        for r, f in zip(measured, files, strict=True)
    ]
    kept = files[0]
    title = (
        f"{result.protocol_name} on {result.dataset}, head {result.head}"
        f"{' with modulation' if result.modulate and not is_sweep else ''}, views {result.views}, "
        f"{counted(result.n_classes, 'class', 'classes')}, prompts {result.prompt_set}"
        f"{'' if result.weights is None or is_sweep else f', {result.weights} weights'}"
        f"{'' if result.projection is None or is_sweep else f', projection {result.projection}'}"
    )
    if is_sweep:
        shared = {"protocol_name": result.protocol_name, "dataset": result.dataset}
        sweep = {**shared, "rows": rows, "missing": evaluation.missing}
        where = [f"kept under {kept.parent}"] if kept is not None else []
        report(json, sweep, [_sweep(title, measured), *where])
        return
    answers = {} if kept is None else answer_files(kept)
    named_files = {what: str(file) for what, file in answers.items()}
    several = [part for part in result.details if isinstance(part, LabelsDetail)]
    if several:
        if kept is not None:
            named_files["scores"] = str(kept.with_name(kept.stem + SCORES_ENDING))
        precisions = PrecisionSummary.of(several[0], result.class_names)
        report(
            json,
            {**rows[0], "files": named_files, **precisions.to_json(), **beside},
            [
                table(
                    title,
                    ["split", "listed", "evaluated", "failed", "classes shown", "mAP %"],
                    [
                        [
                            *(p.split, p.n_listed, p.n_evaluated, p.n_failed),
                            *(p.n_classes_shown, percent(p.mean_ap)),
                        ]
                        for p in result.per_split
                    ],
                ),
                *_precisions_shown(precisions),
                *([] if kept is None else [f"kept as {kept}", _BESIDE_SEVERAL]),
            ],
        )
        return
    details = [part for part in result.details if isinstance(part, SplitDetail)]
    summary = ClassSummary.of(details, result.class_names)
    named = {"files": named_files, **summary.to_json()}
    columns = ["split", "listed", "evaluated", "failed", "top-1 %", "top-5 %"]
    parts = [
        [p.split, p.n_listed, p.n_evaluated, p.n_failed, percent(p.top1), percent(p.top5)]
        for p in result.per_split
    ]
    mean = f"mean top-1 {result.mean:.2f}, population std {result.std:.2f}"
    report(
        json,
        {**rows[0], **named, **beside},
        [
            table(title, columns, parts),
            *([mean] if len(parts) > 1 else []),
            *(f"not as published: {note}" for note in result.notes),
            *classes_shown(summary),
            *([] if kept is None else [f"kept as {kept}", _BESIDE]),
            *published_shown(beside),
        ],
    )


def _precisions_shown(summary: PrecisionSummary) -> Iterator[Shown]:
    """Yield the average precision of the best and the worst classes."""
    tested = f"of {summary.classes_tested} classes"
    first = f"best {tested}" if summary.worst_classes else "classes, best first"
    parts = {first: summary.best_classes, f"worst {tested}": summary.worst_classes}
    for title, classes in parts.items():
        if classes:
            rows = [[safe_text(c.name), c.videos, percent(c.ap)] for c in classes]
            yield table("", [title, "videos", "AP %"], rows)


def classes_shown(summary: ClassSummary) -> Iterator[Shown]:
    """Yield the best and the worst classes and the most frequent confusions."""
    tested = f"of {summary.classes_tested} classes"
    first = f"best {tested}" if summary.worst_classes else "classes, best first"
    parts = {first: summary.best_classes, f"worst {tested}": summary.worst_classes}
    for title, classes in parts.items():
        if classes:
            rows = [[safe_text(c.name), c.videos, percent(c.top1)] for c in classes]
            yield table("", [title, "videos", "top-1 %"], rows)
    if summary.confusions:
        yield "most frequent confusions"
    for found in summary.confusions:
        names = f"{safe_text(found.name)} taken for {safe_text(found.taken_for)}"
        yield f"  {names}: {found.times} of {found.videos}"


def _sweep(title: str, measured: list[EvalResult]) -> Table:
    """Make a table with one line per setting, without the columns in which none differ."""
    columns: dict[str, list[Any]] = {
        "blend": [r.blend for r in measured],
        "weights": [r.weights for r in measured],
        "neighbours": [r.modulation_neighbours for r in measured],
        "temperature": [r.modulation_temperature for r in measured],
        "ensemble": [r.ensemble for r in measured],
        "fusion": [r.fusion for r in measured],
        "projection": [r.projection for r in measured],
    }
    varied = {name: values for name, values in columns.items() if len(set(values)) > 1}
    rows = [
        [
            *("-" if v is None else v if isinstance(v, str) else f"{v:g}" for v in shown),
            str(r.n_evaluated),
            f"{r.mean:.2f}",
            "-" if len(r.per_split) < 2 else f"{r.std:.2f}",
            "-" if r.top5 is None else f"{r.top5:.2f}",
        ]
        for r, shown in zip(
            measured,
            zip(*varied.values(), strict=True) if varied else [()] * len(measured),
            strict=True,
        )
    ]
    measure = f"{measured[0].measure or 'top-1'} %"
    return table(title, [*varied, "videos", measure, "std", "top-5 %"], rows)


def fewshot_shown(value: Mapping[str, Any], outcomes: Sequence[ShotOutcome]) -> Iterator[Shown]:
    """Yield a table with one line per number of shots, then the published figures of each."""
    yield table(
        f"few-shot on {value['dataset']}, tested on {outcomes[0].last.per_split[0].split} "
        f"({counted(outcomes[0].last.n_evaluated, 'video')})",
        ["shots", "trained on", "top-1 % (last epoch)", "top-5 %", "top-1 % (best epoch on test)"],
        [
            [
                *(of.run.shots, counted(of.n_trained, "video")),
                *(percent(of.last.top1), percent(of.last.top5)),
                "-" if of.best is None else f"{percent(of.best.top1)} (epoch {of.best.epoch})",
            ]
            for of in outcomes
        ],
    )
    yield f"kept under {Path(value['files'][0]).parents[2]}"
    yield from _in_training(value["runs"])
    for outcome, found in zip(outcomes, value["runs"], strict=True):
        if found["published"] or found["nearest"]:
            yield f"{counted(outcome.run.shots, 'shot')}:"
            yield from published_shown(found)


def base_to_novel_shown(value: Mapping[str, Any]) -> Iterator[Shown]:
    """Yield each draw, the means over the draws, and the published figures, all from `value`."""
    rows = [
        [f"draw {run['draw']}", percent(run["base"]), percent(run["novel"]), ""]
        for run in value["per_seed"]
    ]
    means = {"mean (last epoch)": value, "mean (best epoch on test)": value["best"]}
    rows += [
        [
            title,
            f"{mean['base']:.2f} +- {mean['base_std']:.2f}",
            f"{mean['novel']:.2f} +- {mean['novel_std']:.2f}",
            f"{mean['harmonic_mean']:.2f}",
        ]
        for title, mean in means.items()
        if mean is not None
    ]
    columns = ["", "base top-1 %", "novel top-1 %", "HM"]
    yield table(f"base to novel on {value['dataset']}", columns, rows)
    yield (
        f"HM of the means; the mean of the draws' HMs is {value['mean_of_harmonic_means']:.2f}. "
        f"Kept as {value['file']}"
    )
    yield from _in_training(value["runs"])
    yield from published_shown(value)


def _in_training(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what the best epoch of each fine-tuning measured; it is no result of the protocol."""
    for run in runs:
        if best := run.get("best_in_training"):
            yield (
                f"{run['run']}: best in training {percent(best['top1'])} % (epoch {best['epoch']}, "
                f"{best['epoch_choice']}, one view)"
            )
