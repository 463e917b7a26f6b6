"""Runs a head over features once and keeps three vectors per view; all scores come from these.

N = videos, V = views, T = frames, D = embedding width.

The head's video feature of a view is `m * hidden + features`, where m is the modulation of the view
(`heads.methods.mote.modulation`, from `features` and the candidate classes). CLIP's mean over
frames of cosines is `units . class`. So other candidate lists, fusions, modulation settings and the
ensemble with CLIP are arithmetic on these vectors and need no second pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from featstore.format.schema import RowArray
from featstore.progress import ProgressSink, no_progress
from featstore.reading.store import Store
from heads.arithmetic import autocast
from heads.methods.head import Head

BATCH_FRAMES = 4096  # frames per forward pass: large enough for the cores, small in memory


@dataclass(frozen=True, eq=False)
class ViewSummaries:
    """The summaries of N videos, on the head's device; float32 for features from a store."""

    hidden: Tensor | None
    """[N,V,D] mean over frames of the transformer's output, before modulation and skip; None if
    the head has no transformer."""
    features: Tensor
    """[N,V,D] mean over frames of the CLIP features."""
    units: Tensor
    """[N,V,D] mean over frames of the CLIP features scaled to length 1."""

    def video_features(self, scale: Tensor | None) -> Tensor:
        """Return the head's video features [N,V,D], not normalised; `scale` [N,V] modulates."""
        if self.hidden is None:
            return self.features
        if scale is None:
            return self.hidden + self.features
        return scale[..., None] * self.hidden + self.features


@torch.no_grad()
def summarise(head: Head, features: Tensor) -> ViewSummaries:
    """Summarise raw CLIP features [N,V,T,D], about `BATCH_FRAMES` frames per forward pass."""
    _, views, frames, _ = features.shape
    where = head.logit_scale.device
    hidden: list[Tensor] = []
    means: list[Tensor] = []
    units: list[Tensor] = []
    for part in torch.split(
        rearrange(features, "n v t d -> (n v) t d"), max(1, BATCH_FRAMES // frames)
    ):
        mixed, mean, unit = head.view_vectors(part.to(where))
        hidden += [] if mixed is None else [mixed]
        means.append(mean)
        units.append(unit)

    def whole(parts: list[Tensor]) -> Tensor:
        return rearrange(torch.cat(parts), "(n v) d -> n v d", v=views)

    return ViewSummaries(whole(hidden) if hidden else None, whole(means), whole(units))


def summarise_store(
    store: Store,
    head: Head,
    rows: RowArray,
    *,
    frames: npt.NDArray[np.int64] | None = None,
    precision: str = "fp32",
    progress: ProgressSink = no_progress,
) -> Iterator[tuple[int, ViewSummaries]]:
    """Yield (index in `rows` of the first row, summaries) for one block of `rows` after another.

    `rows` are array rows whose extraction did not fail; `frames` picks stored frames. A block is
    about one forward pass, so that memory does not grow with the store. The head runs in
    `precision` on its own device; means are always float32.
    """
    used = store.schema.frames if frames is None else len(frames)
    step = max(1, BATCH_FRAMES // (store.schema.views * used))
    where = head.logit_scale.device
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        features = torch.from_numpy(store.features(part, frames)).float()
        with autocast(precision, where):
            summaries = summarise(head, features)
        yield start, summaries
        progress(start + len(part), len(rows))
