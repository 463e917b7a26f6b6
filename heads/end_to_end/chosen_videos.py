"""Which videos a fine-tuning learns from and is evaluated on: splits, shots, half of the classes.

The draw and the halves are those of `heads.training.training_set`, so that a fine-tuning and a head
of the same protocol, seed and number of shots learn from the same videos. Published lists are found
and read as `eval --lists-from` does it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from featstore.errors import UserError, counted
from featstore.files.key_lists import Excluded
from featstore.format.schema import RowArray
from heads.end_to_end.config import FinetuneConfig
from heads.end_to_end.validate import validation_split
from heads.training.training_set import choose_training_set, shown, suffix_of
from pipeline.annotations.known_sets import known_dataset
from pipeline.annotations.published_lists import KeyIndex, ListRepository, read_published_list
from pipeline.tars.dataset import Dataset, load_dataset
from pipeline.video_clips.order import listed_clips

log = logging.getLogger(__name__)

TRAIN_SPLIT: Final = "train"


@dataclass(frozen=True)
class VideoChoice:
    """What is asked for: `shots` videos of each class (None: all), of "all" or "base" classes.

    With `lists_from`, the folder of a clone, they are those of a published list: of the few-shot
    list of so many shots, or of the list of base classes with the number `draw_seed`. Raises
    UserError where no such list can be meant.
    """

    shots: int | None = None
    draw_seed: int = 1
    half: str = "all"
    lists_from: Path | None = None

    def __post_init__(self) -> None:
        if self.lists_from is None:
            return
        if self.shots is None:
            raise UserError("--lists-from holds lists of shots: add --shots K, such as --shots 16")
        if self.half == "novel":
            raise UserError(
                "--lists-from holds no training lists of novel classes: use --classes base, or all"
            )

    @property
    def whole(self) -> bool:
        """Whether everything is trained on."""
        return self.shots is None and self.half == "all"

    @property
    def suffix(self) -> str:
        """The end of the name of a run."""
        if self.lists_from is None:
            return suffix_of(self.half, self.shots, self.draw_seed)
        return f"-k{self.shots}-list" if self.half == "all" else f"-base-s{self.draw_seed}-list"

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
    them out and reports them. Raises UserError for a word that is no half, where a video may show
    several classes, and for a published list that is not there or has videos outside the split.
    """
    if choice.whole:
        return ChosenVideos(dataset, None, frozenset(), "")
    listed = _Listed.of(dataset, split, excluded)
    if choice.lists_from is None:
        found = choose_training_set(
            *(listed, np.arange(len(listed.keys))),
            split=split,
            shots=choice.shots,
            draw_seed=choice.draw_seed,
            half=choice.half,
        )
        rows, among, words = found.rows, found.classes, found.words
    else:
        rows, among, words = _of_list(listed, split, choice, choice.lists_from, excluded)
    chosen = {listed.keys[row] for row in rows.tolist()}
    left_out = frozenset(listed.keys) - chosen
    if among is None:
        return ChosenVideos(dataset, None, left_out, words)
    classes = tuple(among.tolist())
    names, raw = (
        tuple(held[label] for label in classes)
        for held in (dataset.class_names, dataset.raw_class_names)
    )
    part = replace(dataset, class_names=names, raw_class_names=raw)
    return ChosenVideos(part, classes, left_out, words)


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


def _of_list(
    listed: _Listed, split: str | None, choice: VideoChoice, folder: Path, excluded: Collection[str]
) -> tuple[RowArray, RowArray | None, str]:
    """Return the rows of a published list, the labels of its base classes (None: all), and words.

    A class is that of the data set, whatever number the list gives it.
    """
    listed.require_one_label("--lists-from")
    dataset, few = listed.dataset, choice.half == "all"
    repository = ListRepository(folder, known_dataset(dataset.name))
    path = repository.shots(choice.shots or 0) if few else repository.seed(choice.draw_seed)
    every = {*listed.keys, *(k for keys in dataset.keys_by_split.values() for k in keys)}
    taken = set(read_published_list(path, KeyIndex(every)).keys) - set(excluded)
    elsewhere = sorted(taken - set(listed.keys))
    name = path.relative_to(folder)
    if elsewhere:
        are = counted(len(elsewhere), f"video of {name} is", f"videos of {name} are")
        where = f"split {split}" if split else "the videos with a class"
        raise UserError(
            f"{are} not in {where}: {shown(elsewhere)}; name the split of the list with --split"
        )
    rows = np.array([at for at, key in enumerate(listed.keys) if key in taken], np.int64)
    counts = np.bincount(listed.labels[rows], minlength=len(listed.class_names))
    words = f"the {len(rows)} videos of list {name}"
    wanted = np.arange(len(counts)) if few else np.flatnonzero(counts)
    other = [f"{listed.class_names[c]} ({counts[c]})" for c in wanted if counts[c] != choice.shots]
    if other:
        log.warning(
            "%s not have exactly %s in %s: %s",
            counted(len(other), "class does", "classes do"),
            *(counted(choice.shots or 0, "video"), name, shown(other)),
        )
    if few:
        return rows, None, words
    if len(wanted) == len(counts):
        raise UserError(
            f"{name} trains on all {len(counts)} classes, so that no class is novel: name the "
            "folder of a list of the base classes only"
        )
    return rows, wanted, f"{words}, the {len(wanted)} base classes"


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
