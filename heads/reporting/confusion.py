"""Draws which classes were taken for which others."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from featstore.errors import safe_text
from featstore.files.durable import write_bytes
from heads.reporting.written_names import POINTS, WrittenNames

LABELLED: Final = 60  # with more classes their names would be too small to read
BLOCK: Final = 40  # how many classes are drawn then
_COUNTED: Final = 25  # up to so many classes, the cells show their counts


def confusion_plot(
    counts: npt.NDArray[np.int64],
    class_names: Sequence[str],
    labels: Sequence[int],
    path: Path,
    title: str = "",
) -> None:
    """Draw `counts` int64 [C,C] (true class, class it was taken for) as the PNG file `path`.

    The colour of a cell is its share of the row, so that classes of any size can be compared; a row
    without videos is grey. `title` is written above it, in letters of the usual font. With more
    than `LABELLED` classes the `BLOCK` that are most often confused with each other are drawn, and
    the picture says so. A name that no font of this machine can write is replaced by the class's
    number, of `labels`.
    """
    total = len(counts)
    videos = counts.sum(1, keepdims=True)
    shares = np.divide(counts, videos, out=np.full(counts.shape, np.nan), where=videos > 0)
    shown = np.arange(total) if total <= LABELLED else _most_confused(counts, BLOCK)
    names = WrittenNames([class_names[at] for at in shown], [labels[at] for at in shown])
    lines = [safe_text(title)] if title else []
    if len(shown) < total:
        lines.append(f"the {len(shown)} of {total} classes that are most often confused")
    if names.numbered:
        lines.append(names.words)
    part, said = shares[np.ix_(shown, shown)], counts[np.ix_(shown, shown)]
    n = len(shown)
    cell = float(np.clip(5.0 / n, 0.2, 0.8))
    side, room = n * cell, names.width + 0.4  # in inches, like all that follows
    wide = room + max(side, 2.0) + 1.0
    columns = int(72 * (wide - 0.3) / (0.6 * (POINTS + 1)))
    heading = [wrapped for line in lines for wrapped in textwrap.wrap(line, columns)]
    high = room + side + 0.15 + 0.17 * len(heading)
    figure = Figure(figsize=(wide, high), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((room / wide, room / high, side / wide, side / high))
    colours = colormaps["Blues"].with_extremes(bad="0.9")
    # The root of a share: one video of thirty can be seen, too.
    drawn = axes.imshow(100 * part, cmap=colours, norm=PowerNorm(0.5, 0, 100), aspect="auto")
    text: dict[str, Any] = {"fontsize": POINTS, "family": names.families, "parse_math": False}
    axes.set_xticks(range(n), names.texts, rotation=90, **text)
    axes.set_yticks(range(n), names.texts, **text)
    axes.tick_params(length=2, pad=2)
    axes.set_xlabel("taken for", fontsize=POINTS + 1)
    axes.set_ylabel("true class", fontsize=POINTS + 1)
    if n <= _COUNTED:
        for row, column in np.argwhere(said > 0).tolist():
            colour = "white" if part[row, column] > 0.3 else "black"
            number = axes.text(column, row, str(said[row, column]), ha="center", va="center")
            number.set(fontsize=POINTS, color=colour)
    tall = min(side, 2.5)
    scale = figure.add_axes(
        ((room + side + 0.15) / wide, (room + side - tall) / high, 0.12 / wide, tall / high)
    )
    figure.colorbar(drawn, cax=scale).set_label("% of the true class", fontsize=POINTS)
    scale.tick_params(labelsize=POINTS)
    if heading:
        text |= {"fontsize": POINTS + 1, "va": "top"}
        figure.text(0.15 / wide, 1 - 0.1 / high, "\n".join(heading), **text)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())


def _most_confused(counts: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """Return up to `most` classes, beginning with the pair that is most often confused."""
    both = np.triu(counts + counts.T, 1)
    pairs = np.argwhere(both > 0)
    order = np.argsort(-both[both > 0], kind="stable")
    chosen: dict[int, None] = {}
    for pair in pairs[order].tolist():
        new = [at for at in pair if at not in chosen]
        if len(chosen) + len(new) <= most:
            chosen.update(dict.fromkeys(new))
        if len(chosen) == most:
            break
    rest = (at for at in range(len(counts)) if at not in chosen)  # few confusions, or none
    return np.array([*chosen, *rest][:most], np.int64)
