"""Which videos of a packed data set a fine-tuning learns from: shots, and half of the classes.

The draw and the halves are those of `heads.training.training_set`, so that a fine-tuning and a head
of the same protocol, seed and number of shots learn from the same videos.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import UserError
from featstore.format.schema import RowArray
from heads.training.training_set import choose_training_set, suffix_of
from pipeline.tars.dataset import Dataset
from pipeline.video_clips.order import listed_clips


@dataclass(frozen=True)
class VideoChoice:
    """What is asked for: `shots` videos of each class (None: all), of "all" or "base" classes."""

    shots: int | None = None
    draw_seed: int = 1
    half: str = "all"

    @property
    def whole(self) -> bool:
        """Whether everything is trained on."""
        return self.shots is None and self.half == "all"

    @property
    def suffix(self) -> str:
        """The end of the name of a run."""
        return suffix_of(self.half, self.shots, self.draw_seed)

    def to_json(self) -> dict[str, Any]:
        """Return what the settings of a run say, nothing if everything is trained on."""
        if self.whole:
            return {}
        drawn = {} if self.shots is None else {"shots": self.shots, "draw_seed": self.draw_seed}
        return {**drawn, "half": self.half}


@dataclass(frozen=True)
class ChosenVideos:
    """The chosen part of a data set; `dataset` has the names of the chosen classes only.

    Its tars are read with the whole data set, whose labels they hold.
    `classes` are the labels that these had, None for all. `left_out` are the keys of the training
    split that are not trained on. `words` describe the choice, "" if there was none to make.
    """

    dataset: Dataset
    classes: tuple[int, ...] | None
    left_out: frozenset[str]
    words: str


def choose_videos(
    dataset: Dataset, split: str | None, choice: VideoChoice, excluded: Collection[str] = ()
) -> ChosenVideos:
    """Choose from the videos of `split` (None: of all) that are not `excluded`.

    Failed videos take part, so that the choice does not depend on failures; the training leaves
    them out and reports them. Raises UserError for a word that is no half, and where a video may
    show several classes.
    """
    if choice.whole:
        return ChosenVideos(dataset, None, frozenset(), "")
    listed = _Listed.of(dataset, split, excluded)
    found = choose_training_set(
        *(listed, np.arange(len(listed.keys))),
        split=split,
        shots=choice.shots,
        draw_seed=choice.draw_seed,
        half=choice.half,
    )
    chosen = {listed.keys[row] for row in found.rows.tolist()}
    left_out = frozenset(listed.keys) - chosen
    if found.classes is None:
        return ChosenVideos(dataset, None, left_out, found.words)
    classes = tuple(found.classes.tolist())
    names, raw = (
        tuple(held[label] for label in classes)
        for held in (dataset.class_names, dataset.raw_class_names)
    )
    part = replace(dataset, class_names=names, raw_class_names=raw)
    return ChosenVideos(part, classes, left_out, found.words)


@dataclass(frozen=True)
class _Listed:
    """The labelled videos of a split, as rows in the order of their keys."""

    dataset: Dataset
    keys: tuple[str, ...]
    labels: npt.NDArray[np.int64]

    @classmethod
    def of(cls, dataset: Dataset, split: str | None, excluded: Collection[str]) -> _Listed:
        clips = [c for c in listed_clips(dataset, split, excluded) if c.label >= 0]
        labels = np.array([c.label for c in clips], np.int64)
        return cls(dataset, tuple(c.key for c in clips), labels)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.dataset.class_names

    @property
    def multi_label(self) -> bool:
        return self.dataset.multi_label

    def positions(self, rows: npt.ArrayLike) -> RowArray:
        return np.asarray(rows, np.int64)

    def shown(self, rows: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        raise NotImplementedError("asked only where a video may show several classes")

    def require_one_label(self, what: str) -> None:
        if self.multi_label:
            raise UserError(
                f"the videos of {self.dataset.name} may show several classes, and {what} needs one "
                "class of each: leave it out"
            )
