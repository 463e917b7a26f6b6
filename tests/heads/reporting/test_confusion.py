"""The picture of confusions: any names, any number of classes, every confusion in its place."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib import colormaps

from heads.reporting.confusion import LABELLED, confusion_plot

# Names that a picture can stumble over: mathematics, letters that fonts lack, what turns text
# around, nothing at all, and more than there is room for.
NAMES = ["$x$", "a_b^{c}", "跳舞 ダンス 춤", "रंग", "\U000f0000", "\u202eback\x1b[31m", ""]
NAMES += ["w" * 300]


def drawn(path: Path, counts: np.ndarray, names: list[str], title: str = "") -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        confusion_plot(counts, names, list(range(len(names))), path, title)
    picture = matplotlib.image.imread(path)
    return (picture * 255).round().astype(int)[..., :3]


def pixels(picture: np.ndarray, share: float) -> int:
    """How many pixels have the colour of a share."""
    colour = np.array(colormaps["Blues"](share)[:3]) * 255
    return int((np.abs(picture - colour).max(-1) <= 2).sum())


def dark(picture: np.ndarray) -> int:
    """Pixels of cells with all videos of a class; the scale has a few too."""
    return pixels(picture, 1.0)


def test_any_name_can_be_drawn(tmp_path: Path) -> None:
    file = tmp_path / "any.png"
    picture = drawn(file, np.eye(len(NAMES), dtype=np.int64), NAMES, "$ti_tle$ \u202e é " * 9)
    assert max(picture.shape[:2]) < 2000


@pytest.mark.parametrize("n", [1, 3, 20, LABELLED])
def test_every_class_has_its_cell(tmp_path: Path, n: int) -> None:
    names = [f"class {k}" for k in range(n)]
    counts = 20 * np.eye(n, dtype=np.int64)
    perfect = drawn(tmp_path / "a.png", counts, names)
    counts[0, 0] = 0  # a class without videos: its row is grey
    without = drawn(tmp_path / "b.png", counts, names)
    assert perfect.shape == without.shape
    cell = dark(perfect) / n
    assert 0.02 < cell / 150**2 < 0.7  # square inches
    assert dark(perfect) - dark(without) == pytest.approx(cell, rel=0.2)


def test_of_many_classes_those_that_are_confused_are_drawn(tmp_path: Path) -> None:
    """Of 400 classes 12 pairs, far from each other, are always confused: all of them are there."""
    n = 400
    names = [f"class {k}" for k in range(n)]
    counts = np.zeros((n, n), np.int64)
    empty = drawn(tmp_path / "empty.png", counts, names, "a title")
    for k in range(12):
        counts[k, n - 1 - 3 * k] = counts[n - 1 - 3 * k, k] = 5
    picture = drawn(tmp_path / "many.png", counts, names, "a title")
    assert max(picture.shape[:2]) < 2500
    assert dark(picture) - dark(empty) == pytest.approx(24 * (0.2 * 150) ** 2, rel=0.1)
    # With a few confusions more than there is room for, the frequent ones are drawn.
    counts[100:160, 200:260] += np.eye(60, dtype=np.int64)
    counts[100:160, 100:160] += 9 * np.eye(60, dtype=np.int64)
    full = drawn(tmp_path / "full.png", counts, names, "a title")
    assert dark(full) - dark(empty) == pytest.approx(24 * (0.2 * 150) ** 2, rel=0.1)
