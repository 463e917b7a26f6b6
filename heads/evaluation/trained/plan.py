"""Plans the runs of a few-shot or base-to-novel protocol: which videos each trains on and tests.

Videos are drawn by key (`heads.training.training_set`), or a published list gives their keys.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featstore.errors import UserError, counted
from featstore.format.schema import RowArray
from featstore.reading.store import Store
from heads.evaluation.leaks import ContentMarks, copies_of_trained, require_disjoint
from heads.evaluation.protocols.protocol import TestSet
from heads.evaluation.trained.run import ShotRun
from heads.training.training_set import (
    TrainingSet,
    choose_training_set,
    repeats_of,
    rows_of_classes,
    shown,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GivenList:
    """The keys of the videos to train on, from a published list."""

    name: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class ShotPlan:
    """What the runs of a protocol share: stores, splits, and the naming of runs.

    `run_dir` returns the folder of the run whose name has the given ending. `train` and `test` may
    be the same store.
    """

    train: Store
    test: Store
    train_split: str
    test_split: str
    run_dir: Callable[[str], Path]
    repeat: str = "full"
    allow_overlap: bool = False
    content_marks: ContentMarks = lambda dataset: {}

    def __post_init__(self) -> None:
        self.train.require_one_label("a number of videos per class")
        if self.train.class_names != self.test.class_names:
            differing = set(self.train.class_names) ^ set(self.test.class_names)
            raise UserError(
                f"{self.train.path.name} and {self.test.path.name} have different class lists "
                f"({shown(sorted(differing)) or 'in another order'}): take stores of one data set"
            )

    def fewshot(
        self, shots: Sequence[int], draw: int, given: Mapping[int, GivenList] | None = None
    ) -> list[ShotRun]:
        """Plan one run per number of shots, each tested on the test split among all classes.

        `given` holds published lists by number of shots; without a list, videos are drawn with seed
        `draw`. UserError when training and test videos overlap, unless `allow_overlap` is set.
        """
        tests = (TestSet(self.test_split, self.test.split(self.test_split)),)
        runs = []
        for count in shots:
            listed = (given or {}).get(count)
            if listed is None:
                train = self._drawn(count, draw, "all")
            else:
                train = self._given(listed, None, f"-k{count}-list")
                labels = self.train.labels[self.train.positions(train.rows)]
                names = self.train.class_names
                counts = np.bincount(labels, minlength=len(names))
                other = [f"{names[c]} ({counts[c]})" for c in np.flatnonzero(counts != count)]
                if other:
                    log.warning(
                        "%s not have exactly %s in %s: %s",
                        counted(len(other), "class does", "classes do"),
                        *(counted(count, "video"), listed.name, shown(other)),
                    )
            runs.append(self._run(train, tests, count, draw))
        return runs

    def base_to_novel(
        self, shots: int, draws: Sequence[int], given: Mapping[int, GivenList] | None = None
    ) -> list[ShotRun]:
        """Plan one run per draw, trained on the base classes.

        Base videos are tested among the base classes, novel videos among the novel ones. The base
        classes are the half with more training videos, or those of the `given` lists (by draw).
        Errors as `fewshot`; UserError also if there are fewer than two classes.
        """
        names = self.train.class_names
        if len(names) < 2:
            raise UserError(
                f"{len(names)} class cannot be halved into base and novel: take more classes"
            )
        if given:
            keys = [key for listed in given.values() for key in listed.keys]
            rows = np.array([self.train.row(key) for key in keys], np.int64)
            base = np.unique(self.train.labels[self.train.positions(rows)]).astype(np.int64)
            if len(base) == len(names):
                raise UserError(
                    f"the lists train on all {len(names)} classes, so that no class is novel: take "
                    "lists of the base classes only"
                )
            if len(base) != -(-len(names) // 2):
                log.warning("the lists have %d base classes of %d", len(base), len(names))
            sets = [self._given(given[draw], base, f"-base-s{draw}-list") for draw in draws]
        else:
            sets = [self._drawn(shots, draw, "base") for draw in draws]
        base = np.asarray(sets[0].classes)
        tests = halves_tested(self.test, self.test.split(self.test_split), base)
        return [
            self._run(train, tests, shots, draw) for train, draw in zip(sets, draws, strict=True)
        ]

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
        trained = [self.train.keys[at] for at in self.train.positions(train.rows).tolist()]
        keys = frozenset(trained)
        places = self.test.positions(tested).tolist()
        pairs = zip(tested.tolist(), places, strict=True)
        known = frozenset(row for row, at in pairs if self.test.keys[at] in keys)
        copies = copies_of_trained(
            *(self.test, tested, {self.train.provenance.dataset: trained}, self.content_marks),
            known=known,
        )
        n, run_dir = len(copies), self.run_dir(train.suffix)
        return ShotRun(run_dir, shots, draw, train, tests, overlap + n, n)

    def _drawn(self, shots: int, draw: int, half: str) -> TrainingSet:
        return choose_training_set(
            self.train,
            self._training,
            split=self.train_split,
            shots=shots,
            draw_seed=draw,
            half=half,
            repeat=self.repeat,
        )

    def _given(self, listed: GivenList, classes: RowArray | None, suffix: str) -> TrainingSet:
        rows = np.array(sorted(self.train.row(key) for key in listed.keys), np.int64)
        elsewhere = int((~np.isin(rows, self._training)).sum())
        if elsewhere:
            log.warning(
                "not in split %s: %d of the %d videos of %s",
                *(self.train_split, elsewhere, len(rows), listed.name),
            )
        full, words = self._training, f"the {len(rows)} videos of list {listed.name}"
        if classes is not None:
            full = rows_of_classes(self.train, full, classes)
            words += f", the {len(classes)} base classes"
        repeats = repeats_of(self.repeat, len(full), len(rows))
        if repeats > 1:
            words += f", repeated {repeats} times"
        return TrainingSet(rows, classes, words, suffix, repeats)


def halves_tested(store: Store, tested: RowArray, base: RowArray) -> tuple[TestSet, TestSet]:
    """Return the test sets of the base classes (label ids) and of all others, from array rows."""
    novel = np.setdiff1d(np.arange(len(store.class_names)), base)
    first, second = (
        TestSet(name, rows_of_classes(store, tested, classes), classes)
        for name, classes in (("base", base), ("novel", novel))
    )
    return first, second
