"""`mote-cli import-checkpoint`: the authors' released weights as an encoder and a head."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from cli import options
from cli.output import print_facts, print_json, progress_of
from featstore.errors import UserError, WorkError
from featstore.files.durable import new_folders
from heads.methods.registry import MEAN_OF_FRAMES


def import_checkpoint(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Checkpoint of MoTE's released code (`.pt`).")
    ],
    name: Annotated[str, typer.Option(metavar="NAME", help="Name of the new encoder and head.")],
    clip: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="The CLIP it was tuned from, as --encoder of extract takes it: gives the text "
            "tower and the blend. Default: OpenAI's of the same shape.",
        ),
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="CSV `id,name` of the training classes; the checkpoint holds only their features, "
            "which the names are checked against.",
        ),
    ] = None,
    blend: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            min=0.0,
            max=1.0,
            help="Share of the tuned tower, the rest is CLIP's own; 0.99 as published.",
        ),
    ] = 0.99,
    attention_heads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Of the head; default: those of the CLIP's text tower, as published.",
        ),
    ] = None,
    frames: Annotated[
        int,
        typer.Option(metavar="T", min=1, help="Frames per view it was trained with; not in FILE."),
    ] = 8,
    device: options.Device = "auto",
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Make encoders/NAME and heads/NAME of a checkpoint of MoTE's released code.

    `extract --encoder NAME` then encodes with the fine-tuned tower, and `eval` and `predict` take
    `--head NAME`. Nothing in FILE is run. Either both appear or neither.

    Example: `mote-cli import-checkpoint MoTE_B16.pt --name mote-b16 --class-names k400.csv`
    """
    from heads.files.imported_run import imported_origin, require_class_names, save_imported_run
    from heads.methods.mote.official import import_official_checkpoint
    from heads.methods.registry import read_checkpoint
    from pipeline.annotations.class_names import natural_class_name
    from pipeline.annotations.label_names import read_names
    from pipeline.clip_encoder import Encoder, save_open_clip_folder
    from pipeline.encoders.tuned import (
        original_clip,
        published_clip,
        text_attention_heads,
        tower_of,
        tuned_clip,
    )

    workspace = options.workspace(root)
    encoder_dir, run_dir = workspace.encoder_dir(name), workspace.run_dir(name)
    if name == MEAN_OF_FRAMES:
        raise UserError(f"--name {name}: --head {name} means no head; use another name")
    for folder in (encoder_dir, run_dir):
        if folder.exists():
            raise UserError(f"{folder} exists already: choose another --name or remove it")
    names = None if class_names is None else tuple(read_names(class_names).values())
    _, checkpoint = read_checkpoint(file)
    spec = clip or published_clip(checkpoint.tower_state)
    try:
        original = original_clip(spec, workspace.root / "encoders")
    except WorkError as error:
        raise WorkError(f"{error}; or name the original CLIP with --clip SPEC") from error
    imported = import_official_checkpoint(
        checkpoint,
        tower_of(original),
        blend,
        attention_heads or text_attention_heads(original),
    )
    tuned = tuned_clip(original, imported.tower_state, name)
    encoder = Encoder(tuned, name, "fp32", options.device(device))
    if names is not None:
        with progress_of("check class names", "sentences") as progress:
            embeddings = encoder.class_embeddings(names, "mote28", progress)
        require_class_names(imported.head, names, embeddings.cpu())
    head = imported.head
    head.origin = imported_origin(
        encoder=name,
        encoder_fingerprint=encoder.fingerprint,
        preprocessing=encoder.preprocessing.to_json(),
        # As data sets write them.
        class_names=None if names is None else tuple(natural_class_name(n) for n in names),
        frames=frames,
    )
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    facts = {
        "file": file.name,
        "sha256": digest,
        "epoch": imported.epoch,
        "clip": spec,
        "blend": blend,
        "logit_scale": imported.logit_scale,
    }
    staging = workspace.root / f".importing-{name}"
    with new_folders(staging, encoder_dir, run_dir) as (encoder_folder, run_folder):
        save_open_clip_folder(
            tuned.model.cpu(), tuned.model_config, tuned.preprocess_config, encoder_folder
        )
        save_imported_run(run_folder, head, checkpoint, facts)
    summary = {
        "name": name,
        "encoder": str(encoder_dir),
        "head": str(run_dir),
        "encoder_fingerprint": encoder.fingerprint,
        **facts,
        "dim": head.config.dim,
        "layers": head.config.layers,
        "experts": head.config.experts,
        "attention_heads": head.config.attention_heads,
        "n_classes": head.training_class_embeddings.shape[0],
        "class_names_known": names is not None,
        "frames": frames,
    }
    if json:
        print_json(summary)
        return
    print_facts(
        {
            "encoder": f"{encoder_dir} ({blend:g} of {file.name}, the rest {spec})",
            "head": f"{run_dir} ({head.config.layers} layers, {head.config.experts} experts, "
            f"{head.config.attention_heads} attention heads, epoch {imported.epoch})",
            "classes": f"{summary['n_classes']}, names "
            + ("checked" if names is not None else "unknown (give them with --class-names)"),
            "next": f"mote-cli extract --dataset NAME --encoder {name} --sampling clips:{frames}x3"
            + options.same_root(root),
        }
    )
