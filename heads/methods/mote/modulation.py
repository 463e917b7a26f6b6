"""Temporal Feature Modulation: the further a video is from training, the less the head counts.

B = batch, T = frames, D = embedding width, C = tested classes, S = training classes,
K = neighbours.

Source: MoTE (Zhu et al., NeurIPS 2024), section 3.4, and its released code. Evaluation only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from featstore.errors import UserError
from heads.methods.mote.config import MODULATION_TEMPERATURE, NEIGHBOURS
from heads.methods.text_classifier import video_embeddings


class Modulation(NamedTuple):
    """The scale of each video and what it was computed from."""

    scale: Tensor
    """[B] factor of the head's contribution: exp(-(1 - similarity) / temperature)."""
    similarity: Tensor
    """[B] mean over the tested neighbours of their best match among the training neighbours."""
    pair_similarities: Tensor
    """[B,K,K] dot products, tested neighbours x training neighbours."""
    tested_neighbours: Tensor
    """[B,K] int64 the tested classes nearest to the video, best first."""
    training_neighbours: Tensor
    """[B,K] int64 the training classes nearest to the video, best first."""


def modulation(
    features: Tensor,
    class_embeddings: Tensor,
    training_class_embeddings: Tensor,
    neighbours: int = NEIGHBOURS,
    temperature: float = MODULATION_TEMPERATURE,
) -> Modulation:
    """Return how far the head may move each video, given raw CLIP frame features [B,T,D].

    `class_embeddings` [C,D] (the classes tested) and `training_class_embeddings` [S,D] are used as
    given and should have unit rows. If both lists are the same, the scale is 1 up to rounding.
    The result depends on the class list tested. Raises UserError below K classes on either side.
    """
    require_neighbours(class_embeddings.shape[0], training_class_embeddings.shape[0], neighbours)
    with torch.autocast(features.device.type, enabled=False):
        video = video_embeddings(features)
        tested, training = class_embeddings.to(video), training_class_embeddings.to(video)
        tested_neighbours = (video @ tested.T).topk(neighbours, dim=-1).indices
        training_neighbours = (video @ training.T).topk(neighbours, dim=-1).indices
        pairs = tested[tested_neighbours] @ training[training_neighbours].transpose(-1, -2)
        similarity = pairs.amax(-1).mean(-1)
        scale = torch.exp(-(1 - similarity) / temperature)
    return Modulation(scale, similarity, pairs, tested_neighbours, training_neighbours)


def require_neighbours(tested: int, training: int, neighbours: int = NEIGHBOURS) -> None:
    """Raise UserError unless modulation can find its K neighbours on both sides."""
    if min(tested, training) < neighbours:
        raise UserError(
            f"modulation compares the {neighbours} nearest classes, and there are {tested} tested "
            f"and {training} training classes: name more classes or pass --no-modulate"
        )
