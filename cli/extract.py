"""`mote-cli extract`: tars through a frozen CLIP into a feature store."""

from __future__ import annotations

from typing import Annotated

import typer

from cli import options
from cli.output import print_facts, print_json, progress_of


def extract(
    dataset: options.Dataset,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", metavar="NAME", help="Only the tars of this split (disjoint splits only)."
        ),
    ] = None,
    encoder: options.Encoder = options.DEFAULT_ENCODER,
    sampling: Annotated[
        str,
        typer.Option(
            "--sampling",
            metavar="uniform:F|clips:TxV",
            help="F frames over the whole video, or V clips of T frames each.",
        ),
    ] = "uniform:16",
    crops: Annotated[
        int, typer.Option("--crops", metavar="1|3", help="Centre, or three along the long side.")
    ] = 1,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompts",
            metavar="SET",
            help="Sentences for class names: mote28 (default), name, video. May be repeated.",
        ),
    ] = None,
    precision: options.Precision = "auto",
    device: options.Device = "auto",
    decoder: Annotated[
        str, typer.Option("--decoder", metavar="auto|pyav", help="What decodes the videos.")
    ] = "auto",
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Threads; default: one per core.")
    ] = None,
    max_failures: options.MaxFailures = options.DEFAULT_MAX_FAILURES,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Decode, preprocess and encode every video once; features land in a Zarr store.

    Interrupt it whenever you like: at most the tar in flight is lost, and the same command goes
    on. Videos that fail keep their row with the reason.

    Example: `mote-cli extract --dataset my-clips --encoder ViT-B-16/openai --sampling uniform:16`
    """
    from pipeline.decoding import decoder_named
    from pipeline.extraction import ExtractionRequest, encoder_label
    from pipeline.extraction import extract as run
    from pipeline.sampling import parse_sampling

    workspace = options.workspace(root)
    chosen = parse_sampling(sampling)
    with progress_of("extract", "videos") as progress:
        summary = run(
            ExtractionRequest(
                dataset_dir=workspace.dataset_dir(dataset),
                store_path=workspace.store_path(
                    dataset,
                    encoder=encoder_label(encoder),
                    sampling=chosen.text,
                    crops=crops,
                    split=split,
                ),
                encoder=encoder,
                sampling=chosen,
                encoders_dir=workspace.root / "encoders",
                split=split,
                crops=crops,
                precision=precision,
                device=options.device(device),
                prompt_sets=tuple(prompts or ["mote28"]),
                workers=workers,
                max_failures=max_failures,
            ),
            decoder=decoder_named(decoder),
            progress=progress,
        )
    if json:
        print_json(summary.to_json())
    else:
        print_facts(
            {
                "store": summary.store,
                "rows": f"{summary.rows_ok} ok, {summary.rows_failed} failed",
                "tars": f"{summary.partitions_done} done now, {summary.partitions_skipped} before",
                "speed": f"{summary.videos_per_second:.2f} videos/s, "
                f"{summary.frames_per_second:.1f} frames/s ({summary.precision})",
                **{f"failed: {f['key']}": f["reason"] for f in summary.failures},
                "next": f"mote-cli train-head --dataset {dataset}",
            }
        )
    raise typer.Exit(
        options.exit_code(
            summary.rows_failed,
            summary.rows_ok + summary.rows_failed,
            max_failures,
            f"`mote-cli inspect {summary.store}` lists the reasons",
        )
    )
