"""What `--help` prints: options in panels, in two columns that leave the texts their room."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

NAMES_WIDTH = 26  # an option whose name and value are wider has its text below them

OTHER = "Options"
USUAL = "What to work on"

PANELS: Final[Mapping[str, Sequence[str]]] = {
    USUAL: (),  # and every option that no other panel names
    "Training": (
        *("--name", "--recipe", "--method", "--train", "--epochs", "--warmup-epochs"),
        *("--patience", "--draws", "--validation", "--eval-split", "--evaluate-every"),
        *("--batch-size", "--accumulation", "--lr", "--weight-decay", "--layers", "--experts"),
        *("--seed", "--shots", "--draw-seed", "--lists-from", "--class-sampling"),
        *("--class-weights", "--shrinkage", "--augment", "--save", "--blend", "--repeat"),
        "--resume",
    ),
    "Scores": (
        *("--modulate", "--projection", "--ensemble", "--fusion", "--sweep", "--allow-overlap"),
        "--top",
    ),
    OTHER: (),  # of a command with few options
    "Ray cluster": (
        *("--engine", "--address", "--ray-workers", "--cpus-per-worker", "--gpus-per-worker"),
    ),
    "How it is done": (
        *("--precision", "--device", "--workers", "--decoder", "--strict-decode", "--partition"),
        *("--retry-failed", "--dry-run", "--max-failures", "--checkpointing", "--shard"),
        "--checkpoint-every",
    ),
    "Workspace and output": ("--root", "--out", "--format", "--json", "--help"),
}
"""The panel of an option in the help of a command with many options."""

_BRACED = re.compile(r"\{([^{}|]+)\}")  # a needed argument; braces are left to choices

FEW_OPTIONS = 12  # a command with no more has one panel

ELSEWHERE: Final[Mapping[str, tuple[str, Sequence[str]]]] = {
    "eval": (
        "docs/eval-options.md",
        (
            *("--modulation-neighbours", "--modulation-temperature", "--clip-store"),
            *("--label-map", "--k600-source", "--class-lists", "--k400-names", "--draw-seeds"),
            *("--lists-from", "--train-store", "--recipe", "--epochs", "--batch-size", "--lr"),
            *("--repeat", "--name", "--best-epoch", "--fusion", "--crop-style"),
            *("--projection", "--weights"),
        ),
    ),
}
"""Rare options that a command's help leaves to a page in docs/."""


class Command(TyperCommand):
    """A command whose `--help` is a page of this module."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        print_help(self, ctx)


class CommandGroup(TyperGroup):
    """A command with commands of its own, whose `--help` is a page of this module."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        print_help(self, ctx)


def print_help(command: Any, ctx: Any) -> None:
    """Print what a command does, its options, and its own commands if it has some."""
    console = Console(highlight=False)
    usage = command.get_usage(ctx).replace(" []...", "")  # a hidden argument has no name
    usage = _BRACED.sub(r"\1", usage).replace("......", "...")
    console.print(Text(f"\n{usage}\n"))
    for paragraph in str(command.help or "").split("\n\n"):
        console.print(_plain(" ".join(paragraph.split()) + "\n"))
    page, rare = ELSEWHERE.get(str(command.name), ("", ()))
    shown = [p for p in command.get_params(ctx) if not set(rare) & set(p.opts)]
    panels: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Arguments", *PANELS)}
    for parameter in shown:
        if parameter.param_type_name == "argument":
            title = "Arguments"
        else:
            title = OTHER if len(shown) <= FEW_OPTIONS else _panel(parameter.opts)
        if record := parameter.get_help_record(ctx):  # a hidden option has none
            panels[title].append(_written(*record))
    if isinstance(command, TyperGroup):
        commands: Mapping[str, Any] = command.commands
        for name, inner in commands.items():
            line = " ".join(str(inner.help).split("\n\n")[0].split())
            panels.setdefault(inner.rich_help_panel or "Commands", []).append((name, line))
    for title, records in panels.items():
        if records:
            console.print(_titled(title, records))
    if rare:
        names = ", ".join(sorted(rare))
        console.print(Text(f"Rarer options, described in {page}: {names}."))


def _panel(names: Sequence[str]) -> str:
    found = (title for title, options in PANELS.items() if set(names) & set(options))
    return next(found, USUAL)


def _written(names: str, text: str) -> tuple[str, str]:
    """Shorten what Typer writes of an option: types of arguments, and `N` for any number."""
    names = re.sub(r" (<int[^>]*>|INTEGER( RANGE)?|<float[^>]*>|FLOAT( RANGE)?)$", " N", names)
    names = re.sub(r" <[^>]*>$", "", names)
    if max(map(len, names.split())) > NAMES_WIDTH:  # break between alternatives, not inside one
        names = re.sub(rf"(\S{{1,{NAMES_WIDTH - 1}}}\|)(?=\S)", r"\1 ", names, count=1)
    names = names.replace(" / ", "/" if len(names) <= NAMES_WIDTH else "\n")
    return names, text.replace("  [", " [")


def _titled(title: str, records: Sequence[tuple[str, str]]) -> Panel:
    rows = Table(box=None, show_header=False, padding=(0, 1, 0, 0), expand=True)
    widest = max(len(names) for names, _ in records)
    rows.add_column(width=min(NAMES_WIDTH, widest), overflow="fold")
    rows.add_column(ratio=1, overflow="fold")
    for names, text in records:
        rows.add_row(Text(names, style="bold cyan"), _plain(text))
    return Panel(rows, title=title, title_align="left", border_style="dim")


def _plain(text: str) -> Text:
    """Turn a help text into words in which `code` stands out instead of its backticks."""
    made = Text()
    for number, part in enumerate(text.split("`")):
        made.append(part, style="bold" if number % 2 else "")
    return made
