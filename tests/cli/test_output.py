"""Progress on a terminal and without one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import cli.output


def console(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> io.StringIO:
    written = io.StringIO()
    monkeypatch.setattr(
        cli.output,
        "messages",
        Console(file=written, force_terminal=terminal, width=150, no_color=True),
    )
    return written


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(cli.output.time, "monotonic", lambda: now[0])
    return now


def test_a_terminal_shows_count_rate_and_details(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    written = console(monkeypatch, terminal=True)
    with cli.output.progress_of("extract", "videos") as progress:
        progress(0, 10)
        clock[0] += 2.0
        progress(5, 10, failed=1)
    assert "5/10" in written.getvalue()
    assert "2.5/s" in written.getvalue()
    assert "failed 1" in written.getvalue()


def test_without_a_terminal_a_line_now_and_then_with_time_left(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    written = console(monkeypatch, terminal=False)
    with cli.output.progress_of("train", "steps") as progress:
        clock[0] += 60.0  # loading: does not count
        for step in range(0, 101):
            progress(100 + step, 1000, loss=0.5)
            clock[0] += 0.5
    lines = written.getvalue().splitlines()
    assert 4 <= len(lines) <= 7
    assert lines[-1].startswith("train: ")
    assert "/1000 steps, 2.0/s, 6m" in lines[-1]
    assert lines[-1].endswith("left, loss 0.5")


def test_lines_in_a_file_fit_80_columns(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    """Count, speed and time left are always there; of the details those that there is room for."""
    written = console(monkeypatch, terminal=False)
    told = {"memory": "12345 MB of 16384 MB", "epoch": "7 of 30"}
    with cli.output.progress_of("finetune", "steps") as progress:
        for step in (1, 2):
            clock[0] += 20.0
            progress(step, 1000000, **told, loss=0.25, name="\x1b" * 30)
    first, second = written.getvalue().splitlines()
    assert (
        first == "finetune: 1/1000000 steps, memory 12345 MB of 16384 MB, epoch 7 of 30, loss 0.25"
    )
    assert second == (
        "finetune: 2/1000000 steps, 20.0 s each, 5555h32m left, epoch 7 of 30, loss 0.25"
    )
    assert max(len(first), len(second)) <= 80


def test_slow_steps_are_told_in_seconds(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    written = console(monkeypatch, terminal=False)
    with cli.output.progress_of("finetune", "steps") as progress:
        for step in range(1, 4):
            clock[0] += 20.0
            progress(step, 10, loss=0.5)
    first, second, third = written.getvalue().splitlines()
    assert first == "finetune: 1/10 steps, loss 0.5"  # no speed before there is one
    assert second == "finetune: 2/10 steps, 20.0 s each, 2m40s left, loss 0.5"
    assert third == "finetune: 3/10 steps, 20.0 s each, 2m20s left, loss 0.5"
