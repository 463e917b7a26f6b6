"""Which videos a fine-tuning learns from and is evaluated on: splits, shots, half of the classes.

The draw and the halves are those of `heads.training.training_set`, so that a fine-tuning and a head
of the same protocol, seed and number of shots learn from the same videos.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from featstore.errors import UserError
from featstore.files.key_lists import Excluded
from featstore.format.schema import RowArray
from heads.end_to_end.config import FinetuneConfig
from heads.end_to_end.validate import validation_split
from heads.training.training_set import choose_training_set, suffix_of
from pipeline.tars.dataset import Dataset, load_dataset
from pipeline.video_clips.order import listed_clips

log = logging.getLogger(__name__)

TRAIN_SPLIT: Final = "train"


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


def training_split(dataset: Dataset, asked: str | None) -> str | None:
    """Return the split to train on, by default "train"; None, all videos, without splits.

    Raises UserError for a data set with other splits, none of them asked for.
    """
    if asked is not None or not dataset.split_names:
        return asked
    if TRAIN_SPLIT in dataset.split_names:
        return TRAIN_SPLIT
    raise UserError(
        f"data set {dataset.name} has no split {TRAIN_SPLIT!r} (it has "
        f"{', '.join(dataset.split_names)}): name the one to train on with --split"
    )


def evaluation_split(
    dataset: Dataset, asked: str | None, config: FinetuneConfig, split: str | None
) -> str | None:
    """Return the split that `config` has evaluated, by default "val" or "test"; None for none.

    Raises UserError if it is `split`, which is trained on, or is needed and missing.
    """
    chosen = asked or validation_split(dataset)
    if chosen is not None and chosen == split:
        raise UserError(
            f"split {chosen} cannot be both trained and evaluated on: choose --split and "
            "--eval-split"
        )
    if chosen is None and config.save == "best":
        raise UserError(
            f"--save best needs an evaluation, and data set {dataset.name} has no split val or "
            "test: name one with --eval-split, or use --save last"
        )
    if chosen is None and config.evaluate_every:
        log.info("data set %s has no split val or test: nothing is evaluated", dataset.name)
    return chosen


def excluded_videos(
    dataset: Dataset, path: Path, split: str | None, eval_split: str | None
) -> Excluded:
    """Read a list of videos to leave out; UserError if it leaves none to train or evaluate on."""
    trained = [clip.key for clip in listed_clips(dataset, split)]
    known = {*trained, *(key for keys in dataset.keys_by_split.values() for key in keys)}
    where = "the data set" if split is None else "the splits of the data set"
    excluded = Excluded.of(path, known, where)
    excluded.require_some_of(trained, "training videos")
    if eval_split is not None:
        evaluated = dataset.keys_by_split[eval_split]
        excluded.require_some_of(evaluated, f"videos of split {eval_split}, to evaluate on")
    return excluded


def trained_on(split: str | None, chosen: str, excluded: Excluded | None) -> str:
    """Return what a head says of its training videos; nothing if it is a whole split."""
    if not chosen and excluded is None:
        return ""
    return (chosen or split or "all videos") + ("" if excluded is None else excluded.of_training)


def training_videos(dataset_dir: Path, split: str | None, choice: VideoChoice) -> int:
    """Return how many videos of a data set are listed for training; errors as `make_plan`."""
    dataset = load_dataset(dataset_dir)
    chosen = training_split(dataset, split)
    if not choice.whole:
        listed = len(listed_clips(dataset, chosen))
        return listed - len(choose_videos(dataset, chosen, choice).left_out)
    if chosen is None:
        return sum(tar.rows for tar in dataset.tars)
    return len(dataset.keys_by_split.get(chosen, ()))  # a split that is not there is told later
