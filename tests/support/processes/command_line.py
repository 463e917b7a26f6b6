"""Runs `mote-cli` inside the test process and gives back what its user would see."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from cli.main import TRACEBACK_VARIABLE, main
from cli.output import PACKAGES


@dataclass(frozen=True)
class Result:
    """Exit code, stdout and stderr of one command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object that is all of stdout."""
        assert self.out.endswith("\n")
        assert self.out.count("\n") == 1, self.out
        value = json.loads(self.out, parse_constant=lambda name: 1 / 0)
        assert isinstance(value, dict)
        return value

    @property
    def error(self) -> str:
        """The one line of the error; there is one, and no traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


def mote(*arguments: str | Path, cwd: Path | None = None, width: int = 200) -> Result:
    """Run `mote-cli ARGUMENTS` through its own `main`, in a window of `width` columns."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["mote-cli", *map(str, arguments)]),
        # Wide, as a log is: rich wraps tables to the width of the terminal.
        # An unexpected error is a failure of the test and not one more line of the command.
        mock.patch.dict(os.environ, {"COLUMNS": str(width), TRACEBACK_VARIABLE: "1"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        _as_before(),
        contextlib.chdir(cwd or Path.cwd()),
    ):
        try:
            main()
            raise AssertionError("main() must exit")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Result(code, out.getvalue(), err.getvalue())


def done(*arguments: str | Path, code: int = 0) -> Any:
    """The JSON object of a command that ends with `code`."""
    result = mote(*arguments, "--json")
    assert result.code == code, result.err
    return result.json


def refused(code: int, *arguments: str | Path) -> str:
    """The error line of a command that ends with `code` and prints no result."""
    result = mote(*arguments)
    assert result.code == code, result.err
    assert result.out == ""
    return result.error


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Undo what a process of its own would take with it: log handlers and signal handlers."""
    loggers = [logging.getLogger(name) for name in PACKAGES]
    kept = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for logger, (old, level, propagate) in zip(loggers, kept, strict=True):
            logger.handlers, logger.level, logger.propagate = old, level, propagate
        for name, handler in handlers.items():
            signal.signal(name, handler)
