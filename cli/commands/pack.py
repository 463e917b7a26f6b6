"""`mote-cli pack`: video files into WebDataset tars."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.output import progress_of, report


def pack(
    dataset: options.Dataset,
    videos: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder of the videos: class folders (also under train/, val/, test/), or what "
            "the annotations name.",
        ),
    ],
    annotations: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Official annotation file or folder (Kinetics, HMDB51, UCF101, Something-"
            "Something V2), or a `path label` / CSV list.",
        ),
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="CSV `id,name` for lists with numbers as labels."),
    ] = None,
    label_map: Annotated[
        str,
        typer.Option(
            metavar="corrected|as-published",
            help="A file of class names that exchanges some against what the videos are called "
            "(X-CLIP's for HMDB51): put right, or kept for comparison.",
        ),
    ] = "corrected",
    class_names_as: Annotated[
        str,
        typer.Option(
            metavar="words|raw",
            help="Natural words (`ApplyEyeMakeup`: apply eye makeup), or the data set's spelling.",
        ),
    ] = "words",
    samples_per_shard: Annotated[
        int, typer.Option(metavar="N", min=1, help="Videos per tar (= rows per shard).")
    ] = 256,
    seed: Annotated[int, typer.Option(help="Order of the videos in the tars.")] = 0,
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            help="Take videos that came since into new tars; earlier tars stay as they are.",
        ),
    ] = False,
    max_failures: options.MaxFailures = options.DEFAULT_MAX_FAILURES,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Pack labelled videos into WebDataset tars, checking that each can be decoded.

    Known names (k400, k600, k700, hmdb51, ucf101, ssv2) read the official annotation files; any
    other name is a folder of class folders or a list. Running it again continues.

    Example: `mote-cli pack --dataset my-clips --videos ~/videos`
    """
    from pipeline.annotations.class_names import Naming
    from pipeline.tars.packing import pack as run

    # Naming checks its words, which are the user's.
    naming = Naming(label_map, class_names_as)  # type: ignore[arg-type]
    with progress_of("pack", "videos") as progress:
        summary = run(
            videos,
            dataset,
            options.workspace(root).dataset_dir(dataset),
            annotations=annotations,
            class_names_file=class_names,
            samples_per_shard=samples_per_shard,
            seed=seed,
            max_failures=max_failures,
            append=append,
            naming=naming,
            progress=progress,
        )
    failures = Path(summary.folder) / "failures.csv"
    report(
        json,
        summary.to_json(),
        {
            "data set": f"{summary.dataset} in {summary.folder}",
            "videos": f"{summary.videos_listed} listed, {summary.videos_packed} packed, "
            f"{summary.videos_failed} failed" + f" (see {failures})" * bool(summary.videos_failed),
            "classes": summary.classes,
            "tars": f"{summary.shards} ({summary.shards_written} written now)",
            "next": f"mote-cli extract --dataset {summary.dataset}{options.same_root(root)}",
        },
    )
    options.require_few_failures(
        *(summary.videos_failed, summary.videos_listed, max_failures),
        f"the reasons are in {failures}",
    )
