"""Draws pictures of results."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from featstore.errors import UserError, safe_text
from featstore.files.durable import write_bytes
from heads.methods.registry import method, names

_FINETUNED = "-finetuned"  # the demo ends the name of a fine-tuned method with this


def tradeoff_plot(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    closeset: str = "close-set",
    zeroshot: str = "zero-shot",
) -> None:
    """Plot close-set against zero-shot top-1 as PNG or SVG, one point per head and setting.

    Each row holds `head`, `modulated`, `closeset_top1` and `zeroshot_top1` (percent); `closeset`
    and `zeroshot` name the data sets. Rows of the same head share a colour. A hollow marker is a
    modulated head, and an arrow leads to it from the same head without modulation. Grey lines join
    points of equal harmonic mean. Raises UserError if there is no row or the suffix is another.
    """
    kind = path.suffix.lstrip(".").lower()
    if kind not in ("png", "svg"):
        raise UserError(f"{path.name} is neither .png nor .svg: choose one of the two")
    if not rows:
        raise UserError("there is no result to plot: evaluate a head first")
    figure = Figure(figsize=(6.4, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, head in enumerate(dict.fromkeys(str(row["head"]) for row in rows)):
        colour = f"C{number}"  # colours from matplotlib's cycle, which starts again at its end
        points: dict[bool, tuple[float, float]] = {}
        for row in rows:
            if row["head"] == head:
                modulated = bool(row["modulated"])
                point = (float(row["closeset_top1"]), float(row["zeroshot_top1"]))
                points[modulated] = point
                axes.plot(
                    *point,
                    marker="D" if modulated else "o",
                    markersize=9,
                    color=colour,
                    markerfacecolor="white" if modulated else colour,
                    markeredgewidth=2,
                    linestyle="none",
                    label=_plain(_title(head)) + (", modulated" if modulated else ""),
                )
        if len(points) == 2:
            arrow = {"arrowstyle": "->", "color": colour, "shrinkA": 7, "shrinkB": 7}
            axes.annotate("", points[True], points[False], arrowprops=arrow)
    limits = []
    for name in ("closeset_top1", "zeroshot_top1"):
        values = [float(row[name]) for row in rows]
        margin = max(2.0, 0.15 * (max(values) - min(values)))
        limits.append((min(values) - margin, max(values) + margin))
    axes.set(xlim=limits[0], ylim=limits[1])
    x, y = (np.linspace(low, high, 200) for low, high in limits)
    positive_x, positive_y = np.maximum(x, 1e-6), np.maximum(y, 1e-6)[:, None]
    mean = 2 * positive_x * positive_y / (positive_x + positive_y)
    levels = [level for level in range(5, 101, 5) if mean.min() < level < mean.max()]
    if levels:
        lines = axes.contour(x, y, mean, levels, colors="0.85", linewidths=0.8, zorder=0)
        axes.clabel(lines, colors="0.6", fontsize="x-small", zorder=0)
    axes.set_xlabel(f"{_plain(closeset)} top-1 (%)")
    axes.set_ylabel(f"{_plain(zeroshot)} top-1 (%)")
    axes.set_title("grey: equal harmonic mean", fontsize="small", color="0.5", loc="right")
    # Below the axes, because inside them it could cover points.
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind)
    write_bytes(path, buffer.getvalue())


def _plain(text: str) -> str:
    """Return a name as a picture shows it letter by letter: "$" would begin a formula."""
    return safe_text(text).replace("$", r"\$")


def _title(head: str) -> str:
    """Return the title of a head that is named after a method; other names stay as they are."""
    name = head.removesuffix(_FINETUNED)
    if name not in names():
        return head
    return method(name).title + (", fine-tuned tower" if name != head else "")
