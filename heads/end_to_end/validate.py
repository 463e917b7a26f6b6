"""The close-set protocol on videos: what `extract` and `eval` would measure, without a store.

B = videos of a batch, T = frames, s = input size, C = classes. One clip per video, centre crop,
float32; the counts are exact for any number of processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heads.end_to_end.model import EndToEndModel
from heads.scoring.scores import TOP_K, fuse_views
from heads.scoring.scores import ranks as places
from heads.training.ranks import Ranks
from pipeline.tars.dataset import Dataset
from pipeline.video_clips.loader import ClipFailure
from pipeline.video_clips.stream import EvaluationClips

SPLITS = ("val", "test")
"""The first of these that the data set has is evaluated on, as by `eval --closeset`."""


def validation_split(dataset: Dataset) -> str | None:
    """The split to evaluate on; None where the data set has none with videos."""
    return next((s for s in SPLITS if len(dataset.keys_by_split.get(s, ()))), None)


@torch.no_grad()
def validate(
    model: EndToEndModel,
    clips: EvaluationClips,
    class_embeddings: Tensor,
    *,
    split: str,
    ranks: Ranks,
    batch_size: int,
    shape: tuple[int, ...],
    modulate: bool,
    in_step: bool,
) -> tuple[dict[str, Any] | None, list[ClipFailure]]:
    """Accuracy of `model` on `clips` over all processes, and the failures of this one.

    The accuracy is what the run's records hold, in per cent of the evaluated videos (`top5` is None
    with fewer than five classes); None when no clip can be decoded.
    `class_embeddings` [C,D] on the model's device, in the order of labels. `in_step`: every process
    must run the model equally often, those without videos left on a black clip of `shape`.
    """
    training = model.training
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64)  # evaluated, right, right among five
    failed: list[ClipFailure] = []
    passes = 0
    for batch in clips.batches():
        failed += batch.failed
        if not len(batch.keys):
            continue
        passes += 1
        pixels = batch.frames[:, 0].to(ranks.device, non_blocking=True)
        cosines = model(pixels, class_embeddings, modulate)
        scores = fuse_views(cosines.cpu()[:, None])
        place = places(scores, batch.labels)
        counts += torch.stack([torch.tensor(len(place)), (place < 1).sum(), (place < TOP_K).sum()])
    if in_step:
        most = -(-len(range(0, clips.n_listed, ranks.world_size)) // batch_size)  # the first rank's
        black = torch.zeros(1, *shape, device=ranks.device)
        for _ in range(most - passes):
            model(black, class_embeddings, modulate)
    model.train(training)
    evaluated, top1, top5 = ranks.summed(counts).tolist()
    if not evaluated:
        return None, failed
    found = {
        "split": split,
        "n_listed": clips.n_listed,
        "n_evaluated": evaluated,
        "n_failed": clips.n_listed - evaluated,
        "top1": 100.0 * top1 / evaluated,
        "top5": 100.0 * top5 / evaluated if class_embeddings.shape[0] >= TOP_K else None,
    }
    return found, failed
