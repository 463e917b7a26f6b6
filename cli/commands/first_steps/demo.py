"""`mote-cli demo`: do the whole job offline, on clips that it makes itself."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from cli import options
from cli.output import percent, progress_of, report, table
from featstore.files.durable import write_json


def demo(
    seed: Annotated[int, typer.Option(help="Seed of the generated world and of the heads.")] = 0,
    seeds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Repeat with N seeds; show mean and spread.")
    ] = 1,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Methods to train: transformer, mote, and dist, msta and taco (which look at the "
            "videos again, some minutes a seed). Default: transformer,mote.",
        ),
    ] = None,
    finetune: Annotated[
        int,
        typer.Option(
            metavar="EPOCHS",
            min=0,
            help="Then also fine-tune the CLIP's tower with MoTE's head for this many epochs, half "
            "a minute each.",
        ),
    ] = 0,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """See the whole product work, offline: make videos, pack, extract, train, evaluate.

    A small generated world stands in for Kinetics, and a small CLIP trained on its single frames
    stands in for CLIP. Zero-shot means motions that no head was trained on.

    Example: `mote-cli demo`
    """
    from featstore.files.machine import peak_rss_mb
    from heads.demo import MEASURES, TRAINED, demo_table, require_methods, run_world
    from heads.reporting.figures import tradeoff_plot

    started = time.perf_counter()
    workspace = options.workspace(root)
    named = TRAINED if methods is None else tuple(name.strip() for name in methods.split(","))
    require_methods(named, finetune > 0)
    runs = [run_world(workspace, seed + n, finetune, progress_of, named) for n in range(seeds)]
    rows = demo_table(runs, finetune > 0, named)
    folder = workspace.root / "demo"
    figure = folder / "tradeoff.png"
    tradeoff_plot([row | {"head": _head(row)} for row in rows], figure)
    summary = {
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_mb": round(peak_rss_mb()),
        "seed": seed,
        "seeds": seeds,
        "finetune_epochs": finetune,
        "figure": str(figure),
    }
    write_json(folder / "demo.json", summary)
    scores = table(
        "Generated world: 40 known classes, 40 classes with motions no head has seen"
        + (f", {seeds} seeds" if seeds > 1 else ""),
        ["head", "modulation", "close-set %", "zero-shot %", "harmonic mean"],
        [
            [
                _head(row),
                "on" if row["modulated"] else "off",
                *(_with_spread(row, measure) for measure in MEASURES),
            ]
            for row in rows
        ],
    )
    report(
        json,
        summary,
        [
            scores,
            f"{summary['seconds']:.0f} s, {summary['peak_rss_mb']} MB at most; "
            f"plot {figure}, table {folder / 'demo.json'}",
            "Next, on your own videos (a folder with one folder per class):",
            "  mote-cli pack --dataset my-clips --videos DIR",
        ],
    )


def _head(row: dict[str, Any]) -> str:
    """Return the head of a row, with CLIP's share of its scores if it has one."""
    share = row.get("ensemble")
    return str(row["head"]) if share is None else f"{row['head']}, ensemble {share:g}"


def _with_spread(row: dict[str, Any], measure: str) -> str:
    spread = row.get(f"{measure}_std")
    return percent(row[measure]) + (f" ± {spread:.1f}" if spread is not None else "")
