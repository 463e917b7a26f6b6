"""Pictures of results."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from featstore.errors import UserError
from featstore.files.durable import write_bytes
from heads.methods.registry import method, names

_FINETUNED = "-finetuned"  # behind the method's name, in the demo
_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")


def tradeoff_plot(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    closeset: str = "close-set",
    zeroshot: str = "zero-shot",
) -> None:
    """Close-set against zero-shot top-1, one point per head and setting, written as PNG or SVG.

    Each row holds `head`, `modulated`, `closeset_top1` and `zeroshot_top1` (percent); `closeset`
    and `zeroshot` say what those are of. Rows with the same head share a colour, hollow markers
    are modulated ones, and an arrow leads from a head to its modulated self. Grey lines join points
    of equal harmonic mean. Raises UserError when there is no row or the suffix is another.
    """
    kind = path.suffix.lstrip(".").lower()
    if kind not in ("png", "svg"):
        raise UserError(f"{path.name} is neither .png nor .svg: choose one of the two")
    if not rows:
        raise UserError("there is no result to plot: evaluate a head first")
    figure = Figure(figsize=(6.4, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    heads = list(dict.fromkeys(str(row["head"]) for row in rows))
    for head, colour in zip(heads, _cycle(len(heads)), strict=True):
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
                    label=_title(head) + (", modulated" if modulated else ""),
                )
        if len(points) == 2:
            arrow = {"arrowstyle": "->", "color": colour, "shrinkA": 7, "shrinkB": 7}
            axes.annotate("", points[True], points[False], arrowprops=arrow)
    _frame(axes, rows)
    axes.set_xlabel(f"{closeset} top-1 (%)")
    axes.set_ylabel(f"{zeroshot} top-1 (%)")
    axes.set_title("grey: equal harmonic mean", fontsize="small", color="0.5", loc="right")
    # Beside the points: inside, the grey lines leave no place where it would cover none of them.
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind)
    write_bytes(path, buffer.getvalue())


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _frame(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Limits around the points, and lines of equal harmonic mean behind them."""
    limits = []
    for name in ("closeset_top1", "zeroshot_top1"):
        values = [float(row[name]) for row in rows]
        margin = max(2.0, 0.15 * (max(values) - min(values)))
        limits.append((min(values) - margin, max(values) + margin))
    (left, right), (bottom, top) = limits
    for mean in range(5, 101, 5):
        # 2xy / (x + y) = mean  <=>  y = mean * x / (2x - mean)
        steps = [left + (right - left) * i / 200 for i in range(201)]
        line = [(x, mean * x / (2 * x - mean)) for x in steps if 2 * x - mean > 1e-6]
        inside = [(x, y) for x, y in line if bottom <= y <= top]
        if len(inside) > 1:
            axes.plot(*zip(*inside, strict=True), color="0.85", linewidth=0.8, zorder=0)
            axes.text(*inside[-1], f" {mean}", color="0.6", fontsize="x-small", clip_on=True)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def _title(head: str) -> str:
    """The name of a method in pictures; heads that are named otherwise keep their names."""
    name = head.removesuffix(_FINETUNED)
    if name not in names():
        return head
    return method(name).title + (", fine-tuned tower" if name != head else "")
