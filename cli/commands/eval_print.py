"""What `mote-cli eval` prints of its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.commands.compare import print_published
from cli.output import percent, print_json, print_table, results, warn

if TYPE_CHECKING:
    from heads.evaluation.request import Evaluation
    from heads.evaluation.results import EvalResult
    from heads.evaluation.trained.run import ShotOutcome


def print_evaluation(
    evaluation: Evaluation,
    files: Sequence[Path],
    beside: Mapping[str, Any],
    is_sweep: bool,
    json: bool,
) -> None:
    """Print an evaluation, the files it was kept in, and published figures `beside` the first."""
    measured = [result for result, _ in evaluation.measured]
    for gap in evaluation.missing:
        remedy = "" if gap["remedy"] in gap["reason"] else f"; {gap['remedy']}"
        warn(f"blend {gap['blend']:g} is not measured: {gap['reason']}{remedy}")
    result = measured[0]
    if json:
        rows = [{**r.to_json(), "file": str(f)} for r, f in zip(measured, files, strict=True)]
        shared = {"protocol_name": result.protocol_name, "dataset": result.dataset}
        sweep = {**shared, "rows": rows, "missing": evaluation.missing}
        print_json(sweep if is_sweep else {**rows[0], **beside})
        return
    title = (
        f"{result.protocol_name} on {result.dataset}, head {result.head}"
        f"{' with modulation' if result.modulate and not is_sweep else ''}, views {result.views}, "
        f"{result.n_classes} classes, prompts {result.prompt_set}"
    )
    if is_sweep:
        _print_sweep(title, measured)
        results.print(f"kept under {files[0].parent}")
        return
    print_table(
        title,
        ["split", "listed", "evaluated", "failed", "top-1 %", "top-5 %"],
        [
            [
                part.split,
                str(part.n_listed),
                str(part.n_evaluated),
                str(part.n_failed),
                percent(part.top1),
                percent(part.top5),
            ]
            for part in result.per_split
        ],
    )
    if len(result.per_split) > 1:
        results.print(f"mean top-1 {result.mean:.2f}, population std {result.std:.2f}")
    for note in result.notes:
        results.print(f"not as published: {note}")
    results.print(f"kept as {files[0]}")
    if beside["published"] or beside["nearest"]:
        print_published(beside)


def _print_sweep(title: str, measured: list[EvalResult]) -> None:
    """One line per setting; columns of what does not differ are left out."""
    columns: dict[str, list[Any]] = {
        "blend": [r.blend for r in measured],
        "neighbours": [r.modulation_neighbours for r in measured],
        "temperature": [r.modulation_temperature for r in measured],
        "ensemble": [r.ensemble for r in measured],
        "fusion": [r.fusion for r in measured],
    }
    varied = {name: values for name, values in columns.items() if len(set(values)) > 1}
    rows = [
        [
            *("-" if v is None else v if isinstance(v, str) else f"{v:g}" for v in shown),
            str(r.n_evaluated),
            f"{r.top1:.2f}",
            "-" if len(r.per_split) < 2 else f"{r.std:.2f}",
            "-" if r.top5 is None else f"{r.top5:.2f}",
        ]
        for r, shown in zip(
            measured,
            zip(*varied.values(), strict=True) if varied else [()] * len(measured),
            strict=True,
        )
    ]
    print_table(title, [*varied, "videos", "top-1 %", "std", "top-5 %"], rows)


def print_fewshot(value: Mapping[str, Any], outcomes: Sequence[ShotOutcome], json: bool) -> None:
    """Print one line per number of shots, and the published figures that `value` has of each."""
    if json:
        print_json(value)
        return
    print_table(
        f"few-shot on {value['dataset']}, tested on {outcomes[0].last.per_split[0].split} "
        f"({outcomes[0].last.n_evaluated} videos)",
        ["shots", "trained on", "top-1 % (last epoch)", "top-5 %", "top-1 % (best epoch on test)"],
        [
            [
                str(outcome.run.shots),
                f"{outcome.training.n_trained} videos",
                percent(outcome.last.top1),
                percent(outcome.last.top5),
                _best(outcome),
            ]
            for outcome in outcomes
        ],
    )
    results.print(f"kept under {Path(value['files'][0]).parents[2]}")
    for outcome, found in zip(outcomes, value["runs"], strict=True):
        if found["published"] or found["nearest"]:
            results.print(f"{outcome.run.shots} shots:")
            print_published(found)


def _best(outcome: ShotOutcome) -> str:
    if outcome.best is None:
        return "-"
    return f"{percent(outcome.best.top1)} (epoch {outcome.best.epoch})"


def print_base_to_novel(value: Mapping[str, Any], file: Path, json: bool) -> None:
    """Print every draw, the means over the draws, and published figures; all of it is `value`."""
    if json:
        print_json({**value, "file": str(file)})
        return
    rows = [
        [f"draw {run['draw']}", percent(run["base"]), percent(run["novel"]), ""]
        for run in value["per_seed"]
    ]
    for title, means in (
        ("mean (last epoch)", value),
        ("mean (best epoch on test)", value["best"]),
    ):
        if means is not None:
            rows.append(
                [
                    title,
                    f"{means['base']:.2f} +- {means['base_std']:.2f}",
                    f"{means['novel']:.2f} +- {means['novel_std']:.2f}",
                    f"{means['harmonic_mean']:.2f}",
                ]
            )
    print_table(
        f"base to novel on {value['dataset']}", ["", "base top-1 %", "novel top-1 %", "HM"], rows
    )
    results.print(
        f"HM of the means; the mean of the draws' HMs is {value['mean_of_harmonic_means']:.2f}. "
        f"Kept as {file}"
    )
    if value["published"] or value["nearest"]:
        print_published(value)
