"""`mote-cli import-checkpoint`: turn the authors' released weights into an encoder and a head."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli import options
from cli.output import progress_of, report
from featstore.errors import UserError


def import_checkpoint(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Checkpoint of MoTE's, DiST's or TACO's code, or MSTA's adapters."
        ),
    ],
    name: Annotated[str, typer.Option(metavar="NAME", help="Name of the new encoder and head.")],
    clip: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="The CLIP it was tuned from, written as for --encoder of extract; it gives the "
            "text tower and the blend. Default: OpenAI's CLIP of the same shape.",
        ),
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CSV `id,name` of the training classes, which FILE lacks. MoTE's holds the "
            "features of the names, and the names are checked against these.",
        ),
    ] = None,
    blend: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0.0,
            max=1.0,
            help="Share of MoTE's tuned tower; the rest is CLIP's own. Default: 0.99 as published.",
        ),
    ] = None,
    attention_heads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Attention heads of the temporal head; default: as many as CLIP's text tower has, "
            "as published.",
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            metavar="T",
            min=1,
            help="Frames per view in MoTE's or TACO's training, which FILE lacks. Default: 8.",
        ),
    ] = None,
    selected_layers: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Blocks of the image tower, from 0, that DiST's branch reads; needed if it reads "
            "some only and FILE does not say which.",
        ),
    ] = None,
    device: options.Device = "auto",
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Turn a checkpoint of a method's authors into encoders/NAME and heads/NAME.

    `extract --encoder NAME` then encodes with the fine-tuned tower, and `eval` and `predict` take
    `--head NAME`. The method is known by the names in FILE. For DiST, eval makes the features
    itself, from the packed videos; adapters of MSTA become heads/NAME alone. For new classes leave
    TACO's head out, with `--head mean`. No code in FILE is run. Either both are made or neither.

    Example: `mote-cli import-checkpoint mote.pt --name b16 --class-names k400.csv`
    """
    from heads.checkpoints.import_checkpoint import import_checkpoint as run
    from heads.evaluation.next_steps import after_import

    workspace = options.workspace(root)
    layers = None if selected_layers is None else _numbers(selected_layers)
    with progress_of("check class names", "sentences") as progress:
        made = run(
            workspace,
            file,
            name,
            clip=clip,
            class_names_file=class_names,
            blend=blend,
            attention_heads=attention_heads,
            frames=frames,
            selected_layers=layers,
            device=device,
            progress=progress,
        )
    names = "unknown (give them with --class-names)"
    if made["class_names_known"]:
        # Only MoTE's files, whose tower is blended, have what they can be checked against.
        names = "checked" if "blend" in made else "as given"
    following: dict[str, Any] = {"next": after_import(workspace, name)}
    report(
        json,
        made | following,
        {
            "encoder": f"{made['encoder']} ({made['tower']})",
            "head": f"{made['head']} ({made['parts']})",
            "classes": f"{made['n_classes']}, names {names}",
        }
        | following,
    )


def _numbers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 6 for word in words):
        raise UserError(
            f"--selected-layers {text!r} is no list of blocks: write their numbers from 0 with "
            "commas, such as 0,2,4"
        )
    return [int(word) for word in words]
