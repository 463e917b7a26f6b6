"""Which videos and classes of a store a head trains on, and from which weights it starts.

n = rows, C = classes of the store, S = classes trained on, D = embedding width.

A draw of shots depends only on the seed and the keys, not on the order of a list, the store or the
machine. Sets of one seed are nested: the set of 4 shots contains the set of 2. The published lists
are not nested (X-CLIP, Ni et al., ECCV 2022; ViFi-CLIP, Rasheed et al., CVPR 2023).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from featstore.balance import class_counts
from featstore.errors import UserError, counted, one_of
from featstore.files.key_lists import Excluded
from featstore.format.class_texts import ClassText
from featstore.format.schema import STATUS_OK, RowArray
from featstore.reading.store import Store

if TYPE_CHECKING:
    from heads.methods.head import Head

log = logging.getLogger(__name__)

_SHOWN = 5  # names that a message lists before it counts the rest


class LabelledRows(Protocol):
    """What shots and halves are chosen from: a `Store`, or the packed videos of a split."""

    @property
    def keys(self) -> Sequence[str]:
        """The key at each position."""

    @property
    def labels(self) -> npt.NDArray[Any]:
        """The label at each position, [n]."""

    @property
    def class_names(self) -> Sequence[str]:
        """The names by label."""

    @property
    def multi_label(self) -> bool:
        """Whether a video may show several classes."""

    def positions(self, rows: npt.ArrayLike) -> RowArray:
        """Return the positions of rows in `keys` and `labels`, int64 [n]."""

    def require_one_label(self, what: str) -> None:
        """Raise UserError, which says `what` needs it, if a video may show several classes."""

    def shown(self, rows: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return which classes the videos of rows show, bool [n,C]."""


@dataclass(frozen=True)
class ShotDraw:
    """The array rows drawn, ascending, and the classes with fewer videos than requested."""

    rows: RowArray
    short: Mapping[str, int]
    """The classes with fewer videos, or with none: class name -> number of videos."""
    words: str
    """A description of the draw, for records."""


def draw_shots(
    store: LabelledRows,
    rows: npt.ArrayLike,
    shots: int,
    seed: int,
    classes: npt.ArrayLike | None = None,
) -> ShotDraw:
    """Draw `shots` videos of each class from array rows `rows`, or all of a class with fewer.

    Videos whose extraction failed take part, so that the draw does not depend on failures; training
    leaves them out and reports them. `classes` are the label ids to draw from, by default all.
    Raises UserError for fewer than one shot or if there is no video at all.
    """
    if shots < 1 or seed < 0:
        raise UserError(f"{shots} shots with draw seed {seed}: take at least 1 shot, seed 0 or up")
    candidates = np.unique(np.asarray(rows, np.int64))
    positions = store.positions(candidates) if len(candidates) else candidates
    labels = store.labels[positions]
    names = store.class_names
    wanted = range(len(names)) if classes is None else np.asarray(classes, np.int64).tolist()
    chosen: list[int] = []
    short = {}
    for label in wanted:
        places = np.flatnonzero(labels == label)
        places = places[order_by_draw(seed, [store.keys[int(positions[at])] for at in places])]
        chosen += candidates[places[:shots]].tolist()
        if len(places) < shots:
            short[names[label]] = len(places)
    if not chosen:
        raise UserError(f"no video of the {len(names)} classes is in the split to draw from")
    if short:
        log.warning(
            "%s fewer than %s, all of which are taken: %s",
            counted(len(short), "class has", "classes have"),
            *(
                counted(shots, "training video"),
                shown([f"{name} ({count})" for name, count in short.items()]),
            ),
        )
    fewer = f"; {counted(len(short), 'class has', 'classes have')} fewer" if short else ""
    words = f"{counted(shots, 'video')} per class (draw {seed}{fewer})"
    return ShotDraw(np.array(sorted(chosen), np.int64), short, words)


@dataclass(frozen=True)
class TrainingSet:
    """The part of a store that a head is trained on, as arguments of `train_head`.

    `words` describes it in records, `suffix` in the names of runs.
    """

    rows: RowArray
    classes: RowArray | None
    words: str
    suffix: str
    repeats: int


def choose_training_set(
    store: LabelledRows,
    rows: npt.ArrayLike,
    *,
    split: str | None,
    shots: int | None = None,
    draw_seed: int = 1,
    half: str = "all",
    repeat: str = "1",
) -> TrainingSet:
    """Choose array rows from `rows`: all or half of the classes, all videos or `shots` per class.

    `half` is "all", "base" or "novel" (`frequency_halves` of `rows`); `repeat` is a number or
    "full". Raises UserError for other words.
    """
    if half not in ("all", "base", "novel"):
        raise UserError(f"classes {half!r} are unknown: {one_of(half, ('all', 'base', 'novel'))}")
    if shots is not None or half != "all":
        store.require_one_label("a part of the classes" if shots is None else "--shots")
    full = np.unique(np.asarray(rows, np.int64))
    classes = None
    words = [split or "all videos"]
    if half != "all":
        labels = store.labels[store.positions(full)]
        classes = frequency_halves(labels, store.class_names)[half == "novel"]
        full = rows_of_classes(store, full, classes)
    chosen = full
    if shots is not None:
        draw = draw_shots(store, full, shots, draw_seed, classes)
        chosen = draw.rows
        words.append(draw.words)
    if half != "all":
        words.append(f"the {len(classes if classes is not None else ())} {half} classes")
    repeats = repeats_of(repeat, len(full), len(chosen))
    if repeats > 1:
        words.append(f"repeated {repeats} times")
    suffix = suffix_of(half, shots, draw_seed)
    return TrainingSet(chosen, classes, ", ".join(words), suffix, repeats)


def suffix_of(half: str, shots: int | None, draw_seed: int) -> str:
    """Return the end of the name of a run that is trained on so much: "-base-k16-s1"."""
    of_half = "" if half == "all" else f"-{half}"
    return of_half + ("" if shots is None else f"-k{shots}-s{draw_seed}")


def frequency_halves(
    labels: npt.ArrayLike, class_names: Sequence[str]
) -> tuple[RowArray, RowArray]:
    """Return base and novel label ids, ascending: the half with more training videos is base.

    `labels` [n] are the labels of the training videos. Ties go by name, and an odd class is base
    (ViFi-CLIP, Rasheed et al., CVPR 2023: 26 and 25 of HMDB51, 51 and 50 of UCF101).
    """
    counts = np.bincount(np.asarray(labels, np.int64), minlength=len(class_names))
    order = sorted(range(len(class_names)), key=lambda c: (-counts[c], class_names[c]))
    base = -(-len(class_names) // 2)
    empty = [class_names[label] for label in range(len(class_names)) if not counts[label]]
    if empty:
        none = counted(len(empty), "class has", "classes have")
        log.warning("%s no training videos: %s", none, shown(empty))
    return np.sort(np.array(order[:base], np.int64)), np.sort(np.array(order[base:], np.int64))


def rows_of_classes(store: LabelledRows, rows: npt.ArrayLike, classes: npt.ArrayLike) -> RowArray:
    """Return the array rows whose label is in `classes`, or that show one of them."""
    listed = np.unique(np.asarray(rows, np.int64))
    if store.multi_label:
        return listed[store.shown(listed)[:, np.asarray(classes, np.int64)].any(1)]
    found: RowArray = listed[np.isin(store.labels[store.positions(listed)], classes)]
    return found


def without_excluded(store: Store, rows: RowArray, path: Path) -> tuple[RowArray, Excluded]:
    """Return array rows `rows` without the videos that the list `path` names, and what went.

    Keys of videos that are in the store but not in `rows` are known, and change nothing. Raises
    UserError if the list cannot be read or names all of `rows`.
    """
    excluded = Excluded.of(path, store.keys, "this store")
    keys = [store.keys[at] for at in store.positions(rows).tolist()]
    excluded.require_some_of(keys, "training videos")
    gone = frozenset(excluded.keys)
    return rows[np.array([key not in gone for key in keys], bool)], excluded


def usable_rows(store: Store, rows: RowArray) -> RowArray:
    """Return those of array rows `rows` whose extraction did not fail."""
    if not len(rows):
        return rows
    found: RowArray = rows[store.status[store.positions(rows)] == STATUS_OK]
    return found


def repeats_of(repeat: str, full: int, chosen: int) -> int:
    """Return how often an epoch has every chosen video: the number `repeat`, or enough for "full".

    "full" repeats the set to about the size of the full one, as MoTE and Text4Vis do: full
    // chosen times. Raises UserError for other words.
    """
    if repeat == "full":
        return max(1, full // max(chosen, 1))
    if not repeat.isdigit() or int(repeat) < 1:
        raise UserError(f"repeat {repeat!r} is not understood: give a number from 1 up, or full")
    return int(repeat)


def order_by_draw(seed: int, keys: Sequence[str]) -> RowArray:
    """Return the order [n] int64 in which a draw takes videos; it depends on seed and keys only."""

    def drawn(at: int) -> tuple[bytes, str]:
        return hashlib.blake2b(f"shots/{seed}/{keys[at]}".encode(), digest_size=16).digest(), keys[
            at
        ]

    return np.array(sorted(range(len(keys)), key=drawn), np.int64)


def subset_text(text: ClassText, classes: npt.ArrayLike | None) -> ClassText:
    """Return the texts [S,D] of the label ids `classes`, in that order; all texts for None.

    Raises UserError if an id is not in the store or appears twice.
    """
    if classes is None:
        return text
    ids = _checked(classes, len(text.names))
    return replace(
        text, names=tuple(text.names[label] for label in ids), embeddings=text.embeddings[ids]
    )


def renumbered(store: Store, rows: RowArray, classes: npt.ArrayLike | None) -> RowArray:
    """Return the labels [n] int64 of array rows as indices into `classes`.

    Where a video may show several classes, they are zeros and ones, [n,S] uint8.

    Raises UserError if a row belongs to another class.
    Base and novel classes have label spaces of their own (ViFi-CLIP, Rasheed et al., CVPR 2023).
    """
    positions = store.positions(rows)
    if store.multi_label:
        of_all: RowArray = store.shown(rows).astype(np.uint8)
        return of_all if classes is None else of_all[:, _checked(classes, of_all.shape[1])]
    labels = store.labels[positions].astype(np.int64)
    if classes is None:
        return labels
    ids = _checked(classes, len(store.class_names))
    place = np.full(len(store.class_names), -1, np.int64)
    place[ids] = np.arange(len(ids))
    found: RowArray = place[labels]
    if (found < 0).any():
        at = int(np.flatnonzero(found < 0)[0])
        raise UserError(
            f"video {store.keys[int(positions[at])]!r} of class "
            f"{store.class_names[labels[at]]!r} is not one of the {len(ids)} classes to train on: "
            "leave the video out or name its class"
        )
    return found


def rarest_classes(store: Store, rows: RowArray) -> RowArray:
    """Return the class with the fewest videos of those that each row shows, int64 [n]; C for none.

    It stands for the video where a set is divided so that every class is in every part.
    """
    found = store.shown(rows)
    counts = np.where(found, found.sum(0), len(rows) + 1)
    rarest: RowArray = np.where(found.any(1), counts.argmin(1), found.shape[1])
    return rarest


def warn_of_classes_without_videos(names: Sequence[str], labels: RowArray) -> None:
    """Log the classes of `names` that have no label in `labels` [n], or [n,C]."""
    present = class_counts(labels, len(names)) > 0
    absent = [name for name, there in zip(names, present, strict=True) if not there]
    if absent:
        none = f"{len(absent)} of {counted(len(names), 'class', 'classes')}"
        none += " has" if len(absent) == 1 else " have"
        log.warning("%s no training videos: %s", none, shown(absent))


def start_from(head: Head, initial: Head) -> None:
    """Copy the weights and the logit scale of `initial` into `head`, which keeps its classes.

    Raises UserError if the two configurations differ.
    """
    if head.config != initial.config:
        raise UserError(
            f"the head to start from is {initial.config}, the new one {head.config}: train with "
            "the configuration of the first"
        )
    if initial.logit_bias is not None and head.logit_bias is None:
        raise UserError(
            "the head to start from gives a video several classes, and these videos have one each: "
            "start from another head, or leave --from-head out"
        )
    weights = initial.state_dict()
    del weights["training_class_embeddings"]
    head.load_state_dict(weights, strict=False)


def shown(names: Sequence[str]) -> str:
    """Return the first few names as text, with the number of the others."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _checked(classes: npt.ArrayLike, count: int) -> RowArray:
    ids = np.asarray(classes, np.int64)
    if ids.ndim != 1 or len(ids) == 0 or len(np.unique(ids)) < len(ids):
        raise UserError("the classes to train on must be a list of different label ids")
    if ids.min() < 0 or ids.max() >= count:
        wrong = int(ids[(ids < 0) | (ids >= count)][0])
        raise UserError(f"class {wrong} is none of the store's {count} classes (0 to {count - 1})")
    return ids
