"""Where words go: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from featstore.progress import ProgressSink, no_progress

PACKAGES = ("pipeline", "featstore", "heads", "cli")
# Without a terminal a line every so often is enough to see that work goes on.
PLAIN_INTERVAL_S = 10.0
WHOLE_NAME = 32
PLAIN_WIDTH = 200  # of tables without a terminal

# File names and class names may hold brackets: nothing that is printed is markup.
results = Console(highlight=False, soft_wrap=True, markup=False)
messages = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


class _StderrHandler(logging.Handler):
    """Prints notices above a running progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        messages.print(prefix + record.getMessage())


def log_to_stderr() -> None:
    """Send the packages' notices to stderr, one plain line each."""
    handler = _StderrHandler()
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        logger.propagate = False


_quiet = False


def leave_it_to_the_first() -> None:
    """No notices and no progress: another process of the same command shows them. Errors stay."""
    global _quiet
    _quiet = True
    logging.disable()


def fail(message: str) -> None:
    """Print the one line of an error."""
    messages.print(f"error: {message}")


def warn(message: str) -> None:
    """Print one line about something that went wrong and does not end the command."""
    messages.print(f"warning: {message}")


def print_json(value: Any) -> None:
    """Print the command's one JSON object on stdout, in ASCII: it must not need a locale."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table on stdout; columns after the first are right-aligned.

    Names in the first column stay whole up to `WHOLE_NAME` letters.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    table = Table(title=title or None, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(
            column,
            justify="right" if number else "left",
            overflow="fold",
            min_width=min(WHOLE_NAME, max((len(row[0]) for row in cells), default=0))
            if not number
            else None,
        )
    for row in cells:
        table.add_row(*row)
    if results.is_terminal or "COLUMNS" in os.environ:
        results.print(table)
    else:  # a file or another program has no width to fold the words for
        Console(highlight=False, width=PLAIN_WIDTH, markup=False).print(table)


def print_answer(json: bool, value: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Print what a command found: with --json the object `value`, otherwise the lines `facts`."""
    if json:
        print_json(value)
    else:
        print_facts(facts)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print "name: value" lines on stdout."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        results.print(f"{name:<{width}}  {value}")


@contextmanager
def progress_of(what: str, unit: str) -> Iterator[ProgressSink]:
    """Show progress of one stage on stderr: a bar on a terminal, plain lines elsewhere."""
    if _quiet:
        yield no_progress
    elif messages.is_terminal:
        with _bar(what, unit) as sink:
            yield sink
    else:
        yield _PlainLines(what, unit)


@contextmanager
def _bar(what: str, unit: str) -> Iterator[ProgressSink]:
    from rich import progress as bars  # only a terminal needs it; --help should not wait for it

    columns = (
        bars.SpinnerColumn(),
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn(unit),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[details]}"),
    )
    with bars.Progress(*columns, console=messages, transient=True) as progress:
        task = progress.add_task(what, total=None, details="", rate="")
        rate = _Rate()

        def sink(done: float, total: float, **details: float | int | str) -> None:
            per_second = rate.now(done)
            progress.update(
                task,
                completed=int(done),
                total=int(total),
                rate=_speed(per_second),
                details=_describe(details),
            )

        yield sink


class _Rate:
    """Units per second since the first report, so that loading a model does not count."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None

    def now(self, done: float) -> float:
        """The rate up to this report; 0 at the first."""
        moment = time.monotonic()
        if self._first is None:
            self._first = (done, moment)
        done_before, began = self._first
        return (done - done_before) / (moment - began) if moment > began else 0.0


class _PlainLines:
    """A line at most every ten seconds: done, rate, time left, details."""

    def __init__(self, what: str, unit: str) -> None:
        self.what = what
        self.unit = unit
        self.rate = _Rate()
        self.last = time.monotonic()

    def __call__(self, done: float, total: float, **details: float | int | str) -> None:
        rate = self.rate.now(done)
        now = time.monotonic()
        if now - self.last < PLAIN_INTERVAL_S:
            return
        self.last = now
        words = [
            f"{self.what}: {done:.0f}/{total:.0f} {self.unit}",
            _speed(rate),
            f"{_duration((total - done) / rate)} left" if rate > 0 else "",
            _describe(details),
        ]
        messages.print(", ".join(filter(None, words)))


def _speed(rate: float) -> str:
    """Units per second in words; "" before there is a rate, seconds of each for slow ones."""
    if rate <= 0:
        return ""
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


def _describe(details: dict[str, float | int | str]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in details.items())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def percent(value: float | None) -> str:
    """An accuracy for a table; "-" where there is none."""
    return "-" if value is None else f"{value:.1f}"
