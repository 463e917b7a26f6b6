"""The pages of `--help`: they fit 80 columns, and no option is lost between help and docs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from cli.help_page import ELSEWHERE, PANELS, USUAL
from cli.main import COMMANDS, load_command
from tests.support.processes.command_line import mote

DOCS = Path(__file__).parents[2]


def pages() -> Iterator[tuple[str, ...]]:
    """Every command that has a help page, as the words that are typed."""
    yield ()
    for name in COMMANDS:
        yield (name,)
        yield from ((name, inner) for inner in getattr(load_command(name), "commands", {}))


def command_of(words: tuple[str, ...]) -> Any:
    """The command that `words` name."""
    command = load_command(words[0])
    return command.commands[words[1]] if len(words) == 2 else command


@pytest.mark.parametrize("words", list(pages()), ids=" ".join)
def test_help_fits_80_columns_with_its_example_whole(words: tuple[str, ...]) -> None:
    lines = mote(*words, "--help", width=80).out.splitlines()
    assert max(map(len, lines)) <= 80
    assert f"Usage: mote-cli {' '.join(words)}".strip() in lines[1]
    assert "[]" not in lines[1]
    braced = lines[1].partition("{")[2].partition("}")[0]
    assert not braced or "|" in braced  # only choices are in braces
    if words:
        (example,) = (p for p in command_of(words).help.split("\n\n") if "Example: " in p)
        assert example.replace("`", "").strip() in lines


@pytest.mark.parametrize("words", [words for words in pages() if words], ids=" ".join)
def test_every_option_is_in_the_help_or_on_its_page(words: tuple[str, ...]) -> None:
    shown = mote(*words, "--help", width=120).out
    page, rare = ELSEWHERE.get(words[-1], ("", ()))
    known = {name for parameter in command_of(words).params for name in parameter.opts}
    assert set(rare) <= known
    text = (DOCS / page).read_text() if page else ""
    for option in known - {"--help"}:
        if option.startswith("--"):
            assert option in shown
            assert option not in rare or f"`{option}" in text, option


def test_help_of_eval_is_short() -> None:
    shown = mote("eval", "--help", width=80).out
    assert len(shown.splitlines()) < 90
    assert "Rarer options, described in docs/eval-options.md" in shown


def test_commands_are_grouped_by_the_folders_of_their_stages() -> None:
    lines = mote("--help", width=80).out.splitlines()
    held: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("╭"):
            title = line.split("─ ")[1].split(" ─")[0]
            held[title] = []
        elif line.startswith("│ ") and line[2] != " ":
            held[title].append(line.split()[1])
    assert list(held) == ["Options", "First steps", "Heads", "Answers", "Workspace"]
    assert held.pop("Options")
    assert Counter(name for names in held.values() for name in names) == Counter(list(COMMANDS))
    for stage, names in held.items():
        folder = f"cli.commands.{stage.lower().replace(' ', '_')}."
        assert all(COMMANDS[name][0].startswith(folder) for name in names)


def test_options_are_grouped_in_panels() -> None:
    shown = mote("extract", "--help", width=80).out
    titles = [line.split("─ ")[1].split(" ─")[0] for line in shown.splitlines() if "╭" in line]
    assert titles == [t for t in PANELS if t in titles]
    assert {"What to work on", "Ray cluster", "Workspace and output"} <= set(titles)


def test_panels_name_options_that_exist_and_each_once() -> None:
    named = [option for options in PANELS.values() for option in options]
    known = {o for words in pages() if words for p in command_of(words).params for o in p.opts}
    assert set(named) <= {*known, "--help"}
    assert len(set(named)) == len(named)
    assert next(iter(PANELS)) == USUAL  # where the others are


def completed(typed: str) -> list[str]:
    """What bash is told when Tab is pressed after `typed`."""
    asked = {"_MOTE_CLI_COMPLETE": "complete_bash", "COMP_WORDS": typed}
    with mock.patch.dict(os.environ, {**asked, "COMP_CWORD": str(len(typed.split()) - 1)}):
        return mote().out.split()


def test_the_shell_completes_commands_and_options() -> None:
    assert completed("mote-cli ex") == ["extract", "export"]
    assert completed("mote-cli store con") == ["convert"]
    assert completed("mote-cli eval --closes") == ["--closeset"]
    assert completed("mote-cli eval --modulation-n") == ["--modulation-neighbours"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_a_shell_can_be_shown(shell: str) -> None:
    asked = {"_MOTE_CLI_COMPLETE": f"source_{shell}"}
    with mock.patch.dict(os.environ, asked):
        assert "_MOTE_CLI_COMPLETE=complete_" in mote().out
