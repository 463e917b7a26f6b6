"""Printing for all commands: results go to stdout, everything else goes to stderr."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from json import dumps
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table

from featstore.errors import safe_text
from featstore.progress import ProgressSink, no_progress

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.text import Text

PACKAGES = ("pipeline", "featstore", "heads", "cli")
# Without a terminal, one line every so often is enough to show that the work goes on.
PLAIN_INTERVAL_S = 10.0
PLAIN_LINE = 80  # the most columns of such a line
WHOLE_NAME = 32
WHOLE_WORD = 12  # a table that would have to break shorter words than this is written as a list
PROSE = 24  # longer cells of a table are read as text
WHOLE_FACT = 20  # names of facts up to this length are aligned
PLAIN_WIDTH = 200  # width of tables without a terminal

# What is never broken, so that it can be copied: a command, a word (a path).
_UNBROKEN = re.compile(r"`[^`]*`\S*|mote-cli [^`]*$|\S+")

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
    # A file or another program has no width at which to wrap lines.
    width = results.width if results.is_terminal or "COLUMNS" in os.environ else None
    for part in (shown,) if isinstance(shown, Mapping) else shown:
        if isinstance(part, Mapping):
            facts = {safe_text(name): str(fact) for name, fact in part.items()}
            widest = max((len(name) for name in facts if len(name) <= WHOLE_FACT), default=0)
            for name, fact in facts.items():
                _print_folded(f"{name:<{widest}}  ", fact, width, widest + 2)
        elif isinstance(part, str):
            text = part.lstrip(" ")
            margin = len(part) - len(text)
            _print_folded(" " * margin, text, width, margin + 2)
        else:
            if part.title:  # a table would break it at its own width
                _print_folded("", str(part.title), width, 2)
                part.title = None
            if width is None:
                SafeConsole(file=results.file, width=PLAIN_WIDTH).print(part)
            elif _fits(part, width):
                results.print(part)
            else:
                _print_as_list(part, width)


def _print_folded(start: str, text: str, width: int | None, margin: int) -> None:
    """Print `start` and `text`, which go on below each other, `margin` columns in, at `width`.

    Commands and words stay whole, on a line of their own if they are wider than what is left. A
    text that is only one of them stays beside its name.
    """
    text = safe_text(text)
    words = _UNBROKEN.findall(text)
    if width is None or len(words) == 1 or cell_len(start + text) <= width:
        results.print(start + text)
        return
    line = start
    for word in words:
        glue = "" if not line or line.endswith(" ") else " "
        if cell_len(line + glue + word) <= width:
            line += glue + word
            continue
        if line.strip():
            results.print(line.rstrip())
        line = (" " * margin if margin + cell_len(word) <= width else "") + word
    results.print(line)


def _fits(made: Table, width: int) -> bool:
    """Return whether a table has room for its first column's names and all but long words."""
    needed = 1 + 3 * len(made.columns)
    for number, column in enumerate(made.columns):
        texts = [str(column.header), *map(str, column.cells)]
        widest = max(map(cell_len, texts))
        words = max(cell_len(word) for text in texts for word in (text.split() or [""]))
        needed += min(widest, WHOLE_NAME) if number == 0 else min(words, WHOLE_WORD)
    return needed <= width


def _print_as_list(made: Table, width: int) -> None:
    """Print each row of a table that is too wide as a line with its columns below it."""
    for first, *cells in zip(*(map(str, column.cells) for column in made.columns), strict=True):
        _print_folded("", first, width, 2)
        for column, cell in zip(made.columns[1:], cells, strict=True):
            _print_folded(f"  {column.header or 'note'}: ", cell or "-", width, 4)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Make a table for `report`; columns after the first are right-aligned, unless they hold prose.

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
    for number, column in enumerate(columns[1:], start=1):
        prose = any(len(row[number]) > PROSE for row in cells)
        made.add_column(column, justify="left" if prose else "right", overflow="fold")
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
        left = f"{_duration((total - done) / rate)} left" if rate > 0 else ""
        told = [safe_text(f"{name.replace('_', ' ')} {value}") for name, value in details.items()]
        if bar is not None:
            task = bar.task_ids[0]
            bar.update(
                task,
                completed=int(done),
                total=int(total),
                rate=_speed(rate),
                left=left,
                details=", ".join(told),
            )
        elif now - last >= PLAIN_INTERVAL_S:
            last = now
            words = (f"{what}: {done:.0f}/{total:.0f} {unit}", _speed(rate), left)
            line = ", ".join(filter(None, words))
            for detail in told:  # as in a narrow window, details give way
                if cell_len(line) + len(", ") + cell_len(detail) <= PLAIN_LINE:
                    line += f", {detail}"
            messages.print(line)

    with bar or nullcontext():
        yield no_progress if _quiet else sink


def _bar(what: str, unit: str) -> Progress:
    from rich import progress as bars  # only a terminal needs it; --help should not wait for it

    # In a narrow window the bar and the details give way, never the count and the time left.
    class Details(bars.TextColumn):
        def render(self, task: bars.Task) -> Text:
            text = super().render(task)
            text.no_wrap, text.overflow = True, "ellipsis"
            return text

    columns = (
        bars.SpinnerColumn(table_column=Column(no_wrap=True)),
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(table_column=Column(no_wrap=True)),
        bars.TextColumn(unit),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TextColumn("{task.fields[left]}"),
        Details("{task.fields[details]}", markup=False, table_column=Column()),
    )
    # What is printed meanwhile goes above the bar, but never from a file to the terminal.
    above = results.is_terminal
    bar = bars.Progress(*columns, console=messages, transient=True, redirect_stdout=above)
    bar.add_task(what, total=None, details="", rate="", left="")
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
