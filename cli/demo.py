"""`mote-cli demo`: the whole job, offline, on clips it makes itself."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from cli import options
from cli.output import percent, print_json, print_table, progress_of, results
from featstore.durable import write_json
from featstore.workspace import Workspace

PROMPTS = "name"  # the demo's small CLIP learned from captions, not from prompt sentences
SAMPLING = "uniform:16"
RECIPE = "demo"
MEASURES = ("closeset_top1", "zeroshot_top1", "harmonic_mean")


@dataclass(frozen=True)
class _Scored:
    head: str
    modulated: bool


ROWS = (
    _Scored("mean", False),
    _Scored("transformer", False),
    _Scored("transformer", True),
    _Scored("mote", False),
    _Scored("mote", True),
)


def demo(
    seed: Annotated[int, typer.Option("--seed", help="Draws the world and starts the heads.")] = 0,
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", min=1, help="Repeat with N seeds: mean, spread.")
    ] = 1,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """See the whole product work, offline: make videos, pack, extract, train, evaluate.

    A small generated world stands in for Kinetics, and a small CLIP trained on its single frames
    stands in for CLIP. Zero-shot means motions that no head was trained on.

    Example: `mote-cli demo`
    """
    from heads.plots import tradeoff_plot
    from pipeline.machine import peak_rss_mb

    started = time.perf_counter()
    workspace = options.workspace(root)
    runs = [run_world(workspace, seed + n) for n in range(seeds)]
    rows = [_summary(row, [run[n] for run in runs]) for n, row in enumerate(ROWS)]
    folder = workspace.root / "demo"
    figure = folder / "tradeoff.png"
    tradeoff_plot(rows, figure)
    report = {
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_mb": round(peak_rss_mb()),
        "seed": seed,
        "seeds": seeds,
        "figure": str(figure),
    }
    write_json(folder / "demo.json", report)
    if json:
        print_json(report)
        return
    print_table(
        "Generated world: 40 known classes, 40 classes with motions no head has seen"
        + (f", {seeds} seeds" if seeds > 1 else ""),
        ["head", "modulation", "close-set %", "zero-shot %", "harmonic mean"],
        [
            [
                row["head"],
                "on" if row["modulated"] else "off",
                *(_with_spread(row, measure) for measure in MEASURES),
            ]
            for row in rows
        ],
    )
    results.print(
        f"{report['seconds']:.0f} s, {report['peak_rss_mb']} MB at most; "
        f"plot {figure}, table {folder / 'demo.json'}",
        markup=False,
    )
    results.print("Next, on your own videos (a folder with one folder per class):")
    results.print("  mote-cli pack --dataset my-clips --videos DIR", markup=False)


def run_world(workspace: Workspace, seed: int) -> list[dict[str, float]]:
    """Make, pack, extract, train and evaluate the world of one seed; measures per row of `ROWS`.

    What an earlier run of the same seed finished is not done again.
    """
    from featstore import open_store
    from heads.checkpoints import load_head
    from heads.config import HeadKind
    from heads.evaluation import evaluate_store
    from heads.model import TemporalHead
    from heads.protocols import closeset_tests, zeroshot_tests
    from heads.recipes import load_recipe
    from heads.training import train_head, training_rows
    from pipeline.demo_clip import ENCODER_NAME, make_encoder_folder
    from pipeline.demo_world import draw_world, write_world
    from pipeline.extraction import extract
    from pipeline.extraction_plan import ExtractionRequest
    from pipeline.packing import pack
    from pipeline.sampling import parse_sampling

    sampling = parse_sampling(SAMPLING)
    make_encoder_folder(workspace.encoder_dir(ENCODER_NAME))
    with progress_of(f"make videos (seed {seed})", "videos") as progress:
        folders = write_world(
            draw_world(seed), workspace.root / "demo" / f"videos-{seed}", progress=progress
        )
    stores = {}
    for kind, videos in (("known", folders.known), ("new", folders.new)):
        name = f"demo-{kind}-{seed}"
        with progress_of(f"pack {kind}", "videos") as progress:
            pack(videos, name, workspace.dataset_dir(name), progress=progress)
        path = workspace.store_path(name, encoder=ENCODER_NAME, sampling=sampling.text)
        with progress_of(f"extract {kind}", "videos") as progress:
            extract(
                ExtractionRequest(
                    dataset_dir=workspace.dataset_dir(name),
                    store_path=path,
                    encoder=ENCODER_NAME,
                    sampling=sampling,
                    encoders_dir=workspace.root / "encoders",
                    precision="fp32",
                    prompt_sets=(PROMPTS,),
                ),
                progress=progress,
            )
        stores[kind] = open_store(path)

    heads: dict[str, TemporalHead | None] = {"mean": None}
    recipe = load_recipe(RECIPE)
    trained: tuple[HeadKind, ...] = ("transformer", "mote")
    for kind in trained:
        run_dir = workspace.run_dir(f"demo-{kind}-{seed}")
        with progress_of(f"train {kind}", "steps") as progress:
            train_head(
                stores["known"],
                run_dir,
                recipe.head_config(stores["known"].provenance.dim, kind=kind),
                recipe.train_config(seed=seed),
                rows=training_rows(stores["known"], "train"),
                prompt_set=PROMPTS,
                resume=run_dir.exists(),
                device="cpu",
                progress=progress,
            )
        heads[kind] = load_head(run_dir)

    measured = []
    for row in ROWS:
        top1 = {}
        for protocol, kind, choose in (
            ("closeset", "known", closeset_tests),
            ("zeroshot", "new", zeroshot_tests),
        ):
            top1[protocol] = evaluate_store(
                stores[kind],
                heads[row.head],
                protocol=protocol,
                dataset=stores[kind].provenance.dataset,
                tests=choose(stores[kind]),
                head_name=row.head,
                modulate=row.modulated,
                device="cpu",
            ).top1
        close, zero = top1["closeset"], top1["zeroshot"]
        measured.append(
            {
                "closeset_top1": close,
                "zeroshot_top1": zero,
                "harmonic_mean": statistics.harmonic_mean([close, zero]),
            }
        )
    return measured


def _summary(row: _Scored, runs: list[dict[str, float]]) -> dict[str, Any]:
    """Means over seeds; with several seeds also the population's standard deviations."""
    summary: dict[str, Any] = {"head": row.head, "modulated": row.modulated}
    for measure in MEASURES:
        values = [run[measure] for run in runs]
        summary[measure] = statistics.fmean(values)
        if len(values) > 1:
            summary[f"{measure}_std"] = statistics.pstdev(values)
            summary[f"{measure}_per_seed"] = values
    return summary


def _with_spread(row: dict[str, Any], measure: str) -> str:
    spread = row.get(f"{measure}_std")
    return percent(row[measure]) + (f" ± {spread:.1f}" if spread is not None else "")
