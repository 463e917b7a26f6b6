"""The frames of videos as points of a space in which copies of a video lie near each other.

n = videos, V = views, F = stored frames of a view, S = frames of a video that are compared,
D = embedding width, d = width of the space.

CLIP's embeddings lie in a narrow cone, and a few directions, in which classes differ, hold most of
their variance. Whitening (each direction divided by its spread over the store) brings out what
tells videos of one class apart. It is learnt on the store itself, so it fits every encoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from featstore.progress import ProgressSink, no_progress
from heads.quality.part import Part

MOST_FRAMES: Final = 16  # of a video that are compared, evenly chosen of those that are stored
WIDTH: Final = 128  # directions that are kept, those with the largest variance
SHRINKAGE: Final = 0.1  # share of the mean variance that is added to each, which keeps noise small
_BLOCK: Final = 256  # videos that are read at once


def stored_frames(part: Part) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of videos: their places in `part`, unit frames float32 [k,S,D] in time order.

    Of several crops the last one is taken, which is the centre.
    """
    store = part.store
    views, crops = store.schema.views, max(1, store.provenance.crops)
    chosen = slice(views - views // crops, None)
    for start in range(0, len(part.rows), _BLOCK):
        where = slice(start, min(start + _BLOCK, len(part.rows)))
        rows = part.rows[where]
        found = store.features(rows)[:, chosen]
        frames = torch.from_numpy(found.reshape(len(rows), -1, found.shape[-1]))
        order = np.argsort(store.pts(rows)[:, chosen].reshape(len(rows), -1), 1, kind="stable")
        kept = np.linspace(0, order.shape[1] - 1, min(MOST_FRAMES, order.shape[1]))
        order = order[:, kept.round().astype(np.int64)]
        picked = frames[torch.arange(len(rows))[:, None], torch.from_numpy(order)]
        yield where, functional.normalize(picked.float(), dim=-1)


@dataclass(frozen=True, eq=False)
class Space:
    """A space that was learnt on the frames of one or more parts."""

    centre: Tensor
    """[D] float32."""
    axes: Tensor
    """[D,d] float32; the directions divided by their spread."""

    @classmethod
    def of(cls, parts: list[Part], progress: ProgressSink = no_progress) -> Space:
        """Learn it; `progress` counts videos. Memory holds a block of videos at a time."""
        total, done, count = sum(len(part.rows) for part in parts), 0, 0
        dim = parts[0].store.schema.dim
        sums = torch.zeros(dim, dtype=torch.float64)
        squares = torch.zeros(dim, dim, dtype=torch.float64)
        for part in parts:
            for where, frames in stored_frames(part):
                flat = frames.flatten(0, 1)
                sums += flat.sum(0)
                squares += flat.T @ flat
                count += len(flat)
                done += where.stop - where.start
                progress(done, total, stage="read")
        centre = sums / count
        covariance = squares / count - torch.outer(centre, centre)
        variance, directions = torch.linalg.eigh(covariance)
        variance = variance.clamp_min(0)
        spread = (variance + SHRINKAGE * variance.mean() + 1e-12).sqrt()
        axes = (directions / spread)[:, -WIDTH:]
        return cls(centre.float(), axes.float())

    def sequences(self, part: Part) -> Tensor:
        """Return the points [n,S,d] of the frames of all videos, float16, at most 4 KB a video."""
        blocks = [((frames - self.centre) @ self.axes).half() for _, frames in stored_frames(part)]
        return torch.cat(blocks)
