"""Zero-shot evaluation on the classes of Kinetics-600 that Kinetics-400 lacks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featstore.errors import UserError
from featstore.reading.store import Store
from heads.evaluation.protocols.protocol import TestSet
from heads.methods.settings import HeadOrigin
from heads.training.training_set import rows_of_classes
from pipeline.annotations.known_sets import known_dataset
from pipeline.annotations.label_names import read_names
from pipeline.annotations.published_lists import KeyIndex, read_keys
from pipeline.annotations.unseen_classes import unseen_classes

log = logging.getLogger(__name__)

_SPLITS = ("test", "val")

PackedClassNames = Callable[[str], Sequence[str] | None]
"""Returns the class names of a packed data set from its name; None if it is not packed."""


@dataclass(frozen=True)
class UnseenChoice:
    """Which videos and classes are tested; the defaults mean the usual ones."""

    k600_source: str | None = None
    """The tested split of Kinetics-600 ("test", "val"), or the path of a list of its videos."""
    class_lists: tuple[Path, ...] = ()
    """Files with the classes of each test set, or one folder of such files; if this is empty, the
    classes are drawn here."""
    k400_names: Path | None = None
    """File with the class names of Kinetics-400."""

    def split(self, dataset: str, held: Callable[[Sequence[str]], str | None]) -> str | None:
        """Return the split to test; None for a list of videos. UserError when there is none.

        `held` returns the first of the splits it is given that the stores of `dataset` have.
        """
        if self.k600_source is not None and self.k600_source not in _SPLITS:
            return None
        split = self.k600_source or held(_SPLITS)
        if split is None:
            raise UserError(
                f"no store of {dataset} has a test or val split, and none is packed: name a list "
                "of videos with --k600-source"
            )
        return split

    def tests(
        self,
        store: Store,
        split: str | None,
        origin: HeadOrigin | None,
        packed: PackedClassNames,
    ) -> tuple[tuple[TestSet, ...], str]:
        """Return the test sets of unseen classes, and the source of classes and videos in words.

        `split` is what the method `split` returned; `origin` is the origin of the tested head.
        Counts that differ from the published ones are logged. UserError when the names of
        Kinetics-400 are not known, a list is not understood, or a test set has no video.
        """
        names, names_from = self._k400_names(origin, packed)
        chosen = unseen_classes(store.class_names, names, self.class_lists)
        for note in chosen.notes:
            log.warning(note)
        if split is None:
            path = Path(str(self.k600_source))
            keys = read_keys(path, KeyIndex(store.keys)).keys
            rows = np.array(sorted(store.row(key) for key in keys), np.int64)
            videos = f"list {path.name}"
        else:
            rows = store.split(split)
            videos = f"split {split}"
        tests = []
        for name, labels in chosen.splits.items():
            classes = np.array(labels, np.int64)
            of_classes = rows_of_classes(store, rows, classes)
            if not len(of_classes):
                raise UserError(
                    f"none of the {len(rows)} videos of {videos} has a class of {name}: name "
                    "another --k600-source"
                )
            tests.append(TestSet(name, of_classes, classes))
        return tuple(tests), (
            f"{len(chosen.unseen)} unseen classes (Kinetics-400 names: {names_from}); splits: "
            f"{chosen.source}; videos: {videos}"
        )

    def _k400_names(
        self, origin: HeadOrigin | None, packed: PackedClassNames
    ) -> tuple[list[str], str]:
        """Return the class names of Kinetics-400, and where they are from."""
        file = self.k400_names
        if file is not None:
            if not file.is_file():
                raise UserError(f"file of class names {str(file)!r} does not exist: name another")
            return list(read_names(file).values()), file.name
        of_head = [] if origin is None else list(origin.class_names or ())
        trained_on = "" if origin is None else origin.dataset
        if of_head and known_dataset(trained_on) == "k400":
            return of_head, "the head's"
        of_data = packed("k400")
        if of_data is not None:
            return list(of_data), "the packed k400"
        if of_head:
            return of_head, f"the head's, trained on {trained_on}"
        raise UserError(
            "the class names of Kinetics-400 are not known, and they decide which classes are new: "
            "name a file with --k400-names, pack k400, or test a head that was trained on it; "
            "--protocol zeroshot --dataset k600 tests all classes of Kinetics-600"
        )
