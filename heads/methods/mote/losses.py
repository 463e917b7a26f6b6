"""The training objective of MoTE.

B = batch, T = frames, D = embedding width, C = training classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from heads.methods.classification import classification_loss


class TrainingPass(NamedTuple):
    """The tensors that the loss of one training step is computed from."""

    expert_cosines: Tensor
    """[B,C] cosines of the expert pass (of the only pass for kind "transformer")."""
    merged_cosines: Tensor | None
    """[B,C] cosines of the merged pass; None for kind "transformer"."""
    merged_features: Tensor | None
    """[B,T,D] output of the merged pass; None for kind "transformer"."""


class LossTerms(NamedTuple):
    """Scalar losses of one step; `total` is the weighted sum, the others are unweighted."""

    total: Tensor
    expert: Tensor
    merged: Tensor
    feature: Tensor


def mote_loss(
    training_pass: TrainingPass,
    features: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    *,
    expert_weight: float = 1.0,
    merged_weight: float = 0.5,
    feature_weight: float = 0.1,
    logit_bias: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> LossTerms:
    """Cross-entropy of the expert pass, of the merged pass, and the merged features' distance to x.

    `features` [B,T,D] are the CLIP features the pass was given, `labels` [B] int64, `logit_scale`
    the multiplier (already exponentiated); labels [B,C] of several classes a video, `logit_bias`
    and `class_weights` as `classification_loss` takes them. The distance is the mean square over
    all B*T*D entries; `features` are deliberately not detached, so that in end-to-end training the
    term also pulls on the image tower. Without a merged pass (plain transformer) its two terms are
    0. A weight of 0 leaves a term out of the total; it is still computed, so that it can be
    watched.

    Source: MoTE (Zhu et al., NeurIPS 2024), section 3.3; the weights 1, 0.5 and 0.1 are the
    released code's.
    """
    how = labels, logit_scale, logit_bias, class_weights
    expert = classification_loss(training_pass.expert_cosines, *how)
    total = expert_weight * expert if expert_weight else torch.zeros_like(expert)
    if training_pass.merged_cosines is None or training_pass.merged_features is None:
        nothing = torch.zeros_like(expert)
        return LossTerms(total, expert, nothing, nothing)
    merged = classification_loss(training_pass.merged_cosines, *how)
    target = features.to(training_pass.merged_features.dtype)
    feature = functional.mse_loss(training_pass.merged_features, target)
    if merged_weight:
        total = total + merged_weight * merged
    if feature_weight:
        total = total + feature_weight * feature
    return LossTerms(total, expert, merged, feature)
