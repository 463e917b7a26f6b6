"""The losses of MSTA: classification, and class texts that stay near descriptions.

B = clips, C = classes, D = embedding width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from heads.methods.classification import classification_loss
from heads.methods.msta.config import MstaConfig
from heads.methods.text_classifier import class_cosines


class MstaLosses(NamedTuple):
    """The loss of a batch and its parts; `consistency` is before it is weighted."""

    total: Tensor
    classification: Tensor
    consistency: Tensor


def consistency_loss(class_embeddings: Tensor, spatial: Tensor, temporal: Tensor) -> Tensor:
    """Return the mean over classes of 2 - cos(class, spatial) - cos(class, temporal), from 0 to 4.

    All are [C,D], of any length: class texts, and the embeddings of their descriptions.
    """
    near = functional.cosine_similarity(class_embeddings, spatial, dim=-1)
    near = near + functional.cosine_similarity(class_embeddings, temporal, dim=-1)
    return (2 - near).mean()


def msta_losses(
    config: MstaConfig,
    video: Tensor,
    labels: Tensor,
    class_embeddings: Tensor,
    descriptions: tuple[Tensor, Tensor] | None,
    logit_scale: Tensor | float,
    class_weights: Tensor | None = None,
) -> MstaLosses:
    """Return the losses of a batch: cross-entropy, and `alpha` times `consistency_loss`.

    `video` [B,D] and `class_embeddings` [C,D] of any length; `labels` int64 [B]; `descriptions`
    spatial and temporal [C,D], None: the second loss is 0; `logit_scale` is the multiplier.
    """
    cosines = class_cosines(functional.normalize(video, dim=-1), class_embeddings)
    right = classification_loss(cosines, labels, logit_scale, class_weights=class_weights)
    return with_descriptions(config, right, labels, class_embeddings, descriptions)


def with_descriptions(
    config: MstaConfig,
    right: Tensor,
    labels: Tensor,
    class_embeddings: Tensor,
    descriptions: tuple[Tensor, Tensor] | None,
) -> MstaLosses:
    """Return the losses of a batch whose cross-entropy is `right`; the rest as `msta_losses`."""
    if descriptions is None:
        return MstaLosses(right, right, right.new_zeros(()))
    chosen = [class_embeddings, *descriptions]
    if config.loss_classes == "batch":
        chosen = [rows[torch.unique(labels)] for rows in chosen]
    near = consistency_loss(*chosen)
    return MstaLosses(right + config.alpha * near, right, near)
