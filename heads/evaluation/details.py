"""What became of every tested video, and what that says about the classes.

n = evaluated videos of a test set, C = its candidates, K = the best classes that are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from heads.evaluation.protocols.protocol import LabelIds
from heads.scoring import TOP_K

NAMED_CLASSES: Final = 5  # how many classes and confusions a summary names

Confidences = npt.NDArray[np.float64]


class NotEvaluated(NamedTuple):
    """A listed video without a score, and why."""

    key: str
    label: int
    reason: str


@dataclass(frozen=True, eq=False)
class SplitDetail:
    """Every prediction of one test set: its n evaluated samples, in the store's order."""

    split: str
    classes: LabelIds
    """[C] label ids of the candidates."""
    labels: LabelIds
    """[n] the true label ids."""
    predicted: LabelIds
    """[n] the label ids with the best score; ties go to the candidate named first."""
    places: LabelIds
    """[n] the rank of the true class, 0 = best."""
    keys: tuple[str, ...]
    """[n] the keys of the videos."""
    best: LabelIds | None = None
    """[n,K] the label ids of the K best candidates, best first; None if they were not kept."""
    confidences: Confidences | None = None
    """[n,K] how sure the model is of each of `best` (`BlockScores.confidences`)."""
    failed: tuple[NotEvaluated, ...] = ()

    def confusion(self) -> npt.NDArray[np.int64]:
        """Count the videos by [true class, predicted class], both in the order of `classes`."""
        n = len(self.classes)
        order = np.argsort(self.classes)
        true, said = (
            order[np.searchsorted(self.classes, which, sorter=order)]
            for which in (self.labels, self.predicted)
        )
        return np.bincount(true * n + said, minlength=n * n).reshape(n, n).astype(np.int64)


def merged(details: Sequence[SplitDetail]) -> SplitDetail:
    """Return all test sets as one, without `best`; a video of several sets counts in each."""
    return SplitDetail(
        split=" + ".join(part.split for part in details),
        classes=np.unique(np.concatenate([part.classes for part in details])),
        labels=np.concatenate([part.labels for part in details]),
        predicted=np.concatenate([part.predicted for part in details]),
        places=np.concatenate([part.places for part in details]),
        keys=tuple(key for part in details for key in part.keys),
        failed=tuple(video for part in details for video in part.failed),
    )


@dataclass(frozen=True)
class ClassOutcome:
    """The outcome for one candidate class; accuracies are in percent, None without videos."""

    label: int
    name: str
    videos: int
    """Evaluated videos of this class."""
    failed: int
    top1: float | None
    top5: float | None
    """None with fewer than five candidates."""
    taken_for: str | None
    """The wrong class that most of its videos were taken for; None if there was none."""
    times: int
    """How many videos were taken for that class."""


@dataclass(frozen=True)
class Confusion:
    """`times` of the `videos` evaluated videos of one class were taken for another one."""

    name: str
    taken_for: str
    times: int
    videos: int


def class_outcomes(detail: SplitDetail, class_names: Sequence[str]) -> list[ClassOutcome]:
    """Return the outcome of every candidate, in their order; `class_names` are by label id."""
    counts = detail.confusion()
    size = len(class_names)
    videos = np.bincount(detail.labels, minlength=size)
    lost = np.array([video.label for video in detail.failed], np.int64)
    failed = np.bincount(lost, minlength=size)
    right, among = (
        np.bincount(detail.labels[detail.places < k], minlength=size) for k in (1, TOP_K)
    )
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    found = []
    for at, label in enumerate(detail.classes.tolist()):
        n, said = int(videos[label]), int(wrong[at].argmax())
        times = int(wrong[at, said])
        known = n > 0 and len(detail.classes) >= TOP_K
        found.append(
            ClassOutcome(
                label,
                class_names[label],
                n,
                int(failed[label]),
                100 * int(right[label]) / n if n else None,
                100 * int(among[label]) / n if known else None,
                class_names[int(detail.classes[said])] if times else None,
                times,
            )
        )
    return found


def confusions(
    detail: SplitDetail, class_names: Sequence[str], most: int = NAMED_CLASSES
) -> list[Confusion]:
    """Return the `most` most frequent confusions, of equal ones the larger share of its class."""
    counts = detail.confusion()
    videos = counts.sum(1)
    np.fill_diagonal(counts, 0)
    true, said = np.nonzero(counts)
    times = counts[true, said]
    order = np.lexsort((said, true, videos[true], -times))[:most]
    return [
        Confusion(
            class_names[int(detail.classes[true[at]])],
            class_names[int(detail.classes[said[at]])],
            int(times[at]),
            int(videos[true[at]]),
        )
        for at in order.tolist()
    ]


@dataclass(frozen=True)
class ClassSummary:
    """The best and worst classes of an evaluation, and its most frequent confusions.

    With few classes `best_classes` holds all of them, best first, and `worst_classes` none. Classes
    without an evaluated video are left out.
    """

    classes_tested: int
    """The number of classes with an evaluated video."""
    best_classes: tuple[ClassOutcome, ...]
    worst_classes: tuple[ClassOutcome, ...]
    confusions: tuple[Confusion, ...]

    @classmethod
    def of(cls, details: Sequence[SplitDetail], class_names: Sequence[str]) -> ClassSummary:
        """Summarise all test sets together; of equally good classes the larger one is named."""
        whole = merged(details)
        tested = [outcome for outcome in class_outcomes(whole, class_names) if outcome.videos]
        best = sorted(tested, key=lambda found: (-(found.top1 or 0.0), -found.videos))
        worst = sorted(tested, key=lambda found: (found.top1 or 0.0, -found.videos))
        few = len(tested) <= 2 * NAMED_CLASSES
        return cls(
            len(tested),
            tuple(best if few else best[:NAMED_CLASSES]),
            tuple(() if few else worst[:NAMED_CLASSES]),
            tuple(confusions(whole, class_names)),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the classes and confusions as strict JSON values."""
        return asdict(self)
