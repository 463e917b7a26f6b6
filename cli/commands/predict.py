"""`mote-cli predict`: name what happens in videos, in the user's own words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.output import progress_of, report, table


def predict(
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEO...", help="Video files.")],
    classes: Annotated[
        str | None,
        typer.Option(
            metavar='"a,b,c"',
            help="Classes in your own words, separated by commas; default: the head's own.",
        ),
    ] = None,
    head: options.Head = None,
    encoder: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Encoder; default: the one the head was trained with."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show per video.")] = 5,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Frames per video; default: the head's.")
    ] = None,
    prompts: options.PromptSet = None,
    modulate: options.Modulate = True,
    precision: options.Precision = "auto",
    device: options.Device = "auto",
    max_failures: options.MaxFailures = options.DEFAULT_MAX_FAILURES,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Name the classes that fit each video best, with scores that add up to 1.

    Without a trained head (or with `--head mean`) the embeddings of the frames are averaged.

    Example: `mote-cli predict clip.mp4 --classes "arm wrestling, cooking"`
    """
    from heads.end_to_end.predict import predict as run

    names = None if classes is None else options.class_list(classes)
    with progress_of("predict", "videos") as progress:
        found = run(
            options.workspace(root),
            videos,
            names,
            head=head,
            encoder=encoder,
            top=top,
            frames=frames,
            prompts=prompts,
            modulate=modulate,
            precision=precision,
            device=device,
            progress=progress,
        )
    decoded = [video for video in found["videos"] if "error" not in video]
    report(
        json,
        found,
        [
            table(
                f"{video['path']} ({video['num_frames']} frames, head {found['head']})",
                ["class", "score"],
                [[p["class_name"], f"{p['score']:.3f}"] for p in video["predictions"]],
            )
            for video in decoded
        ],
    )
    failed = len(videos) - len(decoded)
    options.require_few_failures(failed, len(videos), max_failures, "the reasons are above")
