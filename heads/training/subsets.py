"""Training on some rows and classes of a store, from the weights of another head.

n = rows trained on, C = classes of the store, S = classes trained on, D = embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from featstore.errors import UserError
from featstore.format.class_texts import ClassText
from featstore.format.schema import RowArray
from featstore.reading.store import Store
from heads.methods.head import Head

log = logging.getLogger(__name__)

_SHOWN = 5  # names that a message lists before it counts the rest


def subset_text(text: ClassText, classes: npt.ArrayLike | None) -> ClassText:
    """The texts [S,D] of label ids `classes` in their order; all of them for None.

    UserError when an id is none of the store's or is there twice.
    """
    if classes is None:
        return text
    ids = _checked(classes, len(text.names))
    return replace(
        text, names=tuple(text.names[label] for label in ids), embeddings=text.embeddings[ids]
    )


def renumbered(store: Store, rows: RowArray, classes: npt.ArrayLike | None) -> RowArray:
    """Labels of array rows [n] int64, as places in `classes`; UserError for a row of no such class.

    Base and novel classes have label spaces of their own (ViFi-CLIP, Rasheed et al., CVPR 2023).
    """
    positions = store.positions(rows)
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
            f"{store.class_names[labels[at]]!r} is not of the {len(ids)} classes to train on: "
            "leave the video out or name its class"
        )
    return found


def warn_of_classes_without_videos(names: Sequence[str], labels: RowArray) -> None:
    """Say which of the classes `names` no label [n] stands for."""
    present = np.bincount(labels, minlength=len(names)) > 0
    absent = [name for name, there in zip(names, present, strict=True) if not there]
    if absent:
        log.warning(
            "%d of %d classes have no training videos: %s", len(absent), len(names), shown(absent)
        )


def start_from(head: Head, initial: Head) -> None:
    """Give `head` the weights and the logit scale of `initial`; its classes stay its own.

    UserError when the two are not of one configuration.
    """
    if head.config != initial.config:
        raise UserError(
            f"the head to start from is {initial.config}, the new one {head.config}: train with "
            "the configuration of the first"
        )
    weights = initial.state_dict()
    del weights["training_class_embeddings"]
    head.load_state_dict(weights, strict=False)


def shown(names: Sequence[str]) -> str:
    """A few of the names, and how many more there are."""
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
