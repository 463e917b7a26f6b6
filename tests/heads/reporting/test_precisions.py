"""The picture of average precisions: any names, any number of classes, the worst among them."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from heads.reporting.precisions import MOST, precision_plot
from tests.heads.reporting.test_confusion import NAMES


def drawn(
    path: Path, precisions: list[float], shown: list[int], names: list[str], title: str = ""
) -> np.ndarray:
    values = np.array(precisions, np.float64)
    counts, labels = np.array(shown, np.int64), list(range(len(names)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precision_plot(values, counts, 50, names, labels, path, title)
    picture = matplotlib.image.imread(path)
    return (picture * 255).round().astype(int)[..., :3]


def blue(picture: np.ndarray) -> int:
    """Pixels of bars."""
    return int((np.abs(picture - np.array([31, 119, 180])).max(-1) <= 2).sum())


def test_any_name_can_be_drawn(tmp_path: Path) -> None:
    values, shown = [10.0 * k for k in range(len(NAMES))], [1] * len(NAMES)
    picture = drawn(tmp_path / "any.png", values, shown, NAMES, "$ti_tle$ \u202e é " * 9)
    assert max(picture.shape[:2]) < 2000


def test_bars_are_as_long_as_the_precisions(tmp_path: Path) -> None:
    names = ["run", "jump", "sit"]
    half = blue(drawn(tmp_path / "a.png", [50, 50, 50], [9, 9, 9], names))
    whole = blue(drawn(tmp_path / "b.png", [100, 100, 100], [9, 9, 9], names))
    assert whole == pytest.approx(2 * half, rel=0.03)
    assert blue(drawn(tmp_path / "c.png", [0, 0, 0], [9, 9, 9], names)) < half / 50


def test_classes_that_no_video_shows_are_left_out(tmp_path: Path) -> None:
    some = drawn(tmp_path / "a.png", [80, 20], [5, 1], ["run", "jump"])
    more = drawn(tmp_path / "b.png", [80, np.nan, 20], [5, 0, 1], ["run", "sit", "jump"])
    assert more.shape[0] - some.shape[0] < 30  # a line of text, no bar
    assert blue(more) == pytest.approx(blue(some), rel=0.01)
    nothing = drawn(tmp_path / "c.png", [np.nan], [0], ["run"])
    assert not blue(nothing)


def test_of_many_classes_the_best_and_the_worst_are_drawn(tmp_path: Path) -> None:
    """The ten that are wrong come last, whatever their place among the classes."""
    n = 300
    names = [f"class {k}" for k in range(n)]
    worst = set(range(0, n, 30))
    values = [0.0 if k in worst else 100.0 for k in range(n)]
    many = drawn(tmp_path / "many.png", values, [9] * n, names)
    assert many.shape[0] < 1700
    whole = blue(drawn(tmp_path / "few.png", [100.0] * MOST, [9] * MOST, names[:MOST]))
    assert blue(many) == pytest.approx(whole * (MOST - len(worst)) / MOST, rel=0.03)
