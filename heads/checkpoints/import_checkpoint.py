"""Import weights released by a method's authors as an encoder and a head of a workspace."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from featstore.errors import UserError, WorkError, counted
from featstore.files.durable import new_folders, write_json
from featstore.format.class_texts import DEFAULT_PROMPTS
from featstore.progress import ProgressSink, no_progress
from featstore.workspace import Workspace
from heads.arithmetic import resolve_device
from heads.checkpoints.import_dist import PROMPTS, clip_of, dist_head
from heads.checkpoints.import_msta import adapted_head, described
from heads.files.head_file import save_head, save_tensors
from heads.files.imported_run import require_class_names
from heads.files.run_files import CONFIG_FILE, HEAD_FILE, TOWER_FILE
from heads.methods.dist.official import DistCheckpoint
from heads.methods.head import Head
from heads.methods.mote.official import BLEND, import_official_checkpoint
from heads.methods.msta.official import MstaCheckpoint
from heads.methods.registry import read_checkpoint, require_run_name
from heads.methods.settings import HeadOrigin
from heads.methods.taco import METHOD
from heads.methods.taco.official import TacoCheckpoint
from heads.prediction.pixel_encoder import DistEncoder
from pipeline.annotations.class_names import natural_class_name
from pipeline.annotations.label_names import read_names
from pipeline.clip_encoder import Encoder
from pipeline.encoders.sources import LoadedClip, clip_of_state, save_open_clip_folder
from pipeline.encoders.tuned import (
    original_clip,
    published_clip,
    text_attention_heads,
    tower_of,
    tuned_clip,
)

OWN_CLIP: Final = "the file's own"


def import_checkpoint(
    workspace: Workspace,
    file: Path,
    name: str,
    *,
    clip: str | None = None,
    class_names_file: Path | None = None,
    blend: float | None = None,
    attention_heads: int | None = None,
    frames: int | None = None,
    selected_layers: Sequence[int] | None = None,
    device: str = "auto",
    progress: ProgressSink = no_progress,
) -> dict[str, Any]:
    """Make encoders/`name` and heads/`name` from a checkpoint; either both appear or neither.

    `clip` is the spec of the CLIP that the tower was tuned from; None means OpenAI's CLIP of the
    same shape. `blend` is the share of the tuned tower, 0.99 by default; the rest is the tower of
    that CLIP. `frames` are those of a view in training, 8 by default. TACO's file holds its whole
    CLIP, which is taken as it is, and nothing of its classes. For DiST, whose CLIP is never
    tuned and whose file says the rest, `selected_layers` are the blocks of the tower that its
    branch reads, counted from 0; they are needed if it reads some only and the file does not say.
    `class_names_file`, CSV `id,name`, names the training classes, which are checked against the
    features in the checkpoint; `progress` counts their sentences. Returns the facts of the import,
    JSON-ready. Raises UserError for a name in use, for a file, a CLIP or names that do not fit, and
    for a setting that the file's method does not have, WorkError if the CLIP is not available.
    """
    require_run_name(name)
    for folder in (workspace.encoder_dir(name), workspace.run_dir(name)):
        if folder.exists():
            raise UserError(f"{folder} exists already: choose another --name or remove it")
    names = None if class_names_file is None else tuple(read_names(class_names_file).values())
    chosen, checkpoint = read_checkpoint(file)
    others: dict[str, object] = {"selected_layers": selected_layers}
    if chosen.adapts:
        others |= {"blend": blend, "attention_heads": attention_heads}
    if chosen.pixels:
        others = {"blend": blend, "attention_heads": attention_heads, "frames": frames}
    elif isinstance(checkpoint, TacoCheckpoint):  # it holds all of its CLIP
        others |= {"clip": clip, "blend": blend, "attention_heads": attention_heads}
    if strange := [f"--{key.replace('_', '-')}" for key, v in others.items() if v is not None]:
        raise UserError(
            f"{', '.join(strange)} means nothing for {file}, a checkpoint of {chosen.title}: leave "
            "it out"
        )
    if isinstance(checkpoint, MstaCheckpoint):
        return _import_adapters(
            *(workspace, file, name, checkpoint, clip, names, frames, device, progress),
        )
    if isinstance(checkpoint, DistCheckpoint):
        if selected_layers is not None:
            checkpoint = DistCheckpoint.read(file, selected_layers)
        return _import_dist(workspace, file, name, checkpoint, clip, names, device, progress)
    frames = frames or 8
    if isinstance(checkpoint, TacoCheckpoint):
        return _import_taco(workspace, file, name, checkpoint, frames, names, device, progress)
    blend = BLEND if blend is None else blend
    spec = clip or published_clip(checkpoint.tower_state)
    try:
        original = original_clip(spec, workspace.root / "encoders")
    except WorkError as error:
        raise WorkError(f"{error}; or name the original CLIP with --clip SPEC") from error
    imported = import_official_checkpoint(
        checkpoint, tower_of(original), blend, attention_heads or text_attention_heads(original)
    )
    tuned = tuned_clip(original, imported.tower_state, name)
    encoder = Encoder(tuned, "fp32", resolve_device(device).type)
    head = imported.head
    if names is not None:
        embeddings = encoder.class_embeddings(names, DEFAULT_PROMPTS, progress)
        require_class_names(head, names, embeddings.cpu())
    head.origin = _origin(encoder, name, names, frames)
    facts = {
        "file": file.name,
        "sha256": _digest(file),
        "epoch": imported.epoch,
        "clip": spec,
        "blend": blend,
        "logit_scale": imported.logit_scale,
    }
    # The unblended tower stays beside the head, for an export that is the same to the bit.
    tower = checkpoint.tower_state, {"epoch": checkpoint.epoch}
    return _written(workspace, name, tuned, head, facts, tower) | {
        "encoder_fingerprint": encoder.fingerprint,
        "layers": head.config.layers,
        "experts": head.config.experts,
        "attention_heads": head.config.attention_heads,
        "class_names_known": names is not None,
        "frames": frames,
        "tower": f"{blend:g} of {file.name}, the rest {spec}",
        "parts": ", ".join(
            counted(*part)
            for part in (
                (head.config.layers, "layer"),
                (head.config.experts, "expert"),
                (head.config.attention_heads, "attention head"),
            )
        )
        + f", epoch {imported.epoch}",
    }


def _import_dist(
    workspace: Workspace,
    file: Path,
    name: str,
    checkpoint: DistCheckpoint,
    clip: str | None,
    names: tuple[str, ...] | None,
    device: str,
    progress: ProgressSink,
) -> dict[str, Any]:
    """As `import_checkpoint`, for a checkpoint of DiST: its CLIP is frozen and never blended."""
    where = resolve_device(device).type
    loaded, imported = clip_of(checkpoint, workspace, clip, name)
    text = Encoder(loaded, "fp32", where)
    head = dist_head(imported, text, names, progress)
    encoder = DistEncoder(loaded, head, "fp32", where)
    config, frames = head.config, head.config.dense_frames
    head.origin = replace(
        _origin(encoder, name, names, frames), sampling=f"dist:{frames}x1", prompt_set=PROMPTS
    )
    facts = {
        "file": file.name,
        "sha256": _digest(file),
        "epoch": imported.epoch,
        "clip": clip or OWN_CLIP,
        "logit_scale": text.logit_scale,
    }
    return _written(workspace, name, loaded, head, facts) | {
        "encoder_fingerprint": encoder.fingerprint,
        "layers": len(config.selected_layers),
        "pooling_layers": config.pooling_layers,
        "class_names_known": names is not None,
        "frames": frames,
        "tower": "as it is" if clip is None else f"the CLIP {clip}",
        "parts": f"DiST, {config.slow_frames}+{frames} frames, {len(config.selected_layers)} "
        f"layers, {config.pooling_layers} pooling blocks",
    }


def _import_taco(
    workspace: Workspace,
    file: Path,
    name: str,
    checkpoint: TacoCheckpoint,
    frames: int,
    names: tuple[str, ...] | None,
    device: str,
    progress: ProgressSink,
) -> dict[str, Any]:
    """As `import_checkpoint`, for a checkpoint of TACO, which holds a whole CLIP: never blended."""
    loaded = clip_of_state(checkpoint.clip_state, name, tuned=True)
    encoder = Encoder(loaded, "fp32", resolve_device(device).type)
    prompts = METHOD.prompts or DEFAULT_PROMPTS
    classes = None
    if names is not None:
        classes = encoder.class_embeddings(names, prompts, progress).cpu()
    imported = checkpoint.build(classes)
    head = imported.head
    head.origin = replace(_origin(encoder, name, names, frames), prompt_set=prompts)
    facts = {
        "file": file.name,
        "sha256": _digest(file),
        "epoch": imported.epoch,
        "weights": imported.which,
        "clip": OWN_CLIP,
        "logit_scale": encoder.logit_scale,
    }
    # The export takes the CLIP from here, as it does a tower that was blended.
    tower = checkpoint.clip_state, {"epoch": imported.epoch}
    which = f"the {imported.which} weights" if imported.which else "weights of unknown kind"
    projection = "without" if head.projection is None else "with its"
    return _written(workspace, name, loaded, head, facts, tower) | {
        "encoder_fingerprint": encoder.fingerprint,
        "class_names_known": names is not None,
        "frames": frames,
        "tower": f"both towers of {file.name}, {which} of the training",
        "parts": f"TACO {projection} projection, epoch {imported.epoch}",
    }


def _written(
    workspace: Workspace,
    name: str,
    loaded: LoadedClip,
    head: Head,
    facts: dict[str, Any],
    tower: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write the folders of a CLIP and its head, and return what is known of them."""
    folders = workspace.encoder_dir(name), workspace.run_dir(name)
    assert head.origin is not None
    described = {"head": head.config.to_json(), "data": head.origin.to_json(), "imported": facts}
    with new_folders(workspace.root / f".importing-{name}", *folders) as made:
        encoder_folder, run_folder = made
        save_open_clip_folder(
            loaded.model.cpu(), loaded.model_config, loaded.preprocess_config, encoder_folder
        )
        if tower is not None:
            save_tensors(run_folder / TOWER_FILE, *tower)
        save_head(head.cpu(), run_folder / HEAD_FILE)
        write_json(run_folder / CONFIG_FILE, described)
    return {
        "name": name,
        "encoder": str(folders[0]),
        "head": str(folders[1]),
        **facts,
        "dim": head.config.dim,
        "n_classes": len(head.training_class_embeddings),
    }


def _import_adapters(
    workspace: Workspace,
    file: Path,
    name: str,
    checkpoint: MstaCheckpoint,
    clip: str | None,
    names: tuple[str, ...] | None,
    frames: int | None,
    device: str,
    progress: ProgressSink,
) -> dict[str, Any]:
    """As `import_checkpoint`, for a file of adapters: their CLIP stays where it is."""
    where = resolve_device(device).type
    head = adapted_head(checkpoint, workspace, name, clip, names, frames, where, progress)
    assert head.origin is not None
    facts = {"file": file.name, "sha256": _digest(file), "clip": head.origin.adapted_encoder}
    config = {
        "head": head.config.to_json(),
        "data": head.origin.to_json(),
        "imported": {**facts, "epoch": None, "logit_scale": float(head.logit_scale.exp())},
    }
    run_dir = workspace.run_dir(name)
    with new_folders(workspace.root / f".importing-{name}", run_dir) as (folder,):
        save_head(head.eval(), folder / HEAD_FILE)
        write_json(folder / CONFIG_FILE, config)
    return {
        "name": name,
        "encoder": head.origin.encoder,
        "head": str(run_dir),
        "encoder_fingerprint": head.origin.encoder_fingerprint,
        **config["imported"],
        "dim": head.config.dim,
        "n_classes": len(names or ()),
        "class_names_known": names is not None,
        "frames": head.config.frames,
        "tower": f"{head.origin.adapted_encoder}, with adapters on both towers",
        **described(head, checkpoint),
    }


def _origin(encoder: Encoder, name: str, names: tuple[str, ...] | None, frames: int) -> HeadOrigin:
    """Return what an imported head knows of its training."""
    return HeadOrigin(
        dataset="",
        dataset_fingerprint="",
        encoder=name,
        encoder_fingerprint=encoder.fingerprint,
        encoder_precision="",
        sampling="",
        crops=1,
        preprocessing=encoder.preprocessing.to_json(),
        prompt_set=DEFAULT_PROMPTS,
        # As data sets write them.
        class_names=None if names is None else tuple(map(natural_class_name, names)),
        frames=frames,
    )


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
