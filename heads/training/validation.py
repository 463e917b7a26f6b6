"""The videos that a training is judged on after every epoch, and the judgement of a head on them.

n = training videos, m = validation videos, V = views, F = stored frames, T = frames of a view,
D = embedding width, C = classes.

The validation split is used where there is one. Otherwise some training videos are held out, or,
where they are too few for that, all are judged in turn by heads that were trained without them
(cross-validation). A test split is never used.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from featstore.balance import Balance, class_counts
from featstore.errors import UserError, WorkError, counted, counted_of
from featstore.files.machine import available_memory
from featstore.format.schema import RowArray
from featstore.reading.store import Store
from featstore.segments import segment_positions
from featstore.workspace import OpenedStores
from heads.arithmetic import autocast
from heads.files.run_files import rows_hash
from heads.methods.head import Head
from heads.scoring.scores import fuse_views, ranks, view_cosines
from heads.training.class_weights import say_balance
from heads.training.judged import Judged, JudgedLabels, Judgement
from heads.training.training_set import (
    order_by_draw,
    rarest_classes,
    rows_of_classes,
    shown,
    usable_rows,
)

log = logging.getLogger(__name__)

VALIDATION_SPLIT: Final = "val"
HELD_OUT: Final = "held-out"
"""The source of a validation on training videos that are not trained on."""
CROSS: Final = "cross-validation"
"""The source of a validation on all training videos, in `PARTS` parts."""
NONE: Final = "none"
"""What `choose_validation` is asked for if there shall be no validation."""

PARTS: Final = 4
CROSS_BELOW: Final = 250
"""Training videos below which they are cross-validated: a fifth of them would be fewer than 50, on
which the accuracy is known to about 7 points only."""
_HELD_SHARE: Final = 10  # one video in ten is held out,
_LEAST_HELD, _MOST_HELD = 50, 1000  # but as many as this at least and at most
_MEMORY_SHARE: Final = 0.2
SMALLEST: Final = torch.finfo(torch.float64).tiny
_OUTSTANDING: Final = 100  # times the median class; such a class decides the accuracy alone


@dataclass(frozen=True, eq=False)
class Validation:
    """The validation videos of one training.

    `parts` [n] belongs to cross-validation: the part of every training video `rows`, 0 up, or -1
    for a video that is in no part because its class has no other.
    """

    store: Store
    rows: RowArray
    """[m] array rows of `store`, all with features."""
    source: str
    """The name of a split, `HELD_OUT` or `CROSS`."""
    n_listed: int
    n_failed: int
    parts: RowArray | None = None

    @property
    def words(self) -> str:
        """A description for people, such as "200 held-out training videos"."""
        if self.source == CROSS:
            return f"{self.n_listed} training videos in {PARTS} parts"
        if self.source == HELD_OUT:
            return counted(len(self.rows), "held-out training video")
        failed = f", {self.n_failed} failed" if self.n_failed else ""
        return f"{counted(len(self.rows), 'video')} of split {self.source}{failed}"

    @property
    def left_out(self) -> str:
        """What to add to the description of the training videos."""
        return f", {len(self.rows)} held out" if self.source == HELD_OUT else ""

    def to_json(self) -> dict[str, Any]:
        """Return what fixes the validation, as entries of `data` in a run's config.json."""
        return {"validation": self.source, "validation_hash": rows_hash(self.rows)}


def choose_validation(
    store: Store,
    rows: npt.ArrayLike,
    classes: npt.ArrayLike | None = None,
    *,
    split: str | None = None,
    stores: OpenedStores | None = None,
    asked: str | None = None,
    hold_out: bool = True,
    seed: int = 0,
    excluded: Collection[str] = (),
) -> tuple[RowArray, Validation | None]:
    """Choose the validation of a training on array rows `rows`; return the rows left, and it.

    `classes` are the label ids trained on (None: all), `split` is the split of `rows`. The
    videos are those of split "val" in this store, else in the store of `stores` that was made in
    the same way; without one, and if `hold_out` allows it, training videos, drawn by `seed` and
    key. `asked` names another split, or is `HELD_OUT` or `NONE`. Videos whose keys are `excluded`
    are not validated on. Every choice is logged.
    Raises UserError if the split that was asked for cannot be used.
    """
    listed = np.unique(np.asarray(rows, np.int64))
    if asked == NONE:
        return listed, None
    found = None
    if asked is not None and asked == split:
        raise UserError(
            f"--validation {asked} is the split that is trained on: name another one, or "
            f"{HELD_OUT} to hold out a part of it"
        )
    if asked != HELD_OUT:
        found = _of_split(
            *(store, listed, classes, asked or VALIDATION_SPLIT, split, stores, asked), excluded
        )
    if found is not None:
        _describe_classes(found, classes)
        return listed, found
    if asked is None and not hold_out:
        return listed, None
    return _of_training(store, listed, seed)


def _of_split(
    store: Store,
    trained: RowArray,
    classes: npt.ArrayLike | None,
    name: str,
    split: str | None,
    stores: OpenedStores | None,
    asked: str | None,
    excluded: Collection[str],
) -> Validation | None:
    """Return the videos of split `name`; None if no store has any that can be used."""
    made, where = store.provenance, store
    if name == split:
        return None
    if name not in store.split_names or not store.split(name).size:
        try:
            if stores is None:
                raise UserError(f"{store.path.name} has no videos of split {name!r}")
            where = stores.choose(
                split=name,
                views=store.schema.views,
                crops=made.crops,
                encoder_fingerprint=made.encoder_fingerprint,
                sampling=made.sampling,
            )
            if where.class_names != store.class_names:
                raise UserError(f"{where.path.name} has other classes than {store.path.name}")
        except (UserError, WorkError) as error:
            if asked is not None:
                raise
            if isinstance(error, WorkError):
                log.warning("split %s cannot be used for validation: %s", name, error)
            return None
    listed = np.unique(where.split(name))
    if classes is not None:
        listed = rows_of_classes(where, listed, classes)
    if excluded:
        kept = [where.keys[at] not in excluded for at in where.positions(listed).tolist()]
        listed = listed[np.array(kept, bool)]
    known = {store.keys[at] for at in store.positions(trained).tolist()}
    fresh = [where.keys[at] not in known for at in where.positions(listed).tolist()]
    if not all(fresh):
        twice = counted(len(fresh) - sum(fresh), "video is", "videos are")
        log.warning("%s of split %s trained on: left out", twice, name)
        listed = listed[np.array(fresh, bool)]
    usable = usable_rows(where, listed)
    failed = len(listed) - len(usable)
    if len(usable) == 0:
        words = f"split {name} has no videos to validate on: {failed} of {len(listed)} failed"
        if asked is not None:
            raise UserError(f"{words} in extraction: name another split, or {HELD_OUT}")
        log.warning("%s in extraction", words)
        return None
    found = Validation(where, usable, name, len(listed), failed)
    log.info("validation: %s", found.words)
    return found


def _of_training(store: Store, listed: RowArray, seed: int) -> tuple[RowArray, Validation | None]:
    """Hold out some of the training videos, or cross-validate all of them if they are few."""
    usable = usable_rows(store, listed)
    if not len(usable):
        return listed, None  # `train_head` says why nothing can be trained
    if len(usable) < CROSS_BELOW:
        parts = dealt(store, usable, PARTS, seed)
        if (parts < 0).all():
            log.warning(
                "no class has a second video and there is no validation split: nothing can tell "
                "whether training helps; add videos"
            )
            return listed, None
        log.info(
            "validation: too few training videos to hold some out, %d in all, so they are "
            "cross-validated in %d parts; then the head is trained on all of them",
            *(len(usable), PARTS),
        )
        return listed, Validation(store, usable, CROSS, len(usable), 0, parts)
    wanted = min(max(len(usable) // _HELD_SHARE, _LEAST_HELD), _MOST_HELD)
    held = usable[dealt(store, usable, len(usable) // wanted, seed) == 0]
    log.info(
        "validation: %s held out to choose the epoch (--validation none trains on all)",
        counted_of(len(held), len(usable), "training video"),
    )
    found = Validation(store, held, HELD_OUT, len(held), 0)
    return np.setdiff1d(listed, held), found


def dealt(store: Store, rows: RowArray, parts: int, seed: int) -> RowArray:
    """Deal array rows `rows` [n] out to `parts` parts, class by class; returns numbers [n] int64.

    Parts and classes are as even as they can be; of several classes a video shows, its rarest one
    counts. The draw depends on `seed` and keys only. The only
    video of a class is in no part (-1): a head trained without it would not know the class.
    """
    positions = store.positions(rows)
    labels = rarest_classes(store, rows) if store.multi_label else store.labels[positions]
    part = np.full(len(rows), -1, np.int64)
    given = 0
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            continue
        order = order_by_draw(seed, [store.keys[int(positions[at])] for at in members])
        part[members[order]] = np.arange(given, given + len(members)) % parts
        given += len(members)
    return part


def _describe_classes(found: Validation, classes: npt.ArrayLike | None) -> None:
    """Warn of trained classes without validation videos."""
    names = found.store.class_names
    wanted = range(len(names)) if classes is None else np.asarray(classes, np.int64).tolist()
    present = set(np.flatnonzero(found.store.shown(found.rows).any(0)).tolist())
    absent = [names[label] for label in wanted if label not in present]
    if absent:
        log.warning(
            "%d of %s without validation videos, so nothing is said about them: %s",
            *(len(absent), counted(len(wanted), "class", "classes"), shown(absent)),
        )


def check_balance(names: tuple[str, ...], labels: RowArray, balanced: bool = False) -> Balance:
    """Refuse training labels [n] of one class, and warn of a class that outnumbers all others.

    With `balanced` sampling no class does.

    With several classes a video (labels [n,C]), some of them must be shown. Returns the counts,
    which are logged. Raises UserError if there are not at least two classes to tell apart.
    """
    counts = class_counts(labels, len(names))
    present = np.flatnonzero(counts)
    if labels.ndim == 2:
        if not len(present):
            raise UserError(
                f"none of {counted(len(labels), 'training video')} shows a class: there is nothing "
                "to learn; add videos"
            )
        return say_balance(names, labels)
    if len(present) < 2:
        raise UserError(
            f"the training videos are of one class, {names[int(present[0])]!r} "
            f"({counted(len(labels), 'video')}): there is nothing to tell apart; add videos of a "
            "second class"
        )
    most = int(counts.argmax())
    others = float(np.median(counts[present[present != most]]))
    if counts[most] >= _OUTSTANDING * others and not balanced:
        log.warning(
            "class %r has %d training videos, the others about %d: accuracy will mostly be that of "
            "this class; --class-sampling balanced lets all classes come equally often",
            *(names[most], int(counts[most]), others),
        )
    return say_balance(names, labels)


class Judge:
    """Judges heads on features [m,V,T,D] and labels of videos, as a close-set evaluation does.

    Labels are int64 [m], or [m,C] of zeros and ones where a video may show several classes.

    `class_embeddings` [C,D] and `class_names` are the classes trained on. The head runs in
    `precision`.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        class_embeddings: Tensor,
        class_names: Sequence[str] | None,
        precision: str = "fp32",
    ) -> None:
        self.features, self.labels = features, labels
        self.classes, self.class_names = class_embeddings, class_names
        self._precision = precision

    @torch.no_grad()
    def __call__(self, head: Head) -> Judgement:
        """Judge a head in evaluation mode, on its own device."""
        where = head.logit_scale.device
        with autocast(self._precision, where):
            cosines = view_cosines(
                head, self.features, self.classes.to(where), False, self.class_names
            )
        likely = head.probabilities(cosines).mean(1).cpu()
        cosines = cosines.double().cpu()
        if self.labels.ndim == 2:
            truth = self.labels.bool()
            right = torch.where(truth, likely, 1 - likely).clamp_min(SMALLEST)
            return JudgedLabels(cosines.mean(1), truth, -right.log().sum(1))
        place = ranks(fuse_views(cosines), self.labels)
        likely = likely.gather(1, self.labels[:, None])[:, 0]
        return Judged(place == 0, -likely.clamp_min(SMALLEST).log())


def judged_features(store: Store, rows: RowArray, frames: int) -> tuple[Tensor, RowArray]:
    """Load `frames` frames of array rows `rows`, those that evaluation takes: float16 [m,V,T,D].

    If they need more than a fifth of the free memory, evenly chosen rows are loaded; returns the
    rows too.
    """
    stored = store.schema.frames
    chosen = segment_positions(stored, frames) if frames < stored else None
    most = int(_MEMORY_SHARE * available_memory() / (store.schema.row_bytes * frames / stored))
    if len(rows) > max(most, 1):
        log.warning("memory is short: judging %d of %d videos", max(most, 1), len(rows))
        rows = rows[segment_positions(len(rows), max(most, 1))]
    return torch.from_numpy(store.features(rows, chosen)), rows


def as_frames(features: Tensor) -> Tensor:
    """[m,V,T,D] -> [m,V*T,D], the frames of all views."""
    return rearrange(features, "m v t d -> m (v t) d")
