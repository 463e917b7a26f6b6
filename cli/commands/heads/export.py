"""`mote-cli export`: write a head as a file for other programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from cli import options
from cli.output import report
from featstore.errors import UserError, one_of
from heads.methods.registry import MEAN_OF_FRAMES

Loaded = TypeVar("Loaded")
FORMATS = ("safetensors", "onnx", "official")


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of a trained or imported head.")],
    format: Annotated[
        str,
        typer.Option(
            metavar="safetensors|onnx|official",
            help="safetensors and onnx: experts merged into one feed-forward, DiST's onnx with its "
            "image tower; official: what the method's released code loads.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write.")],
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Image tower for the official format and for DiST's onnx, if the head's own is "
            "not found by name.",
        ),
    ] = None,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Write a head as one file for other programs; an existing file is replaced.

    The official format also holds the image tower: for an imported or fine-tuned run the trained
    tower, bit for bit; for other runs the encoder that the head was trained with. DiST's holds the
    whole CLIP, which DiST does not change.

    Example: `mote-cli export first --format onnx --out first.onnx`
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r} is unknown: {one_of(format, FORMATS)}")
    if out.is_dir():
        raise UserError(f"{out} is a folder: --out takes the file to write")
    workspace = options.workspace(root)
    if run != MEAN_OF_FRAMES:
        workspace.choose_run(run)
    # Until here nothing imports torch, so that what is named wrong is said at once.
    from heads.compatibility import check_encoder
    from heads.files.head_file import choose_head, save_head
    from heads.files.imported_run import exported_tower, imported_tower
    from heads.files.portable import merged_head, require_one_class, save_onnx
    from heads.files.run_files import describe_run
    from heads.methods.registry import method
    from heads.prediction.pixel_encoder import encoder_of_head
    from pipeline.encoders.fingerprint import fingerprint
    from pipeline.encoders.tuned import original_clip, require_openai_function, tower_of

    head, run_dir = choose_head(workspace, run)
    if head is None:
        raise UserError(f"{run} means the mean of frames, which has nothing to export")
    chosen, origin = method(head.config.kind), head.origin
    official, encoders = chosen.checkpoint, workspace.root / "encoders"
    spec = encoder or (None if origin is None else origin.encoder)

    def loaded(load: Callable[[str], Loaded]) -> Loaded:
        if spec is None:
            raise UserError(f"run {run} records no encoder: name it with --encoder SPEC")
        try:
            return load(spec)
        except UserError as error:
            raise UserError(f"run {run}: {error}; name its encoder with --encoder") from error

    if format == "official" and official is None:
        raise UserError(f"{chosen.title}: there is nothing to export in the official format")
    if format == "safetensors":
        save_head(merged_head(head), out)
    elif chosen.adapts and format == "official":
        official.write(out, head)
    elif chosen.pixels:
        own = loaded(lambda name: encoder_of_head(head, name, "fp32", "cpu", encoders))
        if origin is not None:
            check_encoder(origin, str(spec), own.fingerprint)
        if format == "onnx":
            save_onnx(head, out, own.image_tower)
        else:
            require_openai_function(own.model, own.model_config, str(spec))
            official.write(out, head, own.model.state_dict())
    elif format == "onnx":
        save_onnx(head, out)
    else:
        require_one_class(head)
        found = (imported_tower if chosen.taught else exported_tower)(run_dir)
        if found is None:
            clip = loaded(lambda name: original_clip(name, encoders))
            if origin is not None:
                check_encoder(origin, str(spec), fingerprint(clip.model, clip.model_config))
            found = tower_of(clip), max(0, describe_run(run_dir)["epochs_done"] - 1)
        official.write(out, head, *found)
    name = workspace.head_name(run_dir)
    summary = {"run": name, "format": format, "file": str(out), "bytes": out.stat().st_size}
    report(json, summary, {"file": f"{out} ({summary['bytes']} bytes)", "head": name})
