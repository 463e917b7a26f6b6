"""From views to scores to accuracy: fusing views, ranking classes, half-class evaluation.

N = videos, V = views, T = frames, D = embedding width, C = classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from featstore.errors import UserError
from heads.model import TemporalHead
from heads.text_classifier import class_cosines

log = logging.getLogger(__name__)

Fusion = Literal["softmax", "cosine", "features"]
"""How views become one score: mean of softmax over cosines (MoTE, X-CLIP, ViFi-CLIP), mean of
cosines, or cosines of the mean video feature (Text4Vis)."""

TOP_K = 5
HALF_CLASS_SPLITS = 10
BATCH_FRAMES = 4096  # frames per forward pass: large enough for the cores, small in memory


@torch.no_grad()
def view_features(
    head: TemporalHead, features: Tensor, class_embeddings: Tensor, modulate: bool = True
) -> Tensor:
    """Video feature of every view, [N,V,T,D] -> [N,V,D], not normalised, on the head's device."""
    videos, views, frames, _ = features.shape
    classes = class_embeddings.to(head.logit_scale.device)
    flat = features.flatten(0, 1)
    parts = [
        head.aggregate(part.to(classes.device), classes if modulate else None).mean(1)
        for part in torch.split(flat, max(1, BATCH_FRAMES // frames))
    ]
    return torch.cat(parts).view(videos, views, -1)


def view_cosines(
    head: TemporalHead, features: Tensor, class_embeddings: Tensor, modulate: bool = True
) -> Tensor:
    """Cosine of every view with every class, [N,V,T,D] and [C,D] -> [N,V,C]."""
    embeddings = functional.normalize(
        view_features(head, features, class_embeddings, modulate), dim=-1
    )
    return class_cosines(embeddings, class_embeddings)


def fuse_views(cosines: Tensor, how: Fusion = "softmax") -> Tensor:
    """Scores [N,C] float64 from the cosines of views [N,V,C].

    "softmax": mean over views of softmax over classes, without a logit scale, as the released
    code does (its second softmax changes no ranking and is left out). float64, because in float32
    the almost uniform scores of 400 classes tie.
    """
    if how == "softmax":
        return cosines.double().softmax(-1).mean(1)
    if how == "cosine":
        return cosines.double().mean(1)
    raise ValueError(f"cosines cannot be fused by {how!r}: it needs the features, use `fused`")


def fused(views: Tensor, class_embeddings: Tensor, how: Fusion = "softmax") -> Tensor:
    """Scores [N,C] float64 from video features of views [N,V,D] and class embeddings [C,D]."""
    if how not in get_args(Fusion):
        raise UserError(f"fusion {how!r} is unknown: choose one of {', '.join(get_args(Fusion))}")
    if how == "features":
        embedding = functional.normalize(views.double().mean(1), dim=-1)
        return class_cosines(embedding, class_embeddings)
    return fuse_views(class_cosines(functional.normalize(views, dim=-1), class_embeddings), how)


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Place of the true class, 0 = best, int64 [N], from scores [N,C] and labels [N].

    Ties go to the class of lower index, so that the result does not depend on a sort.
    """
    truth = scores.gather(1, labels[:, None])
    lower = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > truth) | ((scores == truth) & lower)).sum(1)


def topk(scores: Tensor, labels: Tensor, k: int) -> float | None:
    """Percent of videos whose true class is among the k best; None with fewer than k classes."""
    if scores.shape[1] < k:
        return None
    return percent(ranks(scores, labels) < k)


def percent(hits: Tensor) -> float:
    """Share of true values in percent."""
    return 100.0 * float(hits.double().mean())


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


def half_class_accuracy(
    view_embeddings: Tensor, class_embeddings: Tensor, labels: Tensor | npt.NDArray[np.integer]
) -> HalfClassResult:
    """The half-class protocol of Text4Vis, BIKE and MoTE.

    `view_embeddings` [N,V,D], `class_embeddings` [C,D], `labels` [N]. For s = 0..9 NumPy's legacy
    generator seeded with s permutes the classes; videos of the first C // 2 are kept, and the
    candidates are the classes that occur among them. Scores are mean cosines over views.
    Raises UserError when a half has fewer than five classes with videos.
    """
    truth = torch.as_tensor(labels).to(torch.int64).cpu()
    embeddings = functional.normalize(view_embeddings.cpu().double(), dim=-1)
    scores = fuse_views(class_cosines(embeddings, class_embeddings.cpu()), "cosine")
    classes = class_embeddings.shape[0]
    top1, top5 = [], []
    for seed in range(HALF_CLASS_SPLITS):
        # the protocol is defined by this generator
        half = np.random.RandomState(seed).permutation(classes)[: classes // 2]
        kept = torch.isin(truth, torch.from_numpy(half))
        candidates, local = torch.unique(truth[kept], return_inverse=True)
        if len(candidates) < TOP_K:
            raise UserError(
                f"half-class split {seed} has videos of {len(candidates)} classes: the protocol "
                f"needs at least {TOP_K} for its top-5; use a larger data set"
            )
        place = ranks(scores[kept][:, candidates], local)
        top1.append(percent(place < 1))
        top5.append(percent(place < TOP_K))
    place = ranks(scores, truth)
    return HalfClassResult(
        split_top1=tuple(top1),
        split_top5=tuple(top5),
        mean_top1=float(np.mean(top1)),
        std_top1=float(np.std(top1)),
        mean_top5=float(np.mean(top5)),
        std_top5=float(np.std(top5)),
        full_top1=percent(place < 1),
        full_top5=percent(place < TOP_K),
    )


def can_modulate(head: TemporalHead, named: int) -> bool:
    """Whether modulation is possible with `named` tested classes; logged where it is not."""
    trained = head.training_class_embeddings.shape[0]
    needed = head.config.modulation_neighbours
    if not head.config.modulates or min(named, trained) >= needed:
        return True
    log.warning(
        "modulation is off: it compares the %d nearest classes, and %d were named, %d trained on",
        *(needed, named, trained),
    )
    return False


def predict_scores(
    head: TemporalHead,
    features: Tensor,
    class_embeddings: Tensor,
    class_names: Sequence[str],
    modulate: bool = True,
) -> list[tuple[str, float]]:
    """Classes of one video, best first, with scores that add up to 1.

    `features` [V,T,D], `class_embeddings` [C,D] in the order of `class_names`. A score is the
    softmax over classes of (logit scale * cosine), averaged over views; unlike the scores of
    evaluation it uses the logit scale, so that it reads as the model's confidence. With fewer than
    five classes, named or trained on, modulation is skipped and that is logged.
    """
    if not class_names or len(class_names) != class_embeddings.shape[0]:
        raise UserError(
            f"{len(class_names)} class names for {class_embeddings.shape[0]} class embeddings: "
            "name at least one class, each with its embedding"
        )
    modulate = modulate and can_modulate(head, len(class_names))
    cosines = view_cosines(head, features[None], class_embeddings, modulate)[0]
    scale = head.logit_scale.double().exp()
    scores = (scale * cosines.double()).softmax(-1).mean(0).tolist()
    named = zip(class_names, scores, strict=True)
    return sorted(named, key=lambda pair: -pair[1])
