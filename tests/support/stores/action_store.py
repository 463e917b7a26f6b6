"""Small stores whose features carry their class, so that heads can learn something from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore import ClassText, Partition, Store, StoreSchema, StoreWriter, open_store
from featstore.format.metadata import StoreMetadata, TarEntry
from featstore.format.spans import Span
from tests.support.stores.sample_stores import make_provenance

ACTIONS = ("jump", "run", "sit", "stand", "throw", "wave", "climb stairs", "brush hair")


def action_store(
    path: Path,
    *,
    samples: int = 40,
    classes: int = 8,
    dim: int = 16,
    views: int = 1,
    frames: int = 8,
    split_names: Sequence[str] = ("train", "val"),
    failed: Sequence[int] = (3,),
    noise: float = 1.0,
    confused: float = 0.0,
    seed: int = 0,
    class_names: Sequence[str] = ACTIONS,
    swapped: Sequence[int] = (),
    several: npt.NDArray[np.bool_] | None = None,
    **provenance: Any,
) -> Store:
    """One partition of `samples` rows; row i has label i % classes and lies in split i % splits.

    Features are the class's text embedding, `confused` times that of the next class, and noise;
    rows in `failed` failed in extraction, and those `swapped` have the label of the next class.
    `several` [samples, classes] says which classes each row shows, where it may be several: then
    its features are the sum of their texts, and of `confused` times those of the next classes.
    """
    rng = np.random.default_rng(seed)
    texts = np.random.default_rng(7).standard_normal((classes, dim)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    labels = np.arange(samples, dtype=np.int32) % classes
    shape = (samples, views, frames)
    shown = texts[labels] + confused * texts[(labels + 1) % classes]
    if several is not None:
        mixed = several + confused * np.roll(several, 1, axis=1)
        shown, labels = mixed @ texts, np.full(samples, -1, np.int32)
    features = 2 * shown[:, None, None] + noise * rng.standard_normal((*shape, dim))
    labels[list(swapped)] = (labels[list(swapped)] + 1) % classes
    status = np.ones(samples, np.uint8)
    bad = list(failed)
    features[bad], status[bad] = np.nan, 2
    indices = np.zeros(shape, np.int32)
    times = np.zeros(shape)
    indices[bad], times[bad] = -1, np.nan
    names = tuple(class_names[:classes])
    schema = StoreSchema.create(1, samples, views, frames, dim, multi_label=several is not None)
    writer = StoreWriter.init(
        path,
        StoreMetadata(
            schema,
            make_provenance(dim, **({"sampling": f"uniform:{frames}"} | provenance)),
            (TarEntry("toy-000000.tar", samples, 1, "0" * 64),),
            *(names, names, tuple(split_names)),
        ),
        {"mote28": ClassText(names, texts, "beef")},
    )
    with writer.claim():
        writer.write_partition(
            0,
            Partition(
                key=[f"clip{i:03d}" for i in range(samples)],
                label=labels,
                num_frames=np.full(samples, 30, np.int32),
                fps=np.full(samples, 25, np.float32),
                status=status,
                splits=np.resize([1 << n for n in range(len(split_names))] or [0], samples).astype(
                    np.uint32
                ),
                container_frames=np.full(samples, 30, np.int32),
                damaged_packets=np.zeros(samples, np.int32),
                reason=["no video stream" if i in bad else "" for i in range(samples)],
                frame_index=indices,
                pts=times,
                features=features.astype(np.float16),
                spans=None
                if several is None
                else [[Span(int(c)) for c in np.flatnonzero(row)] for row in several],
            ),
        )
    return open_store(path)
