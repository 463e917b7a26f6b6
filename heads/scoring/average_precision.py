"""Average precision: how well the videos that show a class are ranked before the others.

n = videos, C = classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def average_precisions(
    scores: npt.NDArray[Any], shown: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """Return the average precision of every class from 0 to 1, float64 [C]; NaN without videos.

    `scores` [n,C] and `shown` [n,C]. It is the sum over thresholds of the gain in recall times the
    precision there, as in scikit-learn (`average_precision_score`): no interpolation, and videos of
    equal score count together, so that their order plays no part.
    """
    found = np.full(scores.shape[1], np.nan)
    for at, (of_class, truth) in enumerate(zip(scores.T, shown.T, strict=True)):
        positives = int(truth.sum())
        if not positives:
            continue
        order = np.argsort(-of_class, kind="stable")
        ranked, hits = of_class[order], truth[order].cumsum()
        ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
        precision = hits[ends] / (ends + 1)
        found[at] = float((np.diff(hits[ends], prepend=0) * precision).sum() / positives)
    return found


def mean_average_precision(scores: npt.NDArray[Any], shown: npt.NDArray[np.bool_]) -> float:
    """Return the mean in percent over the classes that some video shows; NaN if there is none."""
    found = average_precisions(scores, shown)
    known = found[~np.isnan(found)]
    return 100.0 * float(known.mean()) if len(known) else float("nan")
