"""Loaders over a small store, one of each holding, and when two batches are the same."""

from __future__ import annotations

import torch
from torch import Tensor

from featstore import Store
from featstore.batches.loader import (
    Batch,
    FeatureLoader,
    Holding,
    MappedFeatures,
    StreamedFeatures,
    resident,
)

HOLDINGS = ("resident", "mapped", "streamed")


def loader_of(
    store: Store, holding: Holding | bool, seed: int = 3, rank: int = 0, world_size: int = 1
) -> FeatureLoader:
    """`holding` True stands for mapped, False for resident; pools of a stream have 6 rows."""
    rows = store.rows[::-1].copy()
    features: Tensor | MappedFeatures | StreamedFeatures = resident(store, rows)
    if holding in ("mapped", True):
        features = MappedFeatures(store, rows)
    elif holding == "streamed":
        features = StreamedFeatures(store, rows, memory=12 * store.schema.row_bytes)
    return FeatureLoader(
        features,
        store.labels[store.positions(rows)],
        batch_size=5,
        frames=4,
        seed=seed,
        rows=rows,
        rank=rank,
        world_size=world_size,
    )


def same(ours: Batch, theirs: Batch) -> bool:
    return (
        torch.equal(ours.features, theirs.features)
        and torch.equal(ours.labels, theirs.labels)
        and torch.equal(ours.rows, theirs.rows)
    )
