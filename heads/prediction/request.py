"""The request for a prediction: what is predicted, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featstore.errors import UserError
from heads.prediction.answers import form_of
from heads.prediction.classes import NamedClasses
from heads.prediction.videos import NamedVideo


@dataclass(frozen=True)
class PredictionRequest:
    """What is predicted, and how: all that the options of `mote-cli predict` say.

    What is None comes from the head. `window` are the seconds that each prediction of a longer
    video looks at; None: one prediction of the whole video. `projection` says whether that of
    the head is used; None: if it was trained on all classes. `out` is a file that answers are added
    to, in the `form` "csv" or "jsonl", or as its name says. Raises UserError for another form or a
    window that is no length.
    """

    videos: Sequence[NamedVideo]
    classes: NamedClasses | None = None
    head: str | None = None
    encoder: str | None = None
    top: int = 5
    frames: int | None = None
    window: float | None = None
    prompts: str | None = None
    modulate: bool = True
    projection: bool | None = None
    precision: str = "auto"
    device: str = "auto"
    workers: int | None = None
    out: Path | None = None
    form: str | None = None

    def __post_init__(self) -> None:
        if self.window is not None and not 0 < self.window < math.inf:
            raise UserError(
                f"--window {self.window:g} is no length: name its seconds, or leave it out to look "
                "at the whole video at once"
            )
        if self.out is not None:
            form_of(self.out, self.form)
