"""`mote-cli tradeoff`: compare heads on known and on new classes, one row per head."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.output import Shown, percent, report, table, warn
from featstore.commands import root_words
from featstore.errors import UserError, meant

if TYPE_CHECKING:
    from heads.evaluation.comparing.tradeoff import Tradeoff
    from heads.evaluation.comparing.tradeoff_rows import TradeoffRow

FIGURE = "tradeoff.png"


def tradeoff(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Names of runs; default: all that have results."),
    ] = None,
    closeset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Data set or protocol of the known classes; default: k400, or the only one with "
            "results, else the one trained on.",
        ),
    ] = None,
    zeroshot: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="Data sets or protocols of new classes; default: those of ucf101, hmdb51 and k600 "
            "that are here, else all that have results, else all that are here.",
        ),
    ] = None,
    allow_mixed: Annotated[
        bool,
        typer.Option("--allow-mixed", help="Show heads together even if their protocols differ."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plot, .png or .svg; default: in --root.")
    ] = None,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Collect the newest results of several heads: close-set, zero-shot, and the trade-off score.

    The zero-shot column is the harmonic mean over the data sets. The score is the harmonic mean
    of that column and the close-set accuracy. Both are computed from unrounded numbers. The first
    row is CLIP's mean of the same frames: no head, no modulation, no ensemble.

    Example: `mote-cli tradeoff first second --zeroshot ucf101,hmdb51`
    """
    from heads.evaluation.comparing.compare import evaluated_runs
    from heads.evaluation.comparing.tradeoff import collect, is_scored
    from heads.evaluation.next_steps import evaluation_of
    from heads.methods.registry import MEAN_OF_FRAMES

    workspace = options.workspace(root)
    known = {path.name: path for path in evaluated_runs(workspace)}
    unknown = [name for name in runs or [] if name not in known]
    if unknown:
        raise UserError(
            f"run {unknown[0]!r} has no results (runs with results: {', '.join(known) or 'none'}): "
            f"{meant(unknown[0], known)}make some with "
            f"`{evaluation_of(workspace.head_dir(unknown[0]))}`"
        )
    names = [name.strip() for text in zeroshot or [] for name in text.split(",") if name.strip()]
    found = collect(
        [known[name] for name in dict.fromkeys(runs)]
        if runs
        else [run for run in known.values() if is_scored(run)],
        closeset=closeset,
        zeroshot=names,
        held=[name for name in workspace.extracted_datasets() if not workspace.unlabelled(name)],
        allow_mixed=allow_mixed,
        baseline=workspace.run_dir(MEAN_OF_FRAMES),
        root_option=root_words(root),
    )
    from heads.reporting.figures import tradeoff_plot  # loads matplotlib

    figure = out or workspace.root / FIGURE
    points = [
        {**row.to_json(), "head": " ".join((row.head, *row.beside, *row.setting.changes))}
        for row in (*found.baselines, *found.rows)
        if row.complete
    ]
    titles = {"closeset": f"{found.closeset} close-set", "zeroshot": _zeroshot_title(found)}
    _, refused = options.kept(lambda: tradeoff_plot(points, figure, **titles), figure)
    drawn = None if refused else figure
    report(json, {**found.to_json(), "figure": drawn and str(drawn)}, _shown(found, drawn))
    options.require_kept(refused, "the table is", "name another place for the plot with --out")


def _zeroshot_title(found: Tradeoff) -> str:
    if len(found.zeroshot) == 1:
        return f"{found.zeroshot[0]} zero-shot"
    return f"harmonic mean of {', '.join(found.zeroshot)} zero-shot"


def _setting(baseline: TradeoffRow) -> str:
    heads = ", ".join(baseline.beside)
    return f"no head, same frames as {heads}" if heads else "no head, same frames"


def _shown(found: Tradeoff, figure: Path | None) -> Iterator[Shown]:
    several = len(found.zeroshot) > 1
    yield table(
        f"Close-set {found.closeset} against zero-shot {', '.join(found.zeroshot)}: top-1 in "
        "per cent",
        ["head", "modulation, settings", found.closeset, *found.zeroshot]
        + (["harmonic mean"] if several else [])
        + ["trade-off"],
        [
            [
                row.head,
                _setting(row) if row in found.baselines else row.setting.text,
                *map(percent, row.top1),
                *([percent(row.zeroshot_top1)] if several else []),
                percent(row.score),
            ]
            for row in (*found.baselines, *found.rows)
        ],
    )
    mixed = [f"protocols differ: {line}" for line in found.mixed]
    for line in (*mixed, *found.unknown, *found.missing):
        warn(line)
    if figure is not None:
        yield f"plot {figure}"
