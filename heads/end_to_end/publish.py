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
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final, cast

import torch
from torch import Tensor

from featstore.commands import ADAPTED_BY
from featstore.errors import UserError, WorkError
from featstore.files.durable import durable_path, new_folders, write_bytes
from featstore.files.locks import exclusive
from featstore.workspace import Workspace
from heads.end_to_end.kept_weights import read_weights
from heads.end_to_end.models.end_to_end_model import EndToEndModel
from heads.end_to_end.models.taught_model import in_clip
from heads.end_to_end.run_folder import MODE
from heads.files.head_file import joint_fingerprint, load_head, save_head, save_tensors
from heads.files.run_files import (
    CONFIG_FILE,
    HEAD_FILE,
    KEYS_FILE,
    LOCK_FILE,
    METRICS_FILE,
    TOWER_FILE,
    read_config,
)
from heads.methods.head import Head
from heads.methods.registry import method
from heads.methods.settings import HeadOrigin
from heads.methods.weight_files import blended
from heads.training.ranks import Ranks
from heads.training.state import whole_tensors
from pipeline.clip_encoder import load_encoder
from pipeline.encoders.fingerprint import fingerprint
from pipeline.encoders.sources import LoadedClip, load_clip, save_open_clip_folder
from pipeline.encoders.tuned import tuned_clip
from pipeline.prompts import trained_prompt_set

log = logging.getLogger(__name__)

_HEAD: Final = "head."  # begins the names of the head's parameters in a model


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
    tower_state = {f"visual.{name}": v for name, v in model.image_tower.state_dict().items()}
    text_state = {} if model.texts is None else model.texts.state_dict()
    trained = {**tower_state, **text_state, "logit_scale": model.logit_scale}
    if chosen.keeps_towers:
        trained = {}
    tower = whole_tensors(trained.items(), ranks)
    head_state = whole_tensors(model.head.state_dict().items(), ranks)

    @torch.no_grad()
    def classes_of(tuned: LoadedClip) -> Tensor:
        if model.texts is not None:
            return model.texts.embeddings_by(tuned.model)
        fixed = model.head.training_class_embeddings
        return model.class_embeddings(fixed).cpu()

    def write() -> str:
        original = _original(origin, encoders_dir)
        if chosen.keeps_towers:
            tuned = replace(original, name=encoder_dir.name)
            scale = cast(Tensor, original.model.logit_scale).detach().float()
        else:
            parts = blended(tower, original.model.state_dict(), blend)
            tuned, scale = tuned_clip(original, parts, encoder_dir.name), parts["logit_scale"]
        published = fingerprint(tuned.model, tuned.model_config)
        head = _with_weights(model.head, head_state, classes_of(tuned), scale)
        seen = joint_fingerprint(published, head) if chosen.keeps_towers else published
        own = f"{ADAPTED_BY}{run_dir.name}" if chosen.adapts else encoder_dir.name
        head.origin = replace(origin, encoder=own, encoder_fingerprint=seen)
        if chosen.adapts:  # what it needs besides is the CLIP where it lies
            save_head(head, run_dir / HEAD_FILE)
            return seen
        if not chosen.pixels:
            facts = {"epoch": epoch - 1, "blend": blend, "epoch_choice": epoch_choice}
            facts |= {"text_tower": True} if text_state else {}
            save_tensors(run_dir / TOWER_FILE, tower, facts)
        with durable_path(run_dir / HEAD_FILE) as head_file:
            save_head(head, head_file)
            _place_encoder(tuned, encoder_dir, published, encoders_dir.parent)
        return seen

    return ranks.only_first(write)


def publish_weights(workspace: Workspace, run_dir: Path, which: str) -> Path:
    """Return the folder of the head that has the `which` weights of a finished run with a teacher.

    `which` is one of `WEIGHTS`. The head and its encoder `RUN-WHICH` are made if they are not
    there. Raises UserError if the run keeps no such weights or trained without a teacher,
    WorkError if its CLIP has changed since.
    """
    head, settings = load_head(run_dir), read_config(run_dir) or {}
    chosen, training = method(head.config.kind), settings.get("training", {})
    if not chosen.taught or settings.get("mode") != MODE:
        raise UserError(
            f"run {run_dir.name} has one kind of weights, because {chosen.title} "
            f"{'was imported' if chosen.taught else 'trains without a teacher'}: leave --weights "
            "out"
        )
    if which == training["save"]:
        return run_dir
    folder = run_dir / which
    if (folder / HEAD_FILE).is_file():
        return folder
    weights = read_weights(run_dir, which)
    encoders_dir, name = workspace.root / "encoders", f"{run_dir.name}-{which}"
    with exclusive(run_dir / LOCK_FILE, f"making the {which} weights of {run_dir.name}"):
        own = head.origin
        assert own is not None
        assert own.class_names is not None
        begun = settings["data"]
        origin = replace(
            own, encoder=begun["encoder"], encoder_fingerprint=begun["encoder_fingerprint"]
        )
        original = _original(origin, encoders_dir)
        tower = {in_clip(name): v for name, v in weights.items() if not name.startswith(_HEAD)}
        parts = blended(tower, original.model.state_dict(), training["blend"])
        tuned = tuned_clip(original, parts, name)
        published = fingerprint(tuned.model, tuned.model_config)
        _place_encoder(tuned, workspace.encoder_dir(name), published, workspace.root)
        encoder = load_encoder(name, "fp32", "cpu", encoders_dir)
        prompts = trained_prompt_set(own.prompt_set, own.prompt_templates)
        texts = encoder.class_embeddings(own.class_names, prompts)
        state = {n.removeprefix(_HEAD): v for n, v in weights.items() if n.startswith(_HEAD)}
        made = _with_weights(head, head.state_dict() | state, texts, parts["logit_scale"])
        made.origin = replace(origin, encoder=name, encoder_fingerprint=published)
        for file in (CONFIG_FILE, KEYS_FILE, METRICS_FILE):
            write_bytes(folder / file, (run_dir / file).read_bytes())
        save_head(made, folder / HEAD_FILE)
    return folder


def _original(origin: HeadOrigin, encoders_dir: Path) -> LoadedClip:
    """Load the CLIP that a training began with; WorkError if it is another one now."""
    original = load_clip(origin.encoder, encoders_dir)
    if fingerprint(original.model, original.model_config) != origin.encoder_fingerprint:
        raise WorkError(
            f"encoder {origin.encoder} is no longer the one that the run began with: put it "
            "back, then run the same command with --resume"
        )
    return original


def _with_weights(
    head: Head, state: Mapping[str, Tensor], classes: Tensor, logit_scale: Tensor
) -> Head:
    """Return a copy of a head with other weights and class texts [C,D]."""
    made = method(head.config.kind).head(head.config, len(classes))
    if head.logit_bias is not None:
        made.take_several_classes()
    made.load_state_dict({**state, "training_class_embeddings": classes})
    made.logit_scale.copy_(logit_scale)
    return made.eval()


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
