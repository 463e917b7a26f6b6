"""What is predicted of one video, and how it is written: as JSON and as rows of CSV.

A row of CSV is a video, or one window of a video. In a file that can be continued it also has the
size and time of the video's file and the settings of the prediction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, get_args

from featstore.errors import UserError
from featstore.files.tables import csv_line

Form = Literal["csv", "jsonl"]
"""How answers are written: a table, or one JSON object a line."""

KEPT_COLUMNS: Final = ("size", "modified", "settings")


@dataclass(frozen=True)
class Window:
    """The best classes, (name, score) with the best first, of `start` to `end` in seconds."""

    start: float
    end: float
    best: list[tuple[str, float]]


@dataclass(frozen=True)
class Answer:
    """The best classes of a video, (name, score) with the best first, or the `error` without them.

    `note` is a warning about the answer. `windows` are there if they were asked for; `best` is then
    the mean of their scores. `stamp` are size and time of the file, "" if it is not there.
    """

    path: str
    num_frames: int | None = None
    best: list[tuple[str, float]] = field(default_factory=list)
    error: str = ""
    note: str = ""
    windows: list[Window] | None = None
    stamp: tuple[str, str] = ("", "")

    def to_json(self) -> dict[str, Any]:
        """Return what `predict --json` says of the video."""
        value: dict[str, Any] = {
            "path": self.path,
            "num_frames": self.num_frames,
            "predictions": _predictions(self.best),
        }
        if self.windows is not None:
            value["windows"] = [
                {"start": part.start, "end": part.end, "predictions": _predictions(part.best)}
                for part in self.windows
            ]
        told = {"error": self.error, "note": self.note}
        return value | {name: text for name, text in told.items() if text}


@dataclass(frozen=True)
class Lines:
    """Writes answers with `top` classes as lines; `settings` go into each where they are given."""

    form: Form
    top: int
    windowed: bool = False
    settings: Mapping[str, str] | None = None

    @property
    def columns(self) -> list[str]:
        """The columns of the table."""
        ranked = [f"{what}_{rank}" for rank in range(1, self.top + 1) for what in _RANKED]
        parts = ("window", "start", "end") if self.windowed else ()
        kept = KEPT_COLUMNS if self.settings is not None else ()
        return ["path", *parts, "num_frames", *ranked, "error", "note", *kept]

    @property
    def header(self) -> str:
        """What comes before the lines."""
        return csv_line(self.columns) if self.form == "csv" else ""

    def of(self, answer: Answer) -> str:
        """Return the lines of an answer, each with its line end."""
        if self.form == "jsonl":
            value = answer.to_json()
            if self.settings is not None:
                value |= dict(zip(KEPT_COLUMNS, (*answer.stamp, self.settings), strict=True))
            return json.dumps(value, allow_nan=False) + "\n"
        kept: tuple[str, ...] = ()
        if self.settings is not None:
            kept = (*answer.stamp, "; ".join(f"{k}={v}" for k, v in self.settings.items()))
        ends = (answer.error, answer.note, *kept)
        frames = answer.num_frames
        if not self.windowed:
            return csv_line([answer.path, frames, *self._ranked(answer.best), *ends])
        if not answer.windows:
            return csv_line([answer.path, "", "", "", frames, *self._ranked([]), *ends])
        count = len(answer.windows)
        return "".join(
            csv_line(
                [
                    *(answer.path, f"{number} of {count}", f"{part.start:.3f}", f"{part.end:.3f}"),
                    *(frames, *self._ranked(part.best), *ends),
                ]
            )
            for number, part in enumerate(answer.windows, start=1)
        )

    def _ranked(self, best: Sequence[tuple[str, float]]) -> list[str]:
        cells = [cell for name, score in best for cell in (name, f"{score:.6f}")]
        return cells + [""] * (2 * self.top - len(cells))


_RANKED: Final = ("class", "score")


def form_of(file: Path, form: str | None) -> Form:
    """Return how answers are written into `file`: as `form` says, else as the file's name does."""
    chosen = form or {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}.get(file.suffix.lower())
    if chosen not in get_args(Form):
        raise UserError(
            f"--out {file}: a file is written as csv or jsonl: name it FILE.csv or FILE.jsonl, or "
            "add --format csv"
        )
    return "csv" if chosen == "csv" else "jsonl"


def stamp_of(file: Path) -> tuple[str, str]:
    """Return size and modification time of a file as texts, ("", "") if it is not there."""
    try:
        found = file.stat()
    except OSError:
        return "", ""
    seconds, rest = divmod(found.st_mtime_ns, 10**9)
    return str(
        found.st_size
    ), f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09d}"


def _predictions(best: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"class_name": name, "score": score} for name, score in best]
