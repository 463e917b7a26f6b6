"""Import a file of adapters as a head of a workspace: MSTA's, or those of MMA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from featstore.commands import ADAPTED_BY
from featstore.errors import UserError, one_line
from featstore.format.class_texts import DEFAULT_PROMPTS
from featstore.progress import ProgressSink
from featstore.workspace import Workspace
from heads.files.head_file import joint_fingerprint
from heads.methods.head import Head, build_head
from heads.methods.msta import METHOD
from heads.methods.msta.head import MstaHead
from heads.methods.msta.official import MstaCheckpoint
from heads.methods.msta.towers import for_clip
from heads.methods.settings import HeadOrigin
from heads.prediction.adapted_encoder import AdaptedEncoder
from pipeline.annotations.class_names import natural_class_name
from pipeline.encoders.fingerprint import fingerprint
from pipeline.encoders.sources import load_clip
from pipeline.encoders.specs import lasting_spec

PROMPTS = METHOD.prompts or DEFAULT_PROMPTS


def adapted_head(
    checkpoint: MstaCheckpoint,
    workspace: Workspace,
    name: str,
    clip: str | None,
    names: Sequence[str] | None,
    frames: int | None,
    device: str,
    progress: ProgressSink,
) -> Head:
    """Return the head of a file of adapters, with its origin.

    `clip` is the spec of the CLIP or ViCLIP that the adapters are for; `names` are the head's
    classes, None if they are not known; `frames` are those of a clip, None: what the file says,
    else those of the ViCLIP, or 8. Raises UserError without a CLIP, and for one that does not fit.
    """
    if clip is None:
        raise UserError(
            f"{one_line(checkpoint.name, 120)} holds adapters alone: name the CLIP that they were "
            "trained with, with --clip SPEC"
        )
    encoders = workspace.root / "encoders"
    spec = lasting_spec(clip, encoders)
    loaded = load_clip(spec, encoders)
    config = checkpoint.build(int(loaded.model_config["embed_dim"]))
    own = int(getattr(loaded.model.visual, "frames", 1))
    wanted = frames or (own if own > 1 and not checkpoint.told else config.frames)
    config = for_clip(replace(config, frames=wanted), loaded.model)
    if own not in (1, wanted):
        raise UserError(
            f"clips of {wanted} frames do not fit {loaded.name}, which looks at {own} together: "
            f"use --frames {own}"
        )
    head = build_head(config, torch.zeros(len(names or ()), config.dim))
    cast(MstaHead, head).adapters.load_state_dict(checkpoint.state)
    bare = fingerprint(loaded.model, loaded.model_config)
    encoder = AdaptedEncoder(loaded, head, "fp32", device)
    if names is not None:
        head.training_class_embeddings = encoder.class_embeddings(names, PROMPTS, progress).cpu()
    head.logit_scale.fill_(math.log(encoder.logit_scale))
    head.origin = HeadOrigin(
        dataset="",
        dataset_fingerprint="",
        encoder=f"{ADAPTED_BY}{name}",
        encoder_fingerprint=joint_fingerprint(bare, head.cpu()),
        encoder_precision="",
        sampling=f"uniform:{config.frames}",
        crops=1,
        preprocessing=encoder.preprocessing.to_json(),
        prompt_set=PROMPTS,
        class_names=None if names is None else tuple(map(natural_class_name, names)),
        frames=1,
        adapted_encoder=spec,
    )
    return head


def described(head: Head, checkpoint: MstaCheckpoint) -> dict[str, Any]:
    """Return what an import says of a head of adapters."""
    config: Any = head.config
    known = "as the file says" if checkpoint.told else "assumed, since the file does not say it"
    return {
        "layers": len(config.layers),
        "width": config.width,
        "parameters": config.parameters,
        "scale": config.scale,
        "parts": f"MSTA, blocks {config.first} to {config.last}, width {config.width}, temporal "
        f"form {config.form}, lambda {config.scale:g} ({known})",
    }
