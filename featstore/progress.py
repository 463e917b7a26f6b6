"""How library code reports without printing: first progress, to a sink, then the outcome."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol


class ProgressSink(Protocol):
    """Receives progress of one stage; `cli` renders it as a bar or as plain log lines."""

    def __call__(self, done: float, total: float, **details: float | int | str) -> None:
        """`done` of `total` units are finished; `details` are shown beside the bar as given."""


def no_progress(done: float, total: float, **details: float | int | str) -> None:
    """Ignore progress: the default of every library function."""


class Stages(Protocol):
    """Gives every stage of a longer work a sink of its own."""

    def __call__(self, what: str, unit: str) -> AbstractContextManager[ProgressSink]:
        """The sink of stage `what`, which counts in `unit`; the stage ends with the context."""


def no_stages(what: str, unit: str) -> AbstractContextManager[ProgressSink]:
    """Ignore the progress of every stage."""
    return nullcontext(no_progress)


@dataclass(frozen=True)
class Outcome:
    """What a piece of work returns at its end: the base of dataclasses that hold JSON values."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dict."""
        return asdict(self)
