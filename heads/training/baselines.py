"""The cheap baselines: heads that are fitted in one go, and what they reach on the same features.

n = videos, V = views, F = frames, D = embedding width, C = classes.
"""

from __future__ import annotations

import time
from typing import Any, Final

import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from featstore.format.schema import RowArray
from featstore.progress import ProgressSink, no_progress
from featstore.reading.store import Store
from featstore.segments import segment_positions
from heads.methods.head import CLIP_LOGIT_SCALE, Head, build_head
from heads.methods.own_classes import OwnClassesHead
from heads.methods.registry import method
from heads.methods.text_classifier import video_embeddings
from heads.scoring.average_precision import mean_average_precision
from heads.scoring.scores import percent
from heads.scoring.view_summaries import BATCH_FRAMES, summarise_store

BASELINES: Final = ("linear", "knn")
"""The methods that `baseline_accuracies` fits."""


def fit_on_store(
    head: Head,
    store: Store,
    rows: RowArray,
    labels: RowArray,
    frames: int,
    seed: int,
    *,
    progress: ProgressSink = no_progress,
) -> dict[str, Any]:
    """Fit `head`, on its device, on array rows and their labels [n]; return its metrics record.

    A video is the mean of its views, each of `frames` stored frames, those that evaluation takes.
    """
    started = time.monotonic()
    chosen = None
    if frames < store.schema.frames:
        chosen = segment_positions(store.schema.frames, frames)
    blocks = summarise_store(store, head, rows, frames=chosen, progress=progress)
    views = torch.cat([functional.normalize(found.features, dim=-1) for _, found in blocks])
    truth = torch.from_numpy(labels).to(views.device)
    facts = head.fit(video_embeddings(views), truth, seed)
    done = {"samples": len(rows), "seconds": time.monotonic() - started}
    return {"epoch": 1, "loss": None, **facts, **done}


def baseline_accuracies(
    train: Tensor | npt.NDArray[Any],
    train_labels: Tensor | npt.NDArray[Any],
    validation: Tensor | npt.NDArray[Any],
    validation_labels: Tensor | npt.NDArray[Any],
    class_embeddings: Tensor | npt.NDArray[Any],
    *,
    logit_scale: float = CLIP_LOGIT_SCALE,
    seed: int = 0,
) -> dict[str, float]:
    """Fit every baseline on training videos; return its top-1 on validation videos, in percent.

    `train` and `validation` are frame features, floating [n,F,D]; labels are int64 [n], indices
    into `class_embeddings` [C,D]. With labels [n,C] of several classes a video it is the mean
    average precision. `logit_scale` is the encoder's multiplier of cosines.
    """
    classes = torch.as_tensor(class_embeddings).float()
    known, truth = torch.as_tensor(train_labels).long(), torch.as_tensor(validation_labels).long()
    learnt, asked = _embeddings(train), _embeddings(validation)
    found = {}
    several = known.ndim == 2
    for name in BASELINES:
        config = method(name).config(dim=classes.shape[1])
        head = build_head(config, classes, logit_scale=logit_scale)
        assert isinstance(head, OwnClassesHead)
        if several:
            head.take_several_classes()
        head.fit(learnt, known, seed)
        scores = head.own_scores(asked)
        if several:
            found[name] = mean_average_precision(scores.numpy(), truth.bool().numpy())
        else:
            found[name] = percent(scores.argmax(1) == truth)
    return found


def _embeddings(features: Tensor | npt.NDArray[Any]) -> Tensor:
    """Return the unit embeddings [n,D] of videos, from frame features [n,F,D]."""
    frames = torch.as_tensor(features)
    step = max(1, BATCH_FRAMES // frames.shape[1])
    return torch.cat([video_embeddings(part.float()) for part in torch.split(frames, step)])
