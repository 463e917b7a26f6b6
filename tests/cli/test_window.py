"""What is printed fits the window: facts, tables, progress, and a small workflow."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len

import cli.output
from cli.output import SafeConsole, progress_of, report, table
from tests.support.processes.command_line import mote
from tests.support.worlds.tiny_world import World

COMMAND = "mote-cli extract --dataset my-clips --encoder ViT-L-14/openai --sampling clips:8x3"
PATH = "/a/long/path/that/somebody/will/want/to/copy/ViT-B-16-openai--uniform-16.zarr/zarr.json"


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What `report` prints, at the width of COLUMNS."""
    written = io.StringIO()
    monkeypatch.setattr(cli.output, "results", SafeConsole(file=written, soft_wrap=True))
    return written


def shown(printed: io.StringIO, monkeypatch: pytest.MonkeyPatch, width: int, part: object) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    report(False, {}, [part])  # type: ignore[list-item]
    return printed.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_facts_fold_below_themselves(
    printed: io.StringIO, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    words = " ".join(f"word{number}" for number in range(60))
    lines = shown(printed, monkeypatch, width, {"note": words, "a": 1}).splitlines()
    assert max(map(len, lines)) <= width
    assert all(line.startswith("      word") for line in lines[1:-1])
    assert " ".join(" ".join(lines[:-1]).split()) == f"note {words}"
    assert lines[-1] == "a     1"


def test_commands_and_paths_stay_whole_on_a_line_of_their_own(
    printed: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"next": COMMAND, "store": PATH, "why": f"nothing is here: run `{COMMAND}`, then eval"}
    lines = shown(printed, monkeypatch, 60, facts).splitlines()
    assert f"next   {COMMAND}" in lines
    assert f"store  {PATH}" in lines
    assert f"`{COMMAND}`," in lines


def test_wide_letters_count_as_two_columns(
    printed: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(printed, monkeypatch, 60, "説明 " * 30)
    assert max(map(cell_len, text.splitlines())) <= 60


def test_a_table_without_room_is_a_list_with_every_cell(
    printed: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = ["setting", *(f"column{number}" for number in range(9))]
    rows = [["first", *(f"value-{n}" for n in range(9))], ["second", *[""] * 9]]
    text = shown(printed, monkeypatch, 60, table("A title", columns, rows))
    assert text.splitlines()[:3] == ["A title", "first", "  column0: value-0"]
    assert text.splitlines()[11:13] == ["second", "  column0: -"]
    assert all(f"  column{n}: value-{n}\n" in text for n in range(9))
    assert "│" in shown(printed, monkeypatch, 200, table("A title", columns, rows))


def test_without_a_window_nothing_is_folded(
    printed: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    words = " ".join(["word"] * 100)
    report(False, {}, [words, {"note": words}, table("", ["name", "b"], [["x" * 90, "y" * 60]])])
    lines = printed.getvalue().splitlines()
    assert lines[:2] == [words, f"note  {words}"]
    assert "x" * 90 in printed.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_progress_keeps_count_and_time_left(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    written = io.StringIO()
    screen = SafeConsole(file=written, force_terminal=True, width=width, no_color=True)
    monkeypatch.setattr(cli.output, "messages", screen)
    now = [100.0]
    monkeypatch.setattr(cli.output.time, "monotonic", lambda: now[0])
    with progress_of("extract", "videos") as progress:
        progress(0, 240618)
        now[0] += 100.0
        progress(12345, 240618, failed=12, loss=0.1234, best_epoch=3, worker="machine-17 " * 9)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", plain) if "12345" in line]
    assert lines
    assert all("12345/240618 videos" in line and "30m49s left" in line for line in lines)
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("width", [80, 120])
def test_a_workflow_fits_the_window(own: World, width: int) -> None:
    place = ("--root", own.root)
    head = "clips-mote"
    commands = (
        ("eval", "--closeset", "clips", "--head", head, *place),
        ("eval", "--closeset", "clips", "--head", "mean", *place),
        ("compare", head, "mean", *place),
        ("compare", head, "--published", *place),
        ("tradeoff", "--closeset", "clips", "--zeroshot", "clips", "--allow-mixed", *place),
        ("inspect", own.store, *place),
        ("inspect", own.root / "heads" / head, *place),
        ("inspect", own.root / "datasets" / "clips", *place),
        ("status", *place),
        ("doctor", *place),
        ("protocols", "list"),
        ("protocols", "show", "hmdb51-zeroshot-3splits"),
        ("pack", "--dataset", "clips", "--videos", own.videos, "--samples-per-shard", "4", *place),
        ("extract", "--dataset", "clips", "--encoder", own.encoder, "--dry-run", *place),
        ("verify", own.store, *place),
    )
    for arguments in commands:
        result = mote(*arguments, width=width)
        assert result.out or arguments[0] == "tradeoff", result.err
        for line in result.out.splitlines():
            whole = len(line.split()) <= 2 or "mote-cli " in line
            assert whole or cell_len(line) <= width, (arguments, line)
