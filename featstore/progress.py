"""How library code reports progress without printing: it calls a sink the caller hands in."""

from __future__ import annotations

from typing import Protocol


class ProgressSink(Protocol):
    """Receives progress of one stage; `cli` renders it as a bar or as plain log lines."""

    def __call__(self, done: float, total: float, **details: float | int | str) -> None:
        """`done` of `total` units are finished; `details` are shown beside the bar as given."""


def no_progress(done: float, total: float, **details: float | int | str) -> None:
    """Ignore progress: the default of every library function."""
