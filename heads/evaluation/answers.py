"""The files of a result that are made for people: tables for a spreadsheet, and a picture.

They lie beside `NAME.json`. All tables are UTF-8 with a byte order mark, so that spreadsheets read
accents, and no cell is run as a formula (`featstore.files.tables`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from featstore.files.durable import write_bytes
from featstore.files.tables import csv_bytes
from heads.evaluation.details import SplitDetail, class_outcomes, merged
from heads.scoring import TOP_K

log = logging.getLogger(__name__)

ENDINGS: Final = {
    "videos": ".videos.csv",
    "per_class": ".per-class.csv",
    "confusion": ".confusion.csv",
    "confusion_picture": ".confusion.png",
    "per_class_picture": ".per-class.png",
}
_VIDEO_COLUMNS: Final = (
    *("key", "path", "split", "true_class", "correct", "rank"),
    *(f"{what}_{k}" for k in range(1, TOP_K + 1) for what in ("class", "score")),
    "reason",
)
_CLASS_COLUMNS: Final = (
    *("split", "label", "class_name", "n_evaluated", "n_failed", "top1", "top5"),
    *("most_confused_with", "n_confused"),
)


def answer_files(result: Path) -> dict[str, Path]:
    """Return the files for people that lie beside a result file, by what they hold (`ENDINGS`)."""
    base = result.name.removesuffix(".json")
    files = {what: result.with_name(base + ending) for what, ending in ENDINGS.items()}
    return {what: file for what, file in files.items() if file.is_file()}


def save_answers(
    result: Path,
    details: Sequence[SplitDetail],
    class_names: Sequence[str],
    *,
    title: str = "",
    paths: Mapping[str, str] | None = None,
) -> None:
    """Write the files for people beside the result file `result`.

    `paths` holds the path of a video by its key, as far as known; `title` is the picture's. If the
    details hold no `best` (a sweep), only the table per class is written, and the others, which
    would be those of an earlier measurement, are removed.
    """
    base = result.name.removesuffix(".json")
    files = {what: result.with_name(base + ending) for what, ending in ENDINGS.items()}
    rows = _class_rows(details, class_names)
    write_bytes(files.pop("per_class"), csv_bytes(_CLASS_COLUMNS, rows, bom=True))
    if any(part.best is None for part in details):
        for file in files.values():
            file.unlink(missing_ok=True)
        return
    paths = paths or {}
    listed = {key for part in details for key in (*part.keys, *(v.key for v in part.failed))}
    if paths and (lacking := len(listed - paths.keys())):
        log.info("the data set packed here lacks %d of %d videos: no path", lacking, len(listed))
    rows = _video_rows(details, class_names, paths)
    write_bytes(files["videos"], csv_bytes(_VIDEO_COLUMNS, rows, bom=True))
    whole = merged(details)
    counts = whole.confusion()
    names = [class_names[label] for label in whole.classes.tolist()]
    rows = ([name, *row] for name, row in zip(names, counts.tolist(), strict=True))
    columns = ["true class (rows), taken for (columns)", *names]
    write_bytes(files["confusion"], csv_bytes(columns, rows, bom=True))
    from heads.reporting.confusion import confusion_plot  # matplotlib takes a while to load

    confusion_plot(counts, names, whole.classes.tolist(), files["confusion_picture"], title)


def _class_rows(
    details: Sequence[SplitDetail], class_names: Sequence[str]
) -> Iterator[Sequence[object]]:
    """Yield a row per test set and candidate; without videos the accuracies are empty."""
    for part in details:
        for found in class_outcomes(part, class_names):
            shares = ["" if share is None else f"{share:.4f}" for share in (found.top1, found.top5)]
            counts = found.label, found.name, found.videos, found.failed
            yield part.split, *counts, *shares, found.taken_for or "", found.times


def _video_rows(
    details: Sequence[SplitDetail], class_names: Sequence[str], paths: Mapping[str, str]
) -> Iterator[Sequence[object]]:
    """Yield a row per test set and listed video: those with a score, then those that failed."""
    for part in details:
        assert part.best is not None, "the caller has looked"
        assert part.confidences is not None, "they are kept together"
        lacking = [""] * (2 * (TOP_K - part.best.shape[1]))
        for key, label, place, best, sure in zip(
            part.keys,
            part.labels.tolist(),
            part.places.tolist(),
            part.best.tolist(),
            part.confidences.tolist(),
            strict=True,
        ):
            said = (
                cell
                for named, share in zip(best, sure, strict=True)
                for cell in (class_names[named], f"{share:.4f}")
            )
            right = "yes" if place == 0 else "no"
            known = key, paths.get(key, ""), part.split, class_names[label], right, place + 1
            yield *known, *said, *lacking, ""
        for video in part.failed:
            path, true = paths.get(video.key, ""), class_names[video.label]
            yield video.key, path, part.split, true, *([""] * (2 + 2 * TOP_K)), video.reason
