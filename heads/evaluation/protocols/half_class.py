"""Half-class evaluation on ten random halves of the classes, drawn as Text4Vis, BIKE and MoTE do.

N = videos, V = views, D = embedding width, C = classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import UserError
from heads.methods.text_classifier import class_cosines
from heads.scoring import TOP_K
from heads.scoring.scores import fuse_views, percent, ranks


@dataclass(frozen=True)
class HalfClassResult:
    """Accuracy in percent on ten random halves of the classes; std is the population's."""

    split_top1: tuple[float, ...]
    split_top5: tuple[float, ...]
    mean_top1: float
    std_top1: float
    mean_top5: float
    std_top5: float
    full_top1: float
    full_top5: float


def half_class_draws(
    labels: npt.NDArray[np.integer], classes: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield (videos kept, candidate classes) of each of the ten draws, both int64 and ascending.

    `labels` [N] are the true classes. For s = 0..9 NumPy's legacy generator, seeded with s,
    permutes the C `classes`; the videos of the first C // 2 are kept, and the candidates are the
    classes of these videos. UserError when a half has fewer than five classes with videos.
    """
    for seed in range(10):
        # the protocol is defined by this generator
        half = np.random.RandomState(seed).permutation(classes)[: classes // 2]
        kept = np.flatnonzero(np.isin(labels, half)).astype(np.int64)
        candidates = np.unique(labels[kept]).astype(np.int64)
        if len(candidates) < TOP_K:
            raise UserError(
                f"half-class split {seed} has videos of {len(candidates)} classes: the protocol "
                f"needs at least {TOP_K} for its top-5; use a larger data set"
            )
        yield kept, candidates


def half_class_accuracy(
    view_embeddings: Tensor, class_embeddings: Tensor, labels: Tensor | npt.NDArray[np.integer]
) -> HalfClassResult:
    """Measure the half-class protocol on given video features.

    `view_embeddings` [N,V,D], `class_embeddings` [C,D], `labels` [N]. `half_class_draws` makes the
    draws and lists the errors; scores are mean cosines over views.
    """
    truth = torch.as_tensor(labels).to(torch.int64).cpu()
    embeddings = functional.normalize(view_embeddings.cpu().double(), dim=-1)
    scores = fuse_views(class_cosines(embeddings, class_embeddings.cpu()), "cosine")
    places = [ranks(scores, truth)]
    for kept, candidates in half_class_draws(truth.numpy(), class_embeddings.shape[0]):
        local = torch.from_numpy(np.searchsorted(candidates, truth[kept].numpy()))
        places.append(ranks(scores[kept][:, candidates], local))
    full_top1, *top1 = (percent(place < 1) for place in places)
    full_top5, *top5 = (percent(place < TOP_K) for place in places)
    return HalfClassResult(
        split_top1=tuple(top1),
        split_top5=tuple(top5),
        mean_top1=float(np.mean(top1)),
        std_top1=float(np.std(top1)),
        mean_top5=float(np.mean(top5)),
        std_top5=float(np.std(top5)),
        full_top1=full_top1,
        full_top5=full_top5,
    )
