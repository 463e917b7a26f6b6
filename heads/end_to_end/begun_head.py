"""The head that a fine-tuning begins with, where it is not drawn at random.

C = classes, D = embedding width.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any, Final

import numpy.typing as npt
import torch
from torch import Tensor

from featstore.errors import UserError
from heads.compatibility import check_encoder
from heads.end_to_end.models.end_to_end_model import EndToEndModel
from heads.files.head_file import joint_fingerprint
from heads.files.imported_run import require_class_names
from heads.methods.head import Head
from heads.methods.registry import method
from heads.methods.text_classifier import class_cosines, video_embeddings
from heads.training.logit_bias import starting_bias
from pipeline.clip_encoder import Encoder
from pipeline.tars.dataset import Dataset
from pipeline.video_clips.stream import EvaluationClips


def continued_head(
    begun: Head, encoder: Encoder, spec: str, dataset: Dataset, classes: Tensor
) -> Head:
    """Return a copy of `begun` with its classes in the data set's order; UserError if it misfits.

    `classes` [C,D] are the class embeddings of the data set.
    """
    if begun.config.dim != encoder.dim:
        raise UserError(
            f"the head takes embeddings of width {begun.config.dim}, the encoder {spec} gives "
            f"{encoder.dim}: begin with the encoder the head was trained on"
        )
    if begun.origin is not None:
        kind = method(begun.config.kind)
        tower = encoder.fingerprint
        if kind.keeps_towers:
            tower = joint_fingerprint(tower, begun)
        check_encoder(begun.origin, spec, tower)
    names = None if begun.origin is None else begun.origin.class_names
    if names is None and not len(begun.training_class_embeddings):
        pass  # imported without class names: it is bound to none
    elif names is None:
        require_class_names(begun, dataset.class_names, classes)
    elif set(names) != set(dataset.class_names):
        raise UserError(
            f"the head was trained on {len(names)} classes that are not the "
            f"{len(dataset.class_names)} of {dataset.name}: begin with a head of this data set, or "
            "without one"
        )
    if begun.logit_bias is not None and not dataset.multi_label:
        raise UserError(
            "the head to begin with gives a video several classes, and the videos of "
            f"{dataset.name} have one each: begin with another head"
        )
    head = method(begun.config.kind).head(begun.config, len(dataset.class_names))
    if begun.logit_bias is not None:
        head.take_several_classes()
    state = begun.state_dict() | {"training_class_embeddings": classes}
    head.load_state_dict({name: value.clone() for name, value in state.items()})
    return head


def first_bias(model: EndToEndModel, seen: EvaluationClips, labels: npt.NDArray[Any]) -> float:
    """Return the bias of a new head for several classes a video, from the first training videos.

    Every process decodes the same ones.
    """
    classes = model.head.training_class_embeddings
    found: list[Tensor] = []
    with torch.no_grad(), closing(seen.batches()) as batches:
        for batch in batches:
            if sum(map(len, found)) >= SEEN_FIRST:
                break
            if len(batch.keys):
                frames = model.encode(batch.frames.to(classes.device))
                found.append(class_cosines(video_embeddings(frames), classes).cpu())
    if not found:
        return 0.0  # training says that no video can be decoded
    return starting_bias(torch.cat(found), labels, float(model.logit_scale.detach().exp()))


SEEN_FIRST: Final = 64
"""Training videos that the first bias of a head for several classes a video is fitted to."""
