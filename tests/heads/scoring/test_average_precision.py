"""Average precision against a computation that shares nothing with it, and its properties."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from heads.scoring.average_precision import average_precisions, mean_average_precision


def by_thresholds(scores: npt.NDArray[np.float64], shown: npt.NDArray[np.bool_]) -> float:
    """scikit-learn's definition, word for word: sum over thresholds of (R_n - R_n-1) P_n."""
    found, recall = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        said = scores >= threshold
        right = int((said & shown).sum())
        now = right / int(shown.sum())
        found += (now - recall) * right / int(said.sum())
        recall = now
    return found


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_sum_over_thresholds_with_and_without_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((60, 7))
    if seed % 2:
        scores = np.round(scores)  # many equal scores
    shown = rng.random((60, 7)) < rng.random(7)
    shown[0] = True
    expected = [by_thresholds(*pair) for pair in zip(scores.T, shown.T, strict=True)]
    np.testing.assert_allclose(average_precisions(scores, shown), expected, rtol=1e-12)
    assert mean_average_precision(scores, shown) == pytest.approx(100 * np.mean(expected))


def test_values_that_can_be_computed_by_hand() -> None:
    # scikit-learn's own example: 0.83
    example = np.array([[0.1], [0.4], [0.35], [0.8]]), np.array([[0], [0], [1], [1]], bool)
    assert average_precisions(*example)[0] == pytest.approx(1 / 2 + 1 / 3)
    best = np.array([[3.0], [2.0], [1.0]]), np.array([[True], [True], [False]])
    assert average_precisions(*best)[0] == 1
    last = np.array([[3.0], [2.0], [1.0]]), np.array([[False], [False], [True]])
    assert average_precisions(*last)[0] == pytest.approx(1 / 3)
    alike = np.zeros((4, 1)), np.array([[True], [False], [False], [False]])
    assert average_precisions(*alike)[0] == pytest.approx(1 / 4)


def test_neither_the_order_of_videos_nor_the_scale_of_scores_matters() -> None:
    rng = np.random.default_rng(3)
    scores, shown = np.round(rng.standard_normal((80, 4)), 1), rng.random((80, 4)) < 0.3
    found = average_precisions(scores, shown)
    order = rng.permutation(80)
    np.testing.assert_array_equal(average_precisions(scores[order], shown[order]), found)
    np.testing.assert_array_equal(average_precisions(np.exp(3 * scores) + 5, shown), found)


def test_a_class_that_no_video_shows_has_none_and_is_left_out_of_the_mean() -> None:
    scores = np.array([[1.0, 5.0], [0.0, 6.0]])
    shown = np.array([[True, False], [False, False]])
    found = average_precisions(scores, shown)
    assert found[0] == 1
    assert np.isnan(found[1])
    assert mean_average_precision(scores, shown) == 100
    assert np.isnan(mean_average_precision(scores, np.zeros((2, 2), bool)))
