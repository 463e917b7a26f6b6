"""Publish trained weights as an encoder, a head and the bare tower, which other commands take.

`encoders/RUN` holds the blended towers (the text tower is the original one unless it was trained),
`heads/RUN/tower.safetensors` the unblended tuned ones, and `heads/RUN/head.safetensors` the head
for the published encoder, with the class texts of its text tower. A head that looks at pixels
leaves the tower alone: then `encoders/RUN` is the CLIP as it was, and there is no file of a tuned
tower. A head that adapts both towers is a file alone, and there is no `encoders/RUN`: its encoder
is named "head:RUN".
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from featstore.commands import ADAPTED_BY
from featstore.errors import UserError, WorkError
from featstore.files.durable import durable_path, new_folders
from heads.end_to_end.models.end_to_end_model import EndToEndModel
from heads.files.head_file import joint_fingerprint, save_head, save_tensors
from heads.files.run_files import HEAD_FILE, TOWER_FILE
from heads.methods.registry import method
from heads.methods.settings import HeadOrigin
from heads.methods.weight_files import blended
from heads.training.ranks import Ranks
from heads.training.state import whole_tensors
from pipeline.encoders.fingerprint import fingerprint
from pipeline.encoders.sources import LoadedClip, load_clip, save_open_clip_folder
from pipeline.encoders.tuned import tuned_clip

log = logging.getLogger(__name__)


def publish(
    model: EndToEndModel,
    run_dir: Path,
    encoder_dir: Path,
    *,
    origin: HeadOrigin,
    encoders_dir: Path,
    blend: float,
    epoch: int,
    epoch_choice: str,
    ranks: Ranks,
) -> str:
    """Write encoder, tower and head; return the fingerprint of the published encoder.

    `origin` is the head's origin, except that its encoder is the CLIP that the training began with,
    as it was then. `epoch` counts from 1, and `epoch_choice` tells how it was chosen. Every process
    must call this. The head is written last: encoder and head appear together or, if writing fails,
    not at all; if the process is killed between the two, the same call completes them. Raises
    WorkError if the CLIP has changed since, or if another encoder of that name was made.
    """
    chosen = method(model.head.config.kind)
    pixels, adapts = chosen.pixels, chosen.adapts
    tower_state = {f"visual.{name}": v for name, v in model.image_tower.state_dict().items()}
    text_state = {} if model.texts is None else model.texts.state_dict()
    trained = (
        {} if pixels or adapts else {**tower_state, **text_state, "logit_scale": model.logit_scale}
    )
    tower = whole_tensors(trained.items(), ranks)
    head_state = whole_tensors(model.head.state_dict().items(), ranks)

    @torch.no_grad()
    def classes_of(tuned: LoadedClip) -> Tensor:
        if model.texts is not None:
            return model.texts.embeddings_by(tuned.model)
        fixed = model.head.training_class_embeddings
        return model.class_embeddings(fixed).cpu()

    def write() -> str:
        original = load_clip(origin.encoder, encoders_dir)
        if fingerprint(original.model, original.model_config) != origin.encoder_fingerprint:
            raise WorkError(
                f"encoder {origin.encoder} is no longer the one that the run began with: put it "
                "back, then run the same command with --resume"
            )
        if pixels or adapts:
            tuned = replace(original, name=encoder_dir.name)
            scale = cast(Tensor, original.model.logit_scale).detach().float()
        else:
            parts = blended(tower, original.model.state_dict(), blend)
            tuned, scale = tuned_clip(original, parts, encoder_dir.name), parts["logit_scale"]
        published = fingerprint(tuned.model, tuned.model_config)
        shape = model.head.config
        head = method(shape.kind).head(shape, head_state["training_class_embeddings"].shape[0])
        if "logit_bias" in head_state:
            head.take_several_classes()
        head.load_state_dict(head_state | {"training_class_embeddings": classes_of(tuned)})
        head.logit_scale.copy_(scale)
        seen = joint_fingerprint(published, head) if pixels or adapts else published
        own = f"{ADAPTED_BY}{run_dir.name}" if adapts else encoder_dir.name
        head.origin = replace(origin, encoder=own, encoder_fingerprint=seen)
        if adapts:  # what it needs besides is the CLIP where it lies
            save_head(head.eval(), run_dir / HEAD_FILE)
            return seen
        if not pixels:
            facts = {"epoch": epoch - 1, "blend": blend, "epoch_choice": epoch_choice}
            facts |= {"text_tower": True} if text_state else {}
            save_tensors(run_dir / TOWER_FILE, tower, facts)
        with durable_path(run_dir / HEAD_FILE) as head_file:
            save_head(head.eval(), head_file)
            _place_encoder(tuned, encoder_dir, published, encoders_dir.parent)
        return seen

    return ranks.only_first(write)


def _place_encoder(tuned: LoadedClip, encoder_dir: Path, published: str, root: Path) -> None:
    if encoder_dir.exists():  # placed by a process that was killed before the head was
        there = _fingerprint_of(encoder_dir)
        if there != published:
            raise WorkError(
                f"{encoder_dir} was made by something else since the run began: move it away, "
                "then run the same command with --resume"
            )
        return
    with new_folders(root / f".publishing-{encoder_dir.name}", encoder_dir) as (folder,):
        save_open_clip_folder(
            tuned.model.cpu(), tuned.model_config, tuned.preprocess_config, folder
        )


def _fingerprint_of(encoder_dir: Path) -> str | None:
    try:
        clip = load_clip(str(encoder_dir))
    except (UserError, WorkError):
        return None
    return fingerprint(clip.model, clip.model_config)
