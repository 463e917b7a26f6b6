"""The runs of a few-shot or base-to-novel protocol: what each trains on and is tested on.

Videos are drawn by key (`heads.training.training_set`), or given by keys from a published list.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featstore.errors import UserError
from featstore.format.schema import RowArray
from featstore.reading.store import Store
from heads.evaluation.leaks import require_disjoint
from heads.evaluation.protocols.protocol import TestSet
from heads.evaluation.trained.run import ShotRun
from heads.training.training_set import (
    TrainingSet,
    choose_training_set,
    draw_shots,
    frequency_halves,
    repeats_of,
    rows_of_classes,
    shown,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GivenList:
    """Keys of the videos to train on, as somebody's list has them."""

    name: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class ShotPlan:
    """What the runs of a protocol share: stores, splits, and how runs are called.

    `run_dir` gives the folder of a run by the end of its name. `train` and `test` may be one store.
    """

    train: Store
    test: Store
    train_split: str
    test_split: str
    run_dir: Callable[[str], Path]
    repeat: str = "full"
    allow_overlap: bool = False

    def __post_init__(self) -> None:
        if self.train.class_names != self.test.class_names:
            differing = set(self.train.class_names) ^ set(self.test.class_names)
            raise UserError(
                f"{self.train.path.name} and {self.test.path.name} have other class lists "
                f"({shown(sorted(differing)) or 'in another order'}): take stores of one data set"
            )

    def fewshot(
        self, shots: Sequence[int], draw: int, given: Mapping[int, GivenList] | None = None
    ) -> list[ShotRun]:
        """One run per number of shots, tested on the test split among all classes.

        `given` holds published lists by number of shots; what it lacks is drawn with seed `draw`.
        UserError when training and test videos overlap, unless that is allowed.
        """
        tests = (TestSet(self.test_split, self.test.split(self.test_split)),)
        runs = []
        for count in shots:
            listed = (given or {}).get(count)
            if listed is None:
                train = choose_training_set(
                    self.train,
                    self._training,
                    split=self.train_split,
                    shots=count,
                    draw_seed=draw,
                    repeat=self.repeat,
                )
            else:
                train = self._given(listed, None, f"-k{count}-list")
                self._warn_of_other_counts(train.rows, count, listed)
            runs.append(self._run(train, tests, count, draw))
        return runs

    def base_to_novel(
        self, shots: int, draws: Sequence[int], given: Mapping[int, GivenList] | None = None
    ) -> list[ShotRun]:
        """One run per draw on base classes, tested on base among base and novel among novel names.

        Base classes are the half with more training videos, or those of the `given` lists (by
        draw). Errors as `fewshot`; UserError also for classes with less than two halves.
        """
        names = self.train.class_names
        if len(names) < 2:
            raise UserError(f"{len(names)} class has no base and novel half: take more classes")
        labels = self.train.labels
        if given:
            keys = [key for listed in given.values() for key in listed.keys]
            rows = np.array([self.train.row(key) for key in keys], np.int64)
            base = np.unique(labels[self.train.positions(rows)]).astype(np.int64)
            novel = np.setdiff1d(np.arange(len(names)), base)
            if not len(novel):
                raise UserError(
                    f"the lists train on all {len(names)} classes: none is left to be novel"
                )
            if len(base) != -(-len(names) // 2):
                log.warning("the lists have %d base classes of %d", len(base), len(names))
        else:
            base, novel = frequency_halves(labels[self.train.positions(self._training)], names)
        tested = self.test.split(self.test_split)
        tests = tuple(
            TestSet(name, rows_of_classes(self.test, tested, classes), classes)
            for name, classes in (("base", base), ("novel", novel))
        )
        candidates = rows_of_classes(self.train, self._training, base)
        runs = []
        for draw in draws:
            if given:
                train = self._given(given[draw], base, f"-base-s{draw}-list")
            else:
                drawn = draw_shots(self.train, candidates, shots, draw, base)
                train = self._described(
                    drawn.rows,
                    base,
                    len(candidates),
                    f"{self.train_split}, {drawn.words}, the {len(base)} base classes",
                    f"-base-k{shots}-s{draw}",
                )
            runs.append(self._run(train, tests, shots, draw))
        return runs

    @property
    def _training(self) -> RowArray:
        return self.train.split(self.train_split)

    def _run(
        self, train: TrainingSet, tests: tuple[TestSet, ...], shots: int, draw: int
    ) -> ShotRun:
        tested = np.concatenate([test.rows for test in tests])
        overlap = require_disjoint(
            self.train, train.rows, self.test, tested, allow=self.allow_overlap
        )
        return ShotRun(self.run_dir(train.suffix), shots, draw, train, tests, overlap)

    def _given(self, listed: GivenList, classes: RowArray | None, suffix: str) -> TrainingSet:
        rows = np.array(sorted(self.train.row(key) for key in listed.keys), np.int64)
        elsewhere = int((~np.isin(rows, self._training)).sum())
        if elsewhere:
            log.warning(
                "%d of the %d videos of %s are not in split %s",
                *(elsewhere, len(rows), listed.name, self.train_split),
            )
        of_all = self._training
        if classes is not None:
            of_all = rows_of_classes(self.train, of_all, classes)
            suffix_words = f", the {len(classes)} base classes"
        else:
            suffix_words = ""
        words = f"the {len(rows)} videos of list {listed.name}{suffix_words}"
        return self._described(rows, classes, len(of_all), words, suffix)

    def _described(
        self, rows: RowArray, classes: RowArray | None, full: int, words: str, suffix: str
    ) -> TrainingSet:
        repeats = repeats_of(self.repeat, full, len(rows))
        if repeats > 1:
            words += f", repeated {repeats} times"
        return TrainingSet(rows, classes, words, suffix, repeats)

    def _warn_of_other_counts(self, rows: RowArray, shots: int, listed: GivenList) -> None:
        names = self.train.class_names
        counts = np.bincount(self.train.labels[self.train.positions(rows)], minlength=len(names))
        other = [f"{names[c]} ({counts[c]})" for c in np.flatnonzero(counts != shots)]
        if other:
            log.warning(
                "%d classes have not %d videos in %s: %s",
                *(len(other), shots, listed.name, shown(other)),
            )
