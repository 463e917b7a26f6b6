"""Classes with different numbers of videos: counts, orders in which all come alike, and weights.

n = videos, C = classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featstore.errors import counted

IntArray = npt.NDArray[np.int64]


def class_counts(labels: npt.ArrayLike, classes: int) -> IntArray:
    """Return the videos of every class, int64 [C], from labels [n], or [n, C] of several."""
    found = np.asarray(labels)
    found = found.astype(bool) if found.ndim == 2 else found
    counts = found.sum(0) if found.ndim == 2 else np.bincount(found, minlength=classes)
    as_int: IntArray = counts.astype(np.int64)
    return as_int


@dataclass(frozen=True)
class Balance:
    """How evenly training videos are spread over classes; those without videos count in neither."""

    classes: int
    """Classes with videos."""
    without_videos: int
    most: int
    most_class: str
    median: float
    least: int
    least_class: str
    ratio: float
    """The largest class divided by the smallest."""
    classes_per_video: float | None = None
    """The mean number of classes that a video shows; None where each has one."""

    @classmethod
    def of(cls, labels: npt.ArrayLike, class_names: Sequence[str]) -> Balance:
        """Count labels [n], or [n, C] of several classes; at least one video must have a class."""
        found = np.asarray(labels)
        counts = class_counts(found, len(class_names))
        present = np.flatnonzero(counts)
        most, least = (int(present[f(counts[present])]) for f in (np.argmax, np.argmin))
        return cls(
            classes=len(present),
            without_videos=len(counts) - len(present),
            most=int(counts[most]),
            most_class=class_names[most],
            median=float(np.median(counts[present])),
            least=int(counts[least]),
            least_class=class_names[least],
            ratio=float(counts[most] / counts[least]),
            classes_per_video=float(counts.sum() / len(found)) if found.ndim == 2 else None,
        )

    @property
    def words(self) -> str:
        """The counts in one line."""
        several = self.classes_per_video
        counts = f"{self.least} to {self.most} videos, median {self.median:g}"
        counts += f", ratio {self.ratio:.1f}"
        return (
            f"{self.classes} with "
            + (counts if self.least < self.most else f"{counted(self.least, 'video')} each")
            + (f"; {self.without_videos} without videos" if self.without_videos else "")
            + ("" if several is None else f"; {several:.1f} classes a video")
        )

    def to_json(self) -> dict[str, Any]:
        """The counts as strict JSON values."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def members_of(labels: npt.ArrayLike) -> list[IntArray]:
    """Return the positions of the videos of every class that has any, from labels [n] or [n, C].

    With several classes a video is in the list of each; those that show none are a list as well.
    """
    found = np.asarray(labels)
    if found.ndim == 1:
        return [np.flatnonzero(found == label) for label in np.unique(found)]
    shown = np.column_stack([found.astype(bool), ~found.astype(bool).any(1)])
    return [members for column in shown.T if len(members := np.flatnonzero(column))]


def balanced_order(members: Sequence[IntArray], count: int, rng: np.random.Generator) -> IntArray:
    """Return the order of an epoch of `count` places in which all classes come equally often.

    Of a class with more videos than its places, a part is drawn; with fewer, each video comes
    equally often, give or take one. Numbers of places differ by one at most; which classes get one
    more is drawn. The result depends on `members` and the state of `rng` only, int64 [count].
    """
    classes = len(members)
    places = np.full(classes, count // classes)
    places[rng.permutation(classes)[: count % classes]] += 1
    drawn = []
    for of_class, wanted in zip(members, places.tolist(), strict=True):
        rounds = [rng.permutation(of_class) for _ in range(-(-wanted // len(of_class)))]
        drawn += [part for part in (np.concatenate([*rounds, of_class[:0]])[:wanted],) if wanted]
    order: IntArray = np.concatenate(drawn)[rng.permutation(count)].astype(np.int64)
    return order


def weights_by_rule(labels: npt.ArrayLike, classes: int, rule: str) -> npt.NDArray[np.float64]:
    """Return the weight of every class, float64 [C], by the rule "balanced" or "sqrt".

    With one class a video: in inverse proportion to the class's videos, or to their root, with mean
    1 over the n videos. With several: what a shown class counts relative to one not shown, videos
    without the class divided by videos with it, or the root of that. A class without videos has 1.
    """
    found = np.asarray(labels)
    counts = class_counts(found, classes).astype(np.float64)
    weights = np.ones(classes)
    present = counts > 0
    of_class = counts[present]
    if found.ndim == 2:
        weights[present] = np.maximum(len(found) - of_class, 1) / of_class
        return np.sqrt(weights) if rule == "sqrt" else weights
    weights[present] = 1 / (np.sqrt(of_class) if rule == "sqrt" else of_class)
    return with_mean_one(weights, found)


def with_mean_one(
    weights: npt.NDArray[np.float64], labels: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Scale weights [C] to mean 1 over the videos of labels [n]: rates keep their meaning."""
    scaled: npt.NDArray[np.float64] = weights / weights[np.asarray(labels)].mean()
    return scaled
