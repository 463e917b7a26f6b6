"""The close-set protocol on videos: measures the same as `extract` and `eval`, without a store.

B = videos of a batch, T = frames, s = input size, C = classes. One clip per video, centre crop,
float32; the counts are exact for any number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heads.end_to_end.models.end_to_end_model import EndToEndModel
from heads.scoring import TOP_K
from heads.scoring.average_precision import mean_average_precision
from heads.scoring.scores import fuse_views
from heads.scoring.scores import ranks as places
from heads.training.ranks import Ranks
from pipeline.tars.dataset import Dataset
from pipeline.video_clips.stream import EvaluationClips

SPLITS = ("val", "test")
"""Evaluation uses the first of these that the data set has, as `eval --closeset` does."""


@dataclass(frozen=True)
class Validation:
    """Counts over all processes."""

    split: str
    n_listed: int
    n_evaluated: int
    top1: float | None
    """Per cent of the evaluated videos; None where a video may show several classes."""
    top5: float | None
    """None with fewer than five classes."""
    mean_ap: float | None = None
    """Mean average precision in per cent, only where a video may show several classes."""

    @property
    def quality(self) -> float:
        """What epochs are compared by: the accuracy, or the mean average precision."""
        found = self.top1 if self.mean_ap is None else self.mean_ap
        assert found is not None
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the entries for the run's records."""
        return {
            "split": self.split,
            "n_listed": self.n_listed,
            "n_evaluated": self.n_evaluated,
            "n_failed": self.n_listed - self.n_evaluated,
            "top1": self.top1,
            "top5": self.top5,
            **({} if self.mean_ap is None else {"mean_ap": self.mean_ap}),
        }


def validation_split(dataset: Dataset) -> str | None:
    """Return the split to evaluate on; None if the data set has no such split with videos."""
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
) -> tuple[Validation | None, list[tuple[str, str]]]:
    """Return the accuracy of `model` on `clips` and the failures (key, reason) of this rank.

    The accuracy is None if no clip can be decoded. `class_embeddings` [C,D] are on the model's
    device, in the order of labels; where the texts train, the embeddings of this moment stand for
    them. With `in_step`, every process runs the model equally often, on a black clip of `shape`
    when it has no videos left.
    """
    training = model.training
    model.eval()
    now = model.class_embeddings(class_embeddings)
    if now is not class_embeddings:
        class_embeddings = now
        model.head.training_class_embeddings.copy_(now)  # modulation compares with them
    counts = torch.zeros(3, dtype=torch.int64)  # evaluated, right, right among five
    failed: list[tuple[str, str]] = []
    passes = 0
    rows: list[tuple[Tensor, Tensor]] = []  # scores and labels of videos of several classes
    for batch in clips.batches():
        failed += batch.failed
        if not len(batch.keys):
            continue
        passes += 1
        pixels = batch.frames.to(ranks.device, non_blocking=True)
        cosines = model(pixels, class_embeddings, modulate)
        if batch.labels.ndim == 2:
            rows.append((cosines.double().cpu(), batch.labels.bool()))
            counts[0] += len(batch.labels)
            continue
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
    pairs = [pair for of_rank in ranks.gathered(rows) for pair in of_rank]
    if pairs:
        every, shown = (torch.cat(part).numpy() for part in zip(*pairs, strict=True))
        mean_ap = mean_average_precision(every, shown)
        return Validation(split, clips.n_listed, evaluated, None, None, mean_ap), failed
    found = Validation(
        split=split,
        n_listed=clips.n_listed,
        n_evaluated=evaluated,
        top1=100.0 * top1 / evaluated,
        top5=100.0 * top5 / evaluated if class_embeddings.shape[0] >= TOP_K else None,
    )
    return found, failed
