"""Import a DiST checkpoint as an encoder and a head of a workspace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from featstore.errors import UserError, one_line
from featstore.format.class_texts import DEFAULT_PROMPTS
from featstore.progress import ProgressSink
from featstore.workspace import Workspace
from heads.methods.clip_tensors import is_text
from heads.methods.dist import METHOD
from heads.methods.dist.head import DistHead
from heads.methods.dist.official import DistCheckpoint, ImportedDist
from pipeline.clip_encoder import Encoder
from pipeline.encoders.sources import LoadedClip, clip_of_state
from pipeline.encoders.tuned import original_clip

PROMPTS = METHOD.prompts or DEFAULT_PROMPTS


def clip_of(
    checkpoint: DistCheckpoint, workspace: Workspace, clip: str | None, name: str
) -> tuple[LoadedClip, ImportedDist]:
    """Return the CLIP of a checkpoint, and its model.

    `clip` is the spec of the CLIP, which is needed if the file holds the branch alone. Raises
    UserError if it is missing or does not fit.
    """
    whole = any(is_text(key) for key in checkpoint.clip_state)
    if clip is None and not whole:
        raise UserError(
            f"{one_line(checkpoint.name, 120)} holds no whole CLIP: name the CLIP that it was "
            "trained with, with --clip SPEC"
        )
    given = None if clip is None else original_clip(clip, workspace.root / "encoders")
    imported = checkpoint.build(None if given is None else given.model.state_dict())
    if given is None or whole:
        return clip_of_state(imported.clip_state, name), imported
    state = {**given.model.state_dict(), **imported.clip_state}
    given.model.load_state_dict(state)
    return replace(given, name=name), imported


def dist_head(
    imported: ImportedDist, encoder: Encoder, names: Sequence[str] | None, progress: ProgressSink
) -> DistHead:
    """Return the head of a model; `names` are its classes, None if they are not known."""
    classes = torch.zeros(0, imported.config.dim)
    if names is not None:
        classes = encoder.class_embeddings(names, PROMPTS, progress).cpu()
    head = DistHead(imported.config, len(classes))
    head.branch.load_state_dict(imported.model.branch.state_dict())
    head.training_class_embeddings.copy_(classes)
    head.logit_scale.copy_(imported.clip_state["logit_scale"])
    return head.eval()
