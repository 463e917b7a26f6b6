"""Draws the average precision of classes, as bars."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from featstore.errors import counted, safe_text
from featstore.files.durable import write_bytes
from heads.reporting.written_names import POINTS, WrittenNames

MOST: Final = 40
"""With more classes, so many are drawn: half of them the best, half the worst."""
_BAR, _WIDE, _RIGHT = 0.2, 4.0, 1.1  # inches: a class, the axis, and the numbers beside it


def precision_plot(
    precisions: npt.NDArray[np.float64],
    shown: npt.NDArray[np.int64],
    videos: int,
    class_names: Sequence[str],
    labels: Sequence[int],
    path: Path,
    title: str = "",
) -> None:
    """Draw average precisions [C] in percent, best first, as the PNG file `path`.

    `shown` [C] is how many of the evaluated `videos` show each class. Beside each bar stand its
    number and that count; a mark on it is what a random order would give, and a line is the mean.
    Classes that no video shows are left out. `title` and what the picture leaves out are written
    above it. A name that no font of this machine can write is replaced by the class's number, of
    `labels`.
    """
    known = np.flatnonzero(shown)
    order = known[np.lexsort((known, -precisions[known]))]
    lines = [safe_text(title)] if title else []
    drawn, half = order, MOST // 2
    if len(order) > MOST:
        drawn = np.concatenate([order[:half], order[-half:]])
        lines.append(f"the {half} best and the {half} worst of {len(order)} classes")
    names = WrittenNames([class_names[at] for at in drawn], [labels[at] for at in drawn])
    if lacking := len(precisions) - len(known):
        lines.append(f"classes left out because no video shows them: {lacking}")
    lines.append("dashed: the mean over classes; black marks: what a random order gives")
    if names.numbered:
        lines.append(names.words)
    room = names.width + 0.4
    wide = room + _WIDE + _RIGHT
    columns = int(72 * (wide - 0.3) / (0.6 * (POINTS + 1)))
    heading = [wrapped for line in lines for wrapped in textwrap.wrap(line, columns)]
    at = np.arange(len(drawn)) + (np.arange(len(drawn)) >= half) * (len(order) > MOST)
    tall = _BAR * (float(at[-1]) + 1 if len(at) else 1)
    foot, head = 0.4, 0.15 + 0.17 * len(heading)
    high = foot + tall + head
    figure = Figure(figsize=(wide, high), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((room / wide, foot / high, _WIDE / wide, tall / high))
    axes.barh(at, precisions[drawn], height=0.7, color="C0")
    axes.plot(100 * shown[drawn] / max(videos, 1), at, "|", color="black", markersize=6)
    if len(known):
        axes.axvline(float(precisions[known].mean()), color="0.3", linewidth=0.8, linestyle="--")
    for place, value, count in zip(at, precisions[drawn], shown[drawn].tolist(), strict=True):
        words = f"{value:.1f} % ({counted(count, 'video')})"
        axes.text(101, place, words, va="center", fontsize=POINTS)
    text: dict[str, Any] = {"fontsize": POINTS, "family": names.families, "parse_math": False}
    axes.set_yticks(at, names.texts, **text)
    axes.set(xlim=(0, 100), ylim=(float(at[-1]) + 0.5 if len(at) else 0.5, -0.5))
    axes.tick_params(length=2, pad=2, labelsize=POINTS)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("average precision, %", fontsize=POINTS + 1)
    text |= {"fontsize": POINTS + 1, "va": "top"}
    figure.text(0.15 / wide, 1 - 0.1 / high, "\n".join(heading), **text)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())
