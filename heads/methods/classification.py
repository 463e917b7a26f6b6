"""The loss of classification, with one class a video or several.

B = batch, S = training classes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def classification_loss(
    cosines: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Return the mean over videos of the negative logarithm of the probability of their labels.

    `cosines` [B,S]. Labels int64 [B]: cross-entropy of the scaled cosines; `class_weights` [S]
    multiply the losses of the videos of each class. Labels [B,S] of zeros and ones: every class by
    itself has the probability sigmoid(scale * cosine + bias), as in SigLIP (Zhai et al., ICCV
    2023), and a video's loss is the sum over classes; `class_weights` multiply the terms of classes
    shown.
    """
    logits = logit_scale * cosines
    if labels.ndim == 1:
        if class_weights is None:
            return functional.cross_entropy(logits, labels)
        losses = functional.cross_entropy(logits, labels, reduction="none")
        return (class_weights[labels] * losses).mean()
    if logit_bias is not None:
        logits = logits + logit_bias
    losses = functional.binary_cross_entropy_with_logits(
        logits, labels.to(logits), reduction="none", pos_weight=class_weights
    )
    return losses.sum(1).mean()
