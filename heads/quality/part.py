"""The videos of a store that a search for faults looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from featstore.commands import command
from featstore.errors import UserError
from featstore.format.schema import STATUS_OK, RowArray
from featstore.reading.store import Store
from pipeline.tars.dataset import NO_LABEL, class_words
from pipeline.tars.identical import content_hashes


@dataclass(frozen=True, eq=False)
class Part:
    """All videos of a store, or those of one split, that have features.

    `dataset_dir` is the folder of the packed data set; with it bytes and pictures are compared, and
    without it (it need not be there) only the stored embeddings.
    """

    store: Store
    split: str
    dataset_dir: Path
    rows: RowArray
    """Array rows [n] int64, ascending."""
    n_failed: int
    """Listed videos without features."""

    @classmethod
    def of(cls, store: Store, split: str, dataset_dir: Path) -> Part:
        """Take the videos of split `split`, or with "" all.

        Raises UserError for an unknown split, a store without embeddings, and if no video has
        features.
        """
        store.require_embeddings()
        listed = store.split(split) if split else store.rows
        rows = listed[store.status[store.positions(listed)] == STATUS_OK]
        if not len(rows):
            what = f"split {split} of {store.path.name}" if split else store.path.name
            raise UserError(
                f"none of the {len(listed)} videos of {what} has features: see the reasons with "
                f"`{command('inspect', store.path)}`"
            )
        return cls(store, split, dataset_dir, rows, len(listed) - len(rows))

    @property
    def name(self) -> str:
        """The name of the store, with the split if there is one."""
        return f"{self.store.path.stem}{f':{self.split}' if self.split else ''}"

    @cached_property
    def keys(self) -> list[str]:
        """The keys [n] of the videos."""
        return [self.store.keys[at] for at in self._at]

    @cached_property
    def class_names(self) -> list[str]:
        """The class [n] of each video in words, or all that it shows; "" without one."""
        names, spans = self.store.class_names, self.store.spans
        return [class_words(names, NO_LABEL, spans[at]) for at in self._at]

    @cached_property
    def splits(self) -> list[tuple[str, ...]]:
        """The splits [n] of each video."""
        members = {
            name: np.isin(self.rows, self.store.split(name)) for name in self.store.split_names
        }
        return [
            tuple(name for name, held in members.items() if held[at])
            for at in range(len(self.rows))
        ]

    @cached_property
    def seconds(self) -> list[float]:
        """How long each video [n] is, by its frames and their rate; 0 where that is unknown."""
        fps = self.store.fps[self._at].astype(np.float64)
        frames = self.store.num_frames[self._at]
        long = np.divide(frames, fps, out=np.zeros(len(fps)), where=fps > 0)
        return [float(x) for x in long]

    @cached_property
    def hashes(self) -> Mapping[str, str]:
        """The sha256 of the videos by key, as far as packing kept them."""
        return content_hashes(self.dataset_dir)

    @cached_property
    def _at(self) -> list[int]:
        found: list[int] = self.store.positions(self.rows).tolist()
        return found
