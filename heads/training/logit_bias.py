"""Where a head for several classes a video begins: its first bias.

n = videos, S = training classes.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featstore.format.class_texts import ClassText
from featstore.format.schema import RowArray
from featstore.reading.store import Store
from featstore.segments import segment_positions
from heads.compatibility import mean_head
from heads.scoring.scores import view_cosines
from heads.training.training_set import renumbered
from heads.training.validation import judged_features

MOST_SEEN: Final = 2000
"""Training videos that the first bias is fitted to; evenly chosen from more."""
_STEPS: Final = 60  # bisections; the bias is then as exact as float32


def first_bias(
    store: Store, rows: RowArray, classes: npt.ArrayLike | None, frames: int, text: ClassText
) -> float:
    """Return the bias for a new head trained on array rows `rows`: that of the mean of frames.

    `classes` and `text` are those trained on, `frames` are taken of each view.
    """
    some = rows[segment_positions(len(rows), min(len(rows), MOST_SEEN))]
    features, some = judged_features(store, some, frames)
    scale = store.provenance.logit_scale
    mean = mean_head(store.provenance.dim, scale)
    cosines = view_cosines(mean, features, torch.from_numpy(text.embeddings), False).mean(1)
    return starting_bias(cosines, renumbered(store, some, classes), scale)


def starting_bias(cosines: Tensor, labels: RowArray, logit_scale: float) -> float:
    """Return the bias with which as many classes are expected as the videos show.

    `cosines` [n,S] are those of the head that training starts from, labels [n,S] of zeros and ones:
    the mean of sigmoid(scale * cosine + bias) is then the share of ones.
    """
    share = float(np.clip(labels.mean(), 1e-4, 1 - 1e-4))
    logits = logit_scale * cosines.double()
    low, high = -float(logits.max()) - 20.0, -float(logits.min()) + 20.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if float((logits + middle).sigmoid().mean()) < share:
            low = middle
        else:
            high = middle
    return (low + high) / 2
