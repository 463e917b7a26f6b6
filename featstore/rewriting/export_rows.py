"""The columns of an export, whatever the files are.

Dimension letters: n rows of a file, V views, F frames, D dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featstore.format.schema import FeatureArray, RowArray
from featstore.reading.store import Store


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one file, in the store's order, all of them ok.

    `label` int32 [n]; `num_frames` int32 [n]; `fps` float32 [n]; `frame_index` int32 [n, V, F];
    `pts` float64 [n, V, F] seconds; `features` float16 [n, V, F, D], of a tier its items in its
    type; the rest lists of n.
    """

    key: list[str]
    class_name: list[str]
    splits: list[list[str]]
    label: npt.NDArray[np.int32]
    num_frames: npt.NDArray[np.int32]
    fps: npt.NDArray[np.float32]
    frame_index: npt.NDArray[np.int32]
    pts: npt.NDArray[np.float64]
    features: FeatureArray


def read_rows(store: Store, rows: RowArray) -> Rows:
    """All columns of array rows that are ok."""
    at = store.positions(rows)
    members = {name: np.isin(rows, store.split(name)) for name in store.split_names}
    labels = store.labels[at]
    return Rows(
        key=[store.keys[i] for i in at],
        class_name=[store.class_names[label] for label in labels],
        splits=[[name for name, of in members.items() if of[i]] for i in range(len(rows))],
        label=labels,
        num_frames=store.num_frames[at],
        fps=store.fps[at],
        frame_index=store.frame_index(rows),
        pts=store.pts(rows),
        features=store.features(rows),
    )
