"""Scores of a video against class texts: cosines, and nothing learned.

B = batch (any leading dimensions), T = frames, D = embedding width, C = classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SAME_CLASS = 0.9999
"""Cosine from which two class embeddings of one encoder stand for the same sentences. The same ones
computed elsewhere agreed to 1e-6; different Kinetics-400 names came up to 0.9993 (a small CLIP)."""


def video_embeddings(frames: Tensor) -> Tensor:
    """Frame embeddings [...,T,D] -> unit video embeddings [...,D]: the mean over frames, scaled.

    Computed in float32 (or wider) outside autocast. A mean of exactly zero stays zero (cosine 0).
    """
    with torch.autocast(frames.device.type, enabled=False):
        return functional.normalize(_at_least_float32(frames).mean(-2), dim=-1)


def class_cosines(embeddings: Tensor, class_embeddings: Tensor) -> Tensor:
    """Unit embeddings [...,D] and class embeddings [C,D] of any length -> cosines [...,C].

    The cosine is formed in float32 (or wider) outside autocast, where the released code under
    autocast rounds it to half precision (logits near 25 are then off by up to 0.01).
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        classes = functional.normalize(class_embeddings.to(embeddings), dim=-1)
        return embeddings @ classes.T


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
