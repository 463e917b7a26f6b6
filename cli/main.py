"""The application: its commands, and how errors become one line and an exit code."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from types import FrameType
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from cli.output import fail, log_to_stderr
from featstore.errors import UserError, WorkError, one_line

EXIT_WORK_FAILED = 1
EXIT_USER_INPUT = 2
EXIT_INTERRUPTED = 130  # what shells give for Ctrl-C

# Typer 0.2x carries its own copy of click; this finds the base of its errors in either.
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

SETTINGS: Final[dict[str, Any]] = {
    "add_completion": False,
    "rich_markup_mode": "markdown",
    "pretty_exceptions_enable": False,
}

COMMANDS: Final = {
    "demo": (
        "cli.commands.demo:demo",
        "See the whole product work, offline: make videos, pack, extract, train, evaluate.",
    ),
    "pack": (
        "cli.commands.pack:pack",
        "Pack labelled videos into WebDataset tars, checking that each can be decoded.",
    ),
    "extract": (
        "cli.commands.extract:extract",
        "Decode, preprocess and encode every video once; features land in a Zarr store.",
    ),
    "train-head": (
        "cli.commands.train_head:train_head",
        "Train a head on stored features; the encoder is not run again.",
    ),
    "finetune": (
        "cli.commands.finetune:finetune",
        "Train the image tower with the head, from packed videos; no store is needed.",
    ),
    "eval": (
        "cli.commands.eval:evaluate",
        "Evaluate a head on a store: top-1, top-5, and how many videos were listed and failed.",
    ),
    "compare": (
        "cli.commands.compare:compare",
        "Say in which fields two results differ, which of them make the numbers incomparable, "
        "and only then compare the numbers.",
    ),
    "tradeoff": (
        "cli.commands.tradeoff:tradeoff",
        "Collect the newest results of several heads: close-set, zero-shot, and the trade-off "
        "score.",
    ),
    "predict": (
        "cli.commands.predict:predict",
        "Name the classes that fit each video best, with scores that add up to 1.",
    ),
    "import-checkpoint": (
        "cli.commands.import_checkpoint:import_checkpoint",
        "Make encoders/NAME and heads/NAME of a checkpoint of MoTE's released code.",
    ),
    "export": (
        "cli.commands.export:export",
        "Write a head as one file for other programs; an existing file is replaced.",
    ),
    "inspect": (
        "cli.commands.inspect:inspect_path",
        "Say what PATH is (data set, feature store or run) and what is in it.",
    ),
    "verify": (
        "cli.commands.verify:verify",
        "Check a feature store: files and sizes, with --deep all checksums.",
    ),
    "doctor": (
        "cli.commands.doctor:doctor",
        "Show versions, CPU features, GPU and video decoder, hub access and free disk.",
    ),
    "protocols": (
        "cli.commands.protocols:app",
        "The named evaluation protocols: what they train on, test, count and report, and how "
        "what is run here differs from the papers.",
    ),
    "store": (
        "cli.commands.store:app",
        "Let a store grow, join stores, rewrite them smaller, or hand their rows to other "
        "programs.",
    ),
}
"""Where each command is, and the line that the list of commands shows of it: the first paragraph
of its help. A command's module is imported when the command is used, and not before."""


class Commands(TyperGroup):
    """The commands of `COMMANDS`: their names are known at once, their options when one is used."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (_, line) in COMMANDS.items():
            self.add_command(TyperCommand(name, help=line))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that `args` begin with, loaded, and the arguments that are left for it."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, load_command(str(name)), rest


def load_command(name: str) -> Any:
    """The command of that name in `COMMANDS`, with its options; this imports its module."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    found = getattr(import_module(module), attribute)
    holder = typer.Typer(**SETTINGS)
    if isinstance(found, typer.Typer):  # `store` and `protocols` have commands of their own
        holder.add_typer(found, name=name)
    else:
        holder.command(name)(found)
    return typer.main.get_group(holder).commands[name]


app = typer.Typer(
    name="mote-cli",
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Open-vocabulary action recognition on video: encode frames once with CLIP, train "
        "temporal heads (MoTE) in minutes, say exactly what was measured.\n\n"
        "Start with `mote-cli demo`. On your own videos: `pack`, `extract`, `train-head`, "
        "`eval`, `predict`."
    ),
    **SETTINGS,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mote-cli {version('mote-video')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line: 0 done, 1 the work failed, 2 the user's input is wrong."""
    log_to_stderr()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names may hold bytes that are no text; printing one must not end the work.
        sys.stdout.reconfigure(errors="backslashreplace")
    code = _run()
    if code == EXIT_INTERRUPTED:
        fail(
            "interrupted: what was finished is kept; the same command goes on from there "
            "(train-head and finetune with --resume)"
        )
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.exit(code)


def _run() -> int:
    try:
        with _interruptible():
            # Not standalone: errors of usage, too, are one line. Without a word: the help.
            code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UserError as error:
        fail(one_line(error, limit=1000))
        return EXIT_USER_INPUT
    except WorkError as error:
        fail(one_line(error, limit=1000))
        return EXIT_WORK_FAILED
    except OSError as error:
        # A full disk, a folder without permission, a vanished file: no traceback helps there.
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{one_line(error.strerror or error)}: mend it and run the same command again")
        return EXIT_WORK_FAILED
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except _UsageError as error:
        command = error.ctx.command_path if getattr(error, "ctx", None) else "mote-cli"
        fail(f"{one_line(error.format_message()).rstrip('.')}; see `{command} --help`")
        return EXIT_USER_INPUT


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM, which schedulers send, stops the work as Ctrl-C does; a second one is final."""

    def stop(number: int, frame: FrameType | None) -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_DFL)
        raise KeyboardInterrupt

    try:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, stop)
    except ValueError:
        pass  # signals can be had in the main thread only
    yield


if __name__ == "__main__":
    main()
