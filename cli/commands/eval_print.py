"""What `mote-cli eval` keeps of its results, and prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.commands.compare import print_published, published_beside
from cli.output import percent, print_json, print_table, results, warn
from featstore.files.durable import write_json
from featstore.workspace import Workspace

if TYPE_CHECKING:
    from heads.evaluation.results import EvalResult
    from heads.evaluation.trained.run import ShotOutcome


def report(
    workspace: Workspace,
    measured: list[tuple[EvalResult, Path]],
    missing: list[dict[str, Any]],
    is_sweep: bool,
    json: bool,
) -> None:
    """Keep the results, and print them."""
    from heads.evaluation.results import save_result

    rows = [{**r.to_json(), "file": str(save_result(r, run_dir))} for r, run_dir in measured]
    for gap in missing:
        remedy = "" if gap["remedy"] in gap["reason"] else f"; {gap['remedy']}"
        warn(f"blend {gap['blend']:g} is not measured: {gap['reason']}{remedy}")
    result = measured[0][0]
    beside = published_beside(workspace, rows[0])
    if json:
        shared = {"protocol_name": result.protocol_name, "dataset": result.dataset}
        alone = {**rows[0], "published": beside["published"], "nearest": beside["nearest"]}
        print_json({**shared, "rows": rows, "missing": missing} if is_sweep else alone)
        return
    title = (
        f"{result.protocol_name} on {result.dataset}, head {result.head}"
        f"{' with modulation' if result.modulate and not is_sweep else ''}, views {result.views}, "
        f"{result.n_classes} classes, prompts {result.prompt_set}"
    )
    if is_sweep:
        _print_sweep(title, [result for result, _ in measured])
        results.print(f"kept under {Path(rows[0]['file']).parent}", markup=False)
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
        results.print(f"not as published: {note}", markup=False)
    results.print(f"kept as {rows[0]['file']}", markup=False)
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


def report_fewshot(
    workspace: Workspace, value: dict[str, Any], outcomes: Sequence[ShotOutcome], json: bool
) -> None:
    """Print one line per number of shots, and the published figures of the same protocol."""
    beside = [published_beside(workspace, outcome.last.to_json()) for outcome in outcomes]
    value["runs"] = [{**run, **found} for run, found in zip(value["runs"], beside, strict=True)]
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
    results.print(f"kept under {Path(value['files'][0]).parents[2]}", markup=False)
    for outcome, found in zip(outcomes, beside, strict=True):
        if found["published"] or found["nearest"]:
            results.print(f"{outcome.run.shots} shots:")
            print_published(found)


def _best(outcome: ShotOutcome) -> str:
    if outcome.best is None:
        return "-"
    return f"{percent(outcome.best.top1)} (epoch {outcome.best.epoch})"


def report_base_to_novel(
    workspace: Workspace,
    value: dict[str, Any],
    outcomes: Sequence[ShotOutcome],
    first: Path,
    json: bool,
) -> None:
    """Keep the summary beside the first run, and print it."""
    from heads.evaluation.trained.run import base_to_novel

    last, best = base_to_novel(outcomes), base_to_novel(outcomes, best=True)
    assert last is not None
    value |= last.to_json() | {"best": None if best is None else best.to_json()}
    measured = {**outcomes[0].last.to_json(), "measure": "harmonic mean"}
    value |= (beside := published_beside(workspace, measured))
    write_json(first / "base-to-novel.json", value)
    if json:
        print_json({**value, "file": str(first / "base-to-novel.json")})
        return
    rows = [
        [f"draw {seed}", percent(base), percent(novel), ""] for seed, base, novel in last.per_seed
    ]
    for title, summary in (("mean (last epoch)", last), ("mean (best epoch on test)", best)):
        if summary is not None:
            rows.append(
                [
                    title,
                    f"{summary.base:.2f} +- {summary.base_std:.2f}",
                    f"{summary.novel:.2f} +- {summary.novel_std:.2f}",
                    f"{summary.harmonic_mean:.2f}",
                ]
            )
    print_table(
        f"base to novel on {value['dataset']}", ["", "base top-1 %", "novel top-1 %", "HM"], rows
    )
    results.print(
        f"HM of the means; the mean of the draws' HMs is {last.mean_of_harmonic_means:.2f}. "
        f"Kept as {first / 'base-to-novel.json'}",
        markup=False,
    )
    if beside["published"] or beside["nearest"]:
        print_published(beside)
