"""Every command has help with an example, and the index of the documents names it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import COMMANDS, app, load_command
from featstore.format.schema import CODECS

INDEX = (Path(__file__).parents[2] / "docs" / "README.md").read_text()


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_shows_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"Example: mote-cli {command}" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_the_index_names_the_command(command: str) -> None:
    assert f"mote-cli {command}" in INDEX


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str) -> None:
    for parameter in load_command(command).params:
        if parameter.name == "help":
            continue
        text = getattr(parameter, "help", None)
        assert text or parameter.opts[0] in SELF_EXPLAINING, f"{command} {parameter.opts}"


def test_the_readme_is_short() -> None:
    assert len((Path(__file__).parents[2] / "README.md").read_text().split()) < 900


def test_convert_names_every_codec() -> None:
    (codec,) = (p for p in load_command("store").commands["convert"].params if p.name == "codec")
    assert codec.metavar == "|".join(CODECS)


SELF_EXPLAINING = {"--epochs", "--warmup-epochs", "--batch-size", "--weight-decay", "--layers",
                   "--experts", "--seed"}  # fmt: skip
