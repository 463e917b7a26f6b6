"""Printing for all commands: results go to stdout, everything else goes to stderr."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from json import dumps
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from featstore.errors import safe_text
from featstore.progress import ProgressSink, no_progress

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.text import Text

PACKAGES = ("pipeline", "featstore", "heads", "cli")
# Without a terminal, one line every so often is enough to show that the work goes on.
PLAIN_INTERVAL_S = 10.0
WHOLE_NAME = 32
PLAIN_WIDTH = 200  # width of tables without a terminal

Shown = Mapping[str, Any] | Table | str


class SafeConsole(Console):
    """Prints text as it is: nothing in a name or a file can act on the terminal.

    Brackets are no markup and `:word:` no emoji. Control characters and marks of writing direction
    are shown as escapes, also the line feed: every string that is printed or put into a table is
    one line.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string into what is printed."""
        return super().render_str(safe_text(text), **options)


results = SafeConsole(soft_wrap=True)
messages = SafeConsole(stderr=True, soft_wrap=True)


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
    """Silence notices and progress: another process of this command shows them. Errors stay."""
    global _quiet
    _quiet = True
    logging.disable()


def fail(message: str) -> None:
    """Print an error as one line."""
    messages.print(f"error: {message}")


def warn(message: str) -> None:
    """Print one line about something that went wrong and does not end the command."""
    messages.print(f"warning: {message}")


def report(
    json: bool, value: Mapping[str, Any], shown: Mapping[str, Any] | Iterable[Shown]
) -> None:
    """Print the result of a command: with --json the object `value`, in ASCII for any locale.

    Without --json, print `shown`: a mapping as "name: value" lines, tables, and single lines.
    """
    if json:
        # The only control character that JSON does not escape is DEL.
        sys.stdout.write(dumps(value, allow_nan=False).replace("\x7f", "\\u007f") + "\n")
        return
    for part in (shown,) if isinstance(shown, Mapping) else shown:
        if isinstance(part, Mapping):
            facts = {safe_text(name): fact for name, fact in part.items()}
            width = max(map(len, facts), default=0)
            for name, fact in facts.items():
                results.print(f"{name:<{width}}  {fact}")
        elif isinstance(part, str) or results.is_terminal or "COLUMNS" in os.environ:
            results.print(part)
        else:  # a file or another program has no width at which to wrap lines
            SafeConsole(width=PLAIN_WIDTH).print(part)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Make a table for `report`; columns after the first are right-aligned.

    Names in the first column are not wrapped up to `WHOLE_NAME` letters.
    """
    cells = [[safe_text(str(cell)) for cell in row] for row in rows]
    made = Table(title=title or None, title_justify="left")
    widest = max((len(row[0]) for row in cells), default=0)
    # A column that keeps its width is left out of what rich takes from all to fit the terminal;
    # one with a least width is shrunk and grows again, and then the table is too wide.
    whole = widest <= WHOLE_NAME
    least = None if whole else WHOLE_NAME
    made.add_column(columns[0], overflow="fold", no_wrap=whole, min_width=least)
    for column in columns[1:]:
        made.add_column(column, justify="right", overflow="fold")
    for row in cells:
        made.add_row(*row)
    return made


@contextmanager
def progress_of(what: str, unit: str) -> Iterator[ProgressSink]:
    """Show progress of one stage on stderr: a bar on a terminal, elsewhere a line now and then."""
    bar = _bar(what, unit) if messages.is_terminal and not _quiet else None
    first: tuple[float, float] | None = None  # the rate counts from here: loading does not count
    last = time.monotonic()

    def sink(done: float, total: float, **details: float | int | str) -> None:
        nonlocal first, last
        now = time.monotonic()
        done_before, began = first = first or (done, now)
        rate = (done - done_before) / (now - began) if now > began else 0.0
        told = ", ".join(
            safe_text(f"{name.replace('_', ' ')} {value}") for name, value in details.items()
        )
        if bar is not None:
            task = bar.task_ids[0]
            bar.update(task, completed=int(done), total=int(total), rate=_speed(rate), details=told)
        elif now - last >= PLAIN_INTERVAL_S:
            last = now
            left = f"{_duration((total - done) / rate)} left" if rate > 0 else ""
            words = (f"{what}: {done:.0f}/{total:.0f} {unit}", _speed(rate), left, told)
            messages.print(", ".join(filter(None, words)))

    with bar or nullcontext():
        yield no_progress if _quiet else sink


def _bar(what: str, unit: str) -> Progress:
    from rich import progress as bars  # only a terminal needs it; --help should not wait for it

    columns = (
        bars.SpinnerColumn(),
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn(unit),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[details]}", markup=False),
    )
    # What is printed meanwhile goes above the bar, but never from a file to the terminal.
    above = results.is_terminal
    bar = bars.Progress(*columns, console=messages, transient=True, redirect_stdout=above)
    bar.add_task(what, total=None, details="", rate="")
    return bar


def _speed(rate: float) -> str:
    """Write a rate as "2.0/s", or as "3.0 s each" below 1/s; "" while there is no rate."""
    if rate <= 0:
        return ""
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def percent(value: float | None) -> str:
    """Write an accuracy for a table; "-" if there is none."""
    return "-" if value is None else f"{value:.1f}"
