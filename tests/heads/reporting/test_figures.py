"""The picture of results shows every result."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from heads.reporting.figures import tradeoff_plot

# The colours of the first five heads, as they are drawn.
COLOURS = [(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189)]


def discs(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(picture[..., :3].astype(int) - colour).max(-1) <= 2).sum())


@pytest.mark.parametrize("shift", [0, 20])
def test_no_point_is_covered(tmp_path: Path, shift: int) -> None:
    """Points in all corners and the middle: each is there in full, beside that of the legend."""
    places = [(0, 0), (0, 40), (40, 0), (40, 40), (20, 20)]
    rows = [
        {"head": f"run {i}", "modulated": False, "closeset_top1": 30 + x, "zeroshot_top1": 30 + y}
        for i, (x, y) in enumerate((x + shift, y) for x, y in places)
    ]
    tradeoff_plot(rows, tmp_path / "plot.png")
    picture = (matplotlib.image.imread(tmp_path / "plot.png") * 255).round()
    found = [discs(picture, colour) for colour in COLOURS]
    area = np.pi / 4 * (9 / 72 * 150) ** 2
    assert min(found) > 1.8 * area
    assert max(found) - min(found) < 0.1 * area
