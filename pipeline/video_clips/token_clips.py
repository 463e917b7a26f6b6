"""Clips whose tokens a store holds: the order of training from videos, without decoding any.

T frames of a clip, L tokens of a frame (class token first), W width of the image tower.
"""

from __future__ import annotations

from typing import Any

import torch

from featstore.errors import WorkError, one_line
from featstore.format.schema import STATUS_OK
from featstore.reading.store import Store
from pipeline.tars.dataset import Dataset
from pipeline.video_clips.loader import ClipLoader
from pipeline.video_clips.order import ListedClip
from pipeline.video_clips.stream import ClipStream, EvaluationClips


class _FromStore(ClipLoader):
    """Reads clips from a store of one view of T frames; `frames` of a batch are [n,T,L,W]."""

    def _read_from(self, store: Store) -> None:
        self._store = store
        self._shape = store.schema.row_shape[1:]
        held = zip(store.keys, store.rows.tolist(), store.status, store.reasons, strict=True)
        # A row where there is one, else why there is none.
        self._held = {
            key: row if status == STATUS_OK else why or "it failed"
            for key, row, status, why in held
        }

    def _load(self, *given: Any) -> str:
        """Fill float32 `slot` [T,L,W], the last argument; returns why it stays empty, else ""."""
        clip, slot = given[-2:]
        assert isinstance(clip, ListedClip)
        row = self._held.get(clip.key, f"{self._store.path.name} does not hold it")
        if isinstance(row, str):
            return row
        try:
            slot.copy_(torch.from_numpy(self._store.features(row)[0, 0]))
        except WorkError as error:
            return one_line(error)
        return ""


class TokenStream(_FromStore, ClipStream):
    """As `ClipStream` without augmentation, with the frames that the store was made of."""

    def __init__(self, dataset: Dataset, *, store: Store, **drawn: Any) -> None:
        super().__init__(dataset, **{**drawn, "augment": False, "decoder": "pyav"})
        self._read_from(store)


class TokenEvaluationClips(_FromStore, EvaluationClips):
    """As `EvaluationClips`: the frames of a store with the sampling uniform:T are the same ones."""

    def __init__(self, dataset: Dataset, *, store: Store, **loading: Any) -> None:
        super().__init__(dataset, **{**loading, "decoder": "pyav"})
        self._read_from(store)
