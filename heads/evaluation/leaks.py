"""Finds training videos among the tested ones, so that none is tested by mistake."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from featstore.errors import UserError, counted, counted_of
from featstore.format.schema import STATUS_OK, RowArray
from featstore.reading.store import Store
from featstore.spelling import comparable, named_by
from heads.evaluation.protocols.protocol import TestSet
from heads.files.run_files import learned_nothing, read_config, read_training_keys, rows_hash
from heads.training.training_set import shown
from pipeline.annotations.formats.kinetics import official_clip

if TYPE_CHECKING:
    from heads.methods.head import Head

log = logging.getLogger(__name__)

ContentMarks: TypeAlias = Callable[[str], Mapping[str, Collection[str]]]
"""Returns what tells the content of a data set's videos by key, as far as it is known: the sha256
and the groups of copies that they are in. Videos that have a mark in common are copies."""

NAMED: Final = 3  # how many videos an error names


def trained_videos(store: Store, rows: RowArray, run_dir: Path) -> RowArray | None:
    """Return those of `rows` (int64, array rows of `store`) that the run was trained on.

    Returns None if that is not known. Two videos are the same if they have the same data set and
    key, or keys that differ only in how a system composes letters; clips of Kinetics are the same
    in all data sets if their YouTube id and start are. If the run recorded no keys but was trained
    on this store, its rows are compared.
    """
    settings = read_config(run_dir) or {}
    if learned_nothing(settings):
        return np.zeros(0, np.int64)
    known = read_training_keys(run_dir)
    if known is None:
        return _rows_by_hash(store, rows, settings.get("data", {}))
    same = set(map(named_by, known.get(store.provenance.dataset, ())))
    clips = {clip for keys in known.values() for key in keys if (clip := _clip(key)) is not None}
    found = []
    for row, at in zip(rows.tolist(), store.positions(rows).tolist(), strict=True):
        key = store.keys[at]
        if named_by(key) in same or (clips and _clip(key) in clips):
            found.append(row)
    return np.array(found, np.int64)


def require_no_leak(
    store: Store, tests: Sequence[TestSet], run_dir: Path, *, allow: bool = False
) -> int | None:
    """Return how many tested videos the run in `run_dir` was trained on; None when not known.

    If there are any, raises a UserError that names some of them, or with `allow` only warns.
    """
    rows = np.unique(np.concatenate([np.asarray(test.rows, np.int64) for test in tests]))
    found = trained_videos(store, rows, run_dir)
    if found is None:
        log.warning(
            "%s does not say which videos it was trained on: it is not known whether tested "
            "videos are among them",
            run_dir.name,
        )
        return None
    if len(found) == 0:
        return 0
    keys = [store.keys[at] for at in store.positions(found[:NAMED]).tolist()]
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    what = (
        f"{counted_of(len(found), len(rows), 'tested video')} in the training of {run_dir.name} "
        f"({', '.join(keys)}{more})"
    )
    if not allow:
        others = "name a split without them with --split" if store.split_names else "test others"
        raise UserError(f"{what}: {others}, or pass --allow-overlap to measure anyway")
    log.warning("%s", what)
    return len(found)


def copies_of_trained(
    store: Store,
    rows: npt.ArrayLike,
    trained: Mapping[str, Collection[str]],
    marks: ContentMarks,
    *,
    known: Collection[int] = (),
) -> RowArray:
    """Return those of `rows` (array rows of `store`) that are copies of a training video.

    `trained` are the keys of the training videos by data set; `marks` tell the content of videos.
    Rows that are `known` to be training videos by their key are left out. The copies are logged:
    their keys differ, so that only a person can say which of the two should go.
    """
    own = marks(store.provenance.dataset)
    if not own:
        return np.zeros(0, np.int64)
    of_trained: dict[str, str] = {}
    for dataset, keys in trained.items():
        there = own if dataset == store.provenance.dataset else marks(dataset)
        of_trained.update((mark, key) for key in keys for mark in there.get(key, ()))
    asked = np.unique(np.asarray(rows, np.int64))
    found, words = [], []
    for row, at in zip(asked.tolist(), store.positions(asked).tolist(), strict=True):
        key = store.keys[at]
        other = next((of_trained[m] for m in own.get(key, ()) if m in of_trained), None)
        if other is not None and row not in known:
            found.append(row)
            words.append(f"{key} = {other}")
    if found:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        log.warning(
            "%s by content in the training, under another key (%s%s): they count as trained on; "
            "train without them (train-head --exclude) for a fair test",
            counted_of(len(found), len(asked), "tested video"),
            *(", ".join(words[:NAMED]), more),
        )
    return np.array(found, np.int64)


def copies_tested(
    store: Store, tests: Sequence[TestSet], run_dir: Path, marks: ContentMarks
) -> int:
    """Return how many tested videos are copies of videos that the run in `run_dir` trained on.

    Training videos themselves do not count (`require_no_leak` does that). 0 if the run recorded no
    keys.
    """
    settings = read_config(run_dir) or {}
    known = read_training_keys(run_dir)
    if known is None or learned_nothing(settings):
        return 0
    rows = np.unique(np.concatenate([np.asarray(test.rows, np.int64) for test in tests]))
    by_key = trained_videos(store, rows, run_dir)
    same = frozenset(() if by_key is None else by_key.tolist())
    return len(copies_of_trained(store, rows, known, marks, known=same))


def require_disjoint(
    train: Store, rows: npt.ArrayLike, test: Store, tested: npt.ArrayLike, *, allow: bool = False
) -> int:
    """Return how many videos are both trained on and tested, which their keys tell.

    If there are any, raises a UserError that names some of them, or with `allow` only warns.
    """
    trained = {train.keys[int(place)] for place in train.positions(rows)}
    keys = [test.keys[int(place)] for place in test.positions(np.unique(np.asarray(tested)))]
    both = [key for key in keys if key in trained]
    if not both:
        return 0
    words = f"{counted(len(both), 'video is', 'videos are')} trained on and tested ({shown(both)})"
    if not allow:
        raise UserError(
            f"{words}, so the test would be on videos seen in training: correct the lists, or "
            "pass --allow-overlap to measure anyway"
        )
    log.warning("%s: the result does not show how the head does on new videos", words)
    return len(both)


def warn_of_known_classes(head: Head, store: Store, novel: TestSet) -> None:
    """Log a warning if `head`, which a training starts from, was trained on novel classes."""
    known = None if head.origin is None else head.origin.class_names
    if novel.classes is None or known is None:
        return
    names = [store.class_names[label] for label in novel.classes.tolist()]
    forms = set(map(comparable, known))
    seen = [name for name in names if comparable(name) in forms]
    if seen:
        log.warning(
            "the training starts from a head that was trained on %d of the %d novel classes (%s): "
            "they are not new to it",
            *(len(seen), len(names), shown(seen)),
        )


def _rows_by_hash(store: Store, rows: RowArray, data: Mapping[str, Any]) -> RowArray | None:
    """Return those of `rows` that a run without recorded keys was trained on; None if not known.

    The run must have been trained on a split of this store, or on all of it.
    """
    if data.get("dataset_fingerprint") != store.provenance.dataset_fingerprint:
        return None
    for listed in (*(store.split(name) for name in store.split_names), store.rows):
        if len(listed) == 0:
            continue
        usable = listed[store.status[store.positions(listed)] == STATUS_OK]
        if rows_hash(usable) == data.get("rows_hash"):
            both: RowArray = np.intersect1d(rows, usable).astype(np.int64)
            return both
    return None


def _clip(key: str) -> str | None:
    """Return the YouTube id and start of a clip of Kinetics from its key; None for other keys."""
    return official_clip(key.rpartition("/")[2])
