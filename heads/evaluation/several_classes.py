"""What became of tested videos that may show several classes, and the files that say so.

n = evaluated videos of a test set, C = its candidates, K = the best classes that are kept.

Beside the result file lie `.videos.csv` (a row a video), `.per-class.csv` (a row a class, with its
average precision), `.per-class.png` (the same as a picture) and `.scores.npz` (every score). There
is no table or picture of confusions: where a video shows several classes, no class is taken for
another.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from featstore.files.durable import write_bytes
from featstore.files.tables import csv_bytes
from featstore.format.schema import Shown
from heads.evaluation.answers import ENDINGS
from heads.evaluation.details import NAMED_CLASSES, Confidences, NotEvaluated
from heads.evaluation.protocols.protocol import LabelIds
from heads.scoring import TOP_K
from heads.scoring.average_precision import average_precisions

MEASURE: Final = "mAP"
"""What results on such videos measure, in their field `measure`."""
SCORES_ENDING: Final = ".scores.npz"
_BETWEEN: Final = "; "
_CLASS_COLUMNS: Final = ("split", "label", "class_name", "n_evaluated", "n_failed", "ap")
_VIDEO_COLUMNS: Final = (
    *("key", "path", "split", "true_classes", "ranks"),
    *(f"{what}_{k}" for k in range(1, TOP_K + 1) for what in ("class", "score")),
    "reason",
)


@dataclass(frozen=True, eq=False)
class LabelsDetail:
    """Every score of one test set: its n evaluated samples, in the store's order."""

    split: str
    classes: LabelIds
    """[C] label ids of the candidates."""
    keys: tuple[str, ...]
    """[n] the keys of the videos."""
    scores: npt.NDArray[np.float64]
    """[n,C] the scores that the average precisions are computed from."""
    shown: Shown
    """[n,C] which of the candidates each video shows."""
    best: LabelIds | None
    """[n,K] the label ids of the K best candidates, best first; None if they were not kept."""
    confidences: Confidences | None
    """[n,K] how sure the model is of each of `best`."""
    failed: tuple[NotEvaluated, ...]
    failed_shown: Shown
    """[failed,C] which of the candidates the failed videos show."""


@dataclass(frozen=True)
class ClassPrecision:
    """The outcome for one candidate class; `ap` in percent, None if no video shows it."""

    label: int
    name: str
    videos: int
    """Evaluated videos that show this class."""
    failed: int
    ap: float | None


def class_precisions(detail: LabelsDetail, class_names: Sequence[str]) -> list[ClassPrecision]:
    """Return the outcome of every candidate, in their order; `class_names` are by label id."""
    found = 100 * average_precisions(detail.scores, detail.shown)
    counts, lost = detail.shown.sum(0).tolist(), detail.failed_shown.sum(0).tolist()
    return [
        ClassPrecision(label, class_names[label], videos, failed, ap if videos else None)
        for label, videos, failed, ap in zip(
            detail.classes.tolist(), counts, lost, found.tolist(), strict=True
        )
    ]


@dataclass(frozen=True)
class PrecisionSummary:
    """The best and worst classes of an evaluation; with few classes the first list holds all.

    Classes that no evaluated video shows are left out.
    """

    classes_tested: int
    best_classes: tuple[ClassPrecision, ...]
    worst_classes: tuple[ClassPrecision, ...]

    @classmethod
    def of(cls, detail: LabelsDetail, class_names: Sequence[str]) -> PrecisionSummary:
        """Summarise one test set."""
        tested = [found for found in class_precisions(detail, class_names) if found.videos]
        best = sorted(tested, key=lambda found: -(found.ap or 0.0))
        few = len(tested) <= 2 * NAMED_CLASSES
        return cls(
            len(tested),
            tuple(best if few else best[:NAMED_CLASSES]),
            tuple(() if few else best[: -NAMED_CLASSES - 1 : -1]),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the classes as strict JSON values."""
        return asdict(self)


def save_details(
    base: Path,
    details: Sequence[LabelsDetail],
    class_names: Sequence[str],
    paths: Mapping[str, str],
    title: str = "",
) -> None:
    """Write the files beside the result file `base` + ".json"; `paths` are of videos, by key.

    The picture, under `title`, is of the first test set. If the details hold no `best` (a sweep),
    it is not drawn and no table of videos is written; those of an earlier measurement are removed.
    """
    columns, rows = _CLASS_COLUMNS, _class_rows(details, class_names)
    files = {what: base.with_name(base.name + ending) for what, ending in ENDINGS.items()}
    write_bytes(files["per_class"], csv_bytes(columns, rows, bom=True))
    videos, picture = files["videos"], files["per_class_picture"]
    swept = any(part.best is None for part in details)
    if swept:
        videos.unlink(missing_ok=True)
        picture.unlink(missing_ok=True)
    else:
        listed = _video_rows(details, class_names, paths)
        write_bytes(videos, csv_bytes(_VIDEO_COLUMNS, listed, bom=True))
    arrays: dict[str, npt.NDArray[Any]] = {"class_names": np.array(class_names)}
    for part in details:
        arrays |= {part.split: part.scores, f"{part.split}_shown": part.shown}
        arrays |= {f"{part.split}_labels": part.classes, f"{part.split}_keys": np.array(part.keys)}
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)  # type: ignore[arg-type]  # split names are the keys
    write_bytes(base.with_name(f"{base.name}{SCORES_ENDING}"), data.getvalue())
    if swept:
        return
    from heads.reporting.precisions import precision_plot  # matplotlib takes a while to load

    first = details[0]
    names = [class_names[label] for label in first.classes.tolist()]
    found, counts = 100 * average_precisions(first.scores, first.shown), first.shown.sum(0)
    labels = first.classes.tolist()
    precision_plot(found, counts, len(first.keys), names, labels, picture, title)


def _class_rows(
    details: Sequence[LabelsDetail], class_names: Sequence[str]
) -> Iterator[Sequence[object]]:
    for part in details:
        for found in class_precisions(part, class_names):
            ap = "" if found.ap is None else f"{found.ap:.4f}"
            yield part.split, found.label, found.name, found.videos, found.failed, ap


def _video_rows(
    details: Sequence[LabelsDetail], class_names: Sequence[str], paths: Mapping[str, str]
) -> Iterator[Sequence[object]]:
    """Yield a row per test set and listed video: those with a score, then those that failed."""
    for part in details:
        assert part.best is not None, "the caller has looked"
        assert part.confidences is not None, "they are kept together"
        names = [class_names[label] for label in part.classes.tolist()]
        places = (-part.scores).argsort(1, kind="stable").argsort(1) + 1
        lacking = [""] * (2 * (TOP_K - part.best.shape[1]))
        for at, key in enumerate(part.keys):
            true = np.flatnonzero(part.shown[at]).tolist()
            said = (
                cell
                for named, share in zip(part.best[at].tolist(), part.confidences[at], strict=True)
                for cell in (class_names[named], f"{share:.4f}")
            )
            yield (
                *(key, paths.get(key, ""), part.split, _BETWEEN.join(names[c] for c in true)),
                _BETWEEN.join(str(places[at, c]) for c in true),
                *(*said, *lacking, ""),
            )
        for video, shown in zip(part.failed, part.failed_shown, strict=True):
            true_names = _BETWEEN.join(names[c] for c in np.flatnonzero(shown).tolist())
            path = paths.get(video.key, "")
            yield video.key, path, part.split, true_names, *([""] * (1 + 2 * TOP_K)), video.reason
