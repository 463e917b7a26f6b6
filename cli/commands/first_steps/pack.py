"""`mote-cli pack`: pack video files into WebDataset tars."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli import options
from cli.output import progress_of, report
from featstore.commands import command
from featstore.errors import UserError


def pack(
    context: typer.Context,
    dataset: options.Dataset,
    videos: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the videos: one folder per class (also under train/, val/, test/), "
            "files without classes, or the files that the annotations name.",
        ),
    ] = None,
    tars: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[SPLIT=]PATTERN",
            help="WebDataset tars to take as they are, in place of --videos: a path, a glob, "
            "braces such as x-{000..099}.tar, s3://..., https://...; may be repeated.",
        ),
    ] = None,
    annotations: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Official annotation file or folder (Kinetics, HMDB51, UCF101, Something-"
            "Something V2, Charades, MultiTHUMOS), or a `path label` / CSV list, also of URLs; "
            "with --tars a CSV key,class[,split].",
        ),
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="CSV `id,name`, for lists whose labels are numbers."),
    ] = None,
    label_field: Annotated[
        str,
        typer.Option(
            metavar="FIELD|.EXT",
            help="With --tars: the class is this field of each JSON (meta.label is a nested one), "
            "or the text of the member with this extension (.txt).",
        ),
    ] = "",
    unlabelled: Annotated[
        bool,
        typer.Option("--unlabelled", help="Leave classes out: for extraction and prediction."),
    ] = False,
    multi_label: Annotated[
        str,
        typer.Option(
            metavar="rows|'|'|';'|list",
            help="Videos may show several classes: a row of the list for each class, a cell with "
            "| or ; between them, or with --tars a JSON list (docs/multi-label.md).",
        ),
    ] = "",
    label_map: Annotated[
        str,
        typer.Option(
            metavar="corrected|as-published",
            help="Some published files of class names swap names (X-CLIP's for HMDB51): correct "
            "them, or keep them for comparison.",
        ),
    ] = "corrected",
    class_names_as: Annotated[
        str,
        typer.Option(
            metavar="words|raw",
            help="Write class names as natural words (`ApplyEyeMakeup` as apply eye makeup), or in "
            "the data set's spelling.",
        ),
    ] = "words",
    samples_per_shard: Annotated[
        int, typer.Option(metavar="N", min=1, help="Videos per tar (= rows per shard).")
    ] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the order of videos in the tars.")] = 0,
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            help="Pack videos that were added since into new tars; earlier tars do not change.",
        ),
    ] = False,
    hold_out: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Hold this share of every class back as split test, where the videos have no "
            "splits, for example 0.2.",
        ),
    ] = None,
    exclude: options.Exclude = None,
    max_failures: options.MaxFailures = options.DEFAULT_MAX_FAILURES,
    more_tars: Annotated[
        list[str] | None,
        typer.Argument(metavar="", hidden=True, help="More tars: a glob that a shell expanded."),
    ] = None,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Pack labelled videos into WebDataset tars, checking that each can be decoded.

    For the data sets k400, k600, k700, hmdb51, ucf101, ssv2, charades and multithumos the official
    annotation files are read; any other name takes a folder of class folders, a folder of files
    without classes, or a list. Tars that exist already are taken where they lie with --tars
    (docs/datasets.md). To continue interrupted work, run the command again.

    Example: `mote-cli pack --dataset my-clips --videos ~/videos`
    """
    from heads.evaluation.next_steps import after_packing
    from pipeline.annotations.class_names import Naming
    from pipeline.tars.identical import IDENTICAL_FILE, SHOWN

    # Naming checks the words, which come from the user.
    naming = Naming(label_map, class_names_as)  # type: ignore[arg-type]
    workspace = options.workspace(root)
    folder = workspace.dataset_dir(dataset)
    if more_tars and not tars:
        usage = command("pack", help=True)
        raise UserError(f"{more_tars[0]!r} belongs to no option: see `{usage}`")
    if tars:
        from pipeline.tars.foreign.classes import ClassChoice
        from pipeline.tars.foreign.sources import absolute_pattern
        from pipeline.tars.foreign.taking import pack_tars

        if videos is not None:
            raise UserError("--tars and --videos exclude each other: give one of them")
        if (samples_per_shard, seed) != (256, 0):
            raise UserError(
                "--samples-per-shard and --seed shape the tars that --videos makes: those of "
                "--tars stay as they are"
            )
        if hold_out is not None:
            raise UserError(
                "--hold-out draws among the videos of --videos: name the split of tars as "
                "--tars test=PATTERN"
            )
        choice = ClassChoice(
            *(annotations, class_names, label_field, unlabelled, naming, multi_label)
        )
        with progress_of("index", "tars") as progress:
            summary = pack_tars(
                [*tars, *(more_tars or [])],  # a shell puts many names in place of a glob
                dataset,
                folder,
                classes=choice,
                max_failures=max_failures,
                append=append,
                exclude=exclude,
                asked=options.words_given(
                    *(context, "dataset", "root", "json"),
                    absolute={"tars": absolute_pattern, "more_tars": absolute_pattern},
                ),
                progress=progress,
            )
    else:
        from pipeline.tars.packing import pack as run

        if label_field:
            raise UserError("--label-field is for --tars: with --videos a class is a folder")
        with progress_of("pack", "videos") as progress:
            summary = run(
                videos,
                dataset,
                folder,
                annotations=annotations,
                class_names_file=class_names,
                samples_per_shard=samples_per_shard,
                seed=seed,
                max_failures=max_failures,
                append=append,
                naming=naming,
                unlabelled=unlabelled,
                exclude=exclude,
                hold_out=hold_out,
                asked=options.words_given(context, "dataset", "root", "json"),
                multi_label=multi_label,
                progress=progress,
            )
    failures = Path(summary.folder) / "failures.csv"
    following: dict[str, Any] = {}
    if summary.videos_packed:
        following |= after_packing(workspace, summary.dataset)
    same = summary.identical
    facts = {}
    if summary.left_out.line:
        facts["left out"] = summary.left_out.line
    if summary.classes and workspace.packed_splits(summary.dataset) == {}:
        facts["splits"] = "none: to test a head with eval --closeset, pack under another name "
        facts["splits"] += "with --hold-out 0.2, or sort the videos into train/ and val/ first"
    if summary.excluded is not None:
        facts["excluded"] = summary.excluded.words
    if same.groups:
        facts["identical"] = f"{same.words} (see {Path(summary.folder) / IDENTICAL_FILE})"
    report(
        json,
        summary.to_json() | following,
        [
            {
                "data set": f"{summary.dataset} in {summary.folder}",
                "videos": f"{summary.videos_listed} listed, {summary.videos_packed} packed, "
                f"{summary.videos_failed} failed"
                + f" (see {failures})"
                * bool(summary.videos_failed),
                "classes": summary.classes or "none: the videos have no labels",
                "tars": f"{summary.shards} (where they lie)"
                if tars
                else f"{summary.shards} ({summary.shards_written} written now)",
                **facts,
                **following,
            },
            *(f"  same bytes: {group.words}" for group in same.groups[:SHOWN]),
        ],
    )
    options.require_few_failures(
        *(summary.videos_failed, summary.videos_listed, max_failures),
        f"the reasons are in {failures}",
        *(video["reason"] for video in summary.failures[:1]),
    )
