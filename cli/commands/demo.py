"""`mote-cli demo`: the whole job, offline, on clips it makes itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.output import percent, print_json, print_table, progress_of, results
from featstore.files.durable import write_json
from featstore.workspace import Workspace

if TYPE_CHECKING:
    from featstore import Store
    from heads.methods.head import Head

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
FINETUNED_ROWS = (_Scored("mote-finetuned", False), _Scored("mote-finetuned", True))


def demo(
    seed: Annotated[int, typer.Option(help="Draws the world and starts the heads.")] = 0,
    seeds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Repeat with N seeds: mean, spread.")
    ] = 1,
    finetune: Annotated[
        int,
        typer.Option(
            metavar="EPOCHS",
            min=0,
            help="Then also fine-tune the CLIP's tower with MoTE's head for so many epochs, half a "
            "minute each.",
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
    from heads.reporting.figures import tradeoff_plot

    started = time.perf_counter()
    workspace = options.workspace(root)
    runs = [run_world(workspace, seed + n, finetune) for n in range(seeds)]
    scored = ROWS + (FINETUNED_ROWS if finetune else ())
    rows = [_summary(row, [run[n] for run in runs]) for n, row in enumerate(scored)]
    folder = workspace.root / "demo"
    figure = folder / "tradeoff.png"
    tradeoff_plot(rows, figure)
    report = {
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_mb": round(peak_rss_mb()),
        "seed": seed,
        "seeds": seeds,
        "finetune_epochs": finetune,
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


def run_world(workspace: Workspace, seed: int, finetune: int = 0) -> list[dict[str, float]]:
    """Make, pack, extract, train and evaluate the world of one seed; measures row by row.

    Rows are `ROWS`, with `finetune` epochs of end-to-end training `FINETUNED_ROWS` too. What an
    earlier run of the same seed finished is not done again.
    """
    from heads.files.head_file import load_head
    from heads.recipes import load_recipe
    from heads.training.train_head import train_head, training_rows
    from pipeline.demo.small_clip import ENCODER_NAME, make_encoder_folder
    from pipeline.demo.world import draw_world, write_world
    from pipeline.tars.packing import pack

    make_encoder_folder(workspace.encoder_dir(ENCODER_NAME))
    with progress_of(f"make videos (seed {seed})", "videos") as progress:
        folders = write_world(
            draw_world(seed), workspace.root / "demo" / f"videos-{seed}", progress=progress
        )
    names = {kind: f"demo-{kind}-{seed}" for kind in ("known", "new")}
    for kind, videos in (("known", folders.known), ("new", folders.new)):
        with progress_of(f"pack {kind}", "videos") as progress:
            pack(videos, names[kind], workspace.dataset_dir(names[kind]), progress=progress)
    stores = {kind: _extracted(workspace, name, ENCODER_NAME) for kind, name in names.items()}

    heads: dict[str, Head | None] = {"mean": None}
    recipe = load_recipe(RECIPE)
    trained: tuple[str, ...] = ("transformer", "mote")
    for head in trained:
        run_dir = workspace.run_dir(f"demo-{head}-{seed}")
        with progress_of(f"train {head}", "steps") as progress:
            train_head(
                stores["known"],
                run_dir,
                recipe.head_config(stores["known"].provenance.dim, kind=head),
                recipe.train_config(seed=seed),
                rows=training_rows(stores["known"], "train"),
                prompt_set=PROMPTS,
                resume=run_dir.exists(),
                device="cpu",
                progress=progress,
            )
        heads[head] = load_head(run_dir)
    measured = [_measured(stores, heads[row.head], row) for row in ROWS]
    if finetune:
        tuned = _finetuned(workspace, names["known"], seed, finetune)
        stores = {kind: _extracted(workspace, name, tuned) for kind, name in names.items()}
        heads["mote-finetuned"] = load_head(workspace.run_dir(tuned))
        measured += [_measured(stores, heads[row.head], row) for row in FINETUNED_ROWS]
    return measured


def _extracted(workspace: Workspace, dataset: str, encoder: str) -> Store:
    """The data set's store by an encoder of the workspace."""
    from featstore import open_store
    from pipeline.extraction.request import ExtractionRequest
    from pipeline.extraction.run import extract
    from pipeline.sampling import parse_sampling

    sampling = parse_sampling(SAMPLING)
    path = workspace.store_path(dataset, encoder=encoder, sampling=sampling.text)
    with progress_of(f"extract {dataset}", "videos") as progress:
        extract(
            ExtractionRequest(
                dataset_dir=workspace.dataset_dir(dataset),
                store_path=path,
                encoder=encoder,
                sampling=sampling,
                encoders_dir=workspace.root / "encoders",
                precision="fp32",
                prompt_sets=(PROMPTS,),
            ),
            progress=progress,
        )
    return open_store(path)


def _finetuned(workspace: Workspace, dataset: str, seed: int, epochs: int) -> str:
    """Train the tower with the head that the frozen store gave; the name of run and encoder."""
    from heads.end_to_end.finetune import finetune
    from heads.end_to_end.plan import FinetuneRequest
    from heads.recipes import load_recipe
    from heads.training.ranks import Ranks

    recipe = load_recipe(RECIPE)
    name = f"demo-finetuned-{seed}-{epochs}"
    run_dir = workspace.run_dir(name)
    with progress_of(f"finetune {dataset}", "steps") as progress:
        finetune(
            FinetuneRequest(
                dataset_dir=workspace.dataset_dir(dataset),
                run_dir=run_dir,
                encoder_dir=workspace.encoder_dir(name),
                encoders_dir=workspace.root / "encoders",
                config=recipe.finetune_config(seed=seed, epochs=epochs),
                head=recipe.head_config,
                from_head=workspace.run_dir(f"demo-mote-{seed}"),
                resume=run_dir.exists(),
            ),
            Ranks(),
            progress,
        )
    return name


def _measured(stores: Mapping[str, Store], head: Head | None, row: _Scored) -> dict[str, float]:
    """Close-set accuracy on the known classes, zero-shot accuracy on the new ones."""
    from heads.evaluation.evaluate import evaluate_store
    from heads.evaluation.protocols.choose import closeset_tests, zeroshot_tests

    top1 = {}
    for protocol, kind, choose in (
        ("closeset", "known", closeset_tests),
        ("zeroshot", "new", zeroshot_tests),
    ):
        top1[protocol] = evaluate_store(
            stores[kind],
            head,
            protocol=protocol,
            dataset=stores[kind].provenance.dataset,
            tests=choose(stores[kind]),
            head_name=row.head,
            modulate=row.modulated,
            device="cpu",
        ).top1
    close, zero = top1["closeset"], top1["zeroshot"]
    return {
        "closeset_top1": close,
        "zeroshot_top1": zero,
        "harmonic_mean": statistics.harmonic_mean([close, zero]),
    }


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
