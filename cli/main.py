"""The application: its commands, and how errors become one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from types import FrameType
from typing import Annotated, Any, Final

import typer

from cli.help_page import Command, CommandGroup
from cli.output import fail, log_to_stderr
from featstore.errors import UserError, WorkError, one_line, quoted

EXIT_WORK_FAILED = 1
EXIT_USER_INPUT = 2
TRACEBACK_VARIABLE = "MOTE_TRACEBACK"  # set: an unexpected error shows where it came from
EXIT_INTERRUPTED = 130  # what shells give for Ctrl-C

# Typer 0.2x carries its own copy of click; this finds the base class of usage errors in either.
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

SETTINGS: Final[dict[str, Any]] = {
    "rich_markup_mode": "markdown",
    "pretty_exceptions_enable": False,
}

COMMANDS: Final = {
    "demo": (
        "cli.commands.first_steps.demo:demo",
        "See the whole product work, offline: make videos, pack, extract, train, evaluate.",
    ),
    "pack": (
        "cli.commands.first_steps.pack:pack",
        "Pack labelled videos into WebDataset tars, checking that each can be decoded.",
    ),
    "extract": (
        "cli.commands.first_steps.extract:extract",
        "Decode, preprocess and encode every video once, and write the features to a Zarr store.",
    ),
    "descriptions": (
        "cli.commands.heads.descriptions:app",
        "Write, take over and check sentences about each class, which guide the training of class "
        "texts.",
    ),
    "train-head": (
        "cli.commands.heads.train_head:train_head",
        "Train a head on stored features; the encoder is not run again.",
    ),
    "finetune": (
        "cli.commands.heads.finetune:finetune",
        "Train the image tower together with the head, from packed videos and without a store.",
    ),
    "eval": (
        "cli.commands.answers.eval:evaluate",
        "Evaluate a head on a store: top-1, top-5, and how many videos were listed and failed.",
    ),
    "compare": (
        "cli.commands.answers.compare:compare",
        "Say in what the training and the fields of results differ, which of it makes the "
        "numbers incomparable, and only then compare the numbers.",
    ),
    "tradeoff": (
        "cli.commands.answers.tradeoff:tradeoff",
        "Collect the newest results of several heads: close-set, zero-shot, and the trade-off "
        "score.",
    ),
    "predict": (
        "cli.commands.answers.predict:predict",
        "Name the classes that fit each video best, with scores that add up to 1.",
    ),
    "import-checkpoint": (
        "cli.commands.heads.import_checkpoint:import_checkpoint",
        "Turn a checkpoint of a method's authors into encoders/NAME and heads/NAME.",
    ),
    "export": (
        "cli.commands.heads.export:export",
        "Write a head as one file for other programs; an existing file is replaced.",
    ),
    "status": (
        "cli.commands.first_steps.status:status",
        "Show what the workspace holds, how large it is, and what is missing for what.",
    ),
    "inspect": (
        "cli.commands.workspace.inspect:inspect_path",
        "Say what PATH is (data set, store, run, encoder or workspace) and what is in it.",
    ),
    "rm": (
        "cli.commands.workspace.rm:rm",
        "Remove data sets, stores, heads or encoders from the workspace, after showing what goes.",
    ),
    "verify": (
        "cli.commands.workspace.verify:verify",
        "Check a feature store: files and sizes, with --deep all checksums.",
    ),
    "doctor": (
        "cli.commands.first_steps.doctor:doctor",
        "Show versions, CPU features, GPU and video decoder, hub access and free disk.",
    ),
    "protocols": (
        "cli.commands.answers.protocols:app",
        "Describe the named evaluation protocols: what each trains on, tests, counts and reports, "
        "and how mote differs from the papers.",
    ),
    "store": (
        "cli.commands.workspace.store:app",
        "Add to a store, join stores, make a store smaller, write its rows for other programs, or "
        "find copies and doubtful labels in it.",
    ),
}
"""The function of each command, and the line that describes it in the list of commands: the first
paragraph of its help. A command's module is imported only when the command is used."""


class Commands(CommandGroup):
    """The commands of `COMMANDS`; the options of a command are loaded only when it is used."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (place, line) in COMMANDS.items():
            stage = place.split(".")[2].replace("_", " ").capitalize()  # the folder of its module
            self.add_command(Command(name, help=line, rich_help_panel=stage))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Load the command that `args` begin with; return its name, itself and the other words."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, load_command(str(name)), rest


def load_command(name: str) -> Any:
    """Import the module of the command `name`; return the command with its options."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    found = getattr(import_module(module), attribute)
    holder = typer.Typer(add_completion=False, **SETTINGS)
    if isinstance(found, typer.Typer):  # `store`, `protocols`, ... have commands of their own
        for command in found.registered_commands:
            command.cls = Command
        holder.add_typer(found, name=name, cls=CommandGroup)
    else:
        holder.command(name, cls=Command)(found)
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
    # By default, threads that wait for each other keep their cores busy: beside one other busy
    # program, training took 20 times as long. torch reads the variable when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    log_to_stderr()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names may hold bytes that are not text; printing one must not stop the command.
        sys.stdout.reconfigure(errors="backslashreplace")
    code = _run()
    if code == EXIT_INTERRUPTED:
        fail(
            "interrupted: finished work is kept; run the same command again to continue "
            "(train-head and finetune need --resume)"
        )
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.exit(code)


def _run() -> int:
    try:
        with _interruptible():
            # Not standalone, so that usage errors are one line too. No arguments: show the help.
            code = app(sys.argv[1:] or ["--help"], prog_name="mote-cli", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UserError as error:
        fail(one_line(error, limit=1000))
        return EXIT_USER_INPUT
    except WorkError as error:
        fail(one_line(error, limit=1000))
        return EXIT_WORK_FAILED
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # only what was typed or listed can be
            fail(f"{quoted(str(error.filename), 60)}: no file has a name this long; shorten it")
            return EXIT_USER_INPUT
        # A full disk, a folder without permission, a vanished file: a traceback would not help.
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{one_line(error.strerror or error)}: fix it and run the same command again")
        return EXIT_WORK_FAILED
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except MemoryError:
        fail("there is not enough memory for this: ask for less at a time, or use a larger machine")
        return EXIT_WORK_FAILED
    except _UsageError as error:
        command = error.ctx.command_path if getattr(error, "ctx", None) else "mote-cli"
        fail(f"{one_line(error.format_message()).rstrip('.')}; see `{command} --help`")
        return EXIT_USER_INPUT
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        fail(
            f"mote failed at something it does not expect ({type(error).__name__}: "
            f"{one_line(error, 200)}): please report it with what the same command prints after "
            f"`export {TRACEBACK_VARIABLE}=1`"
        )
        return EXIT_WORK_FAILED


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
        pass  # only the main thread can set signal handlers
    yield


if __name__ == "__main__":
    main()
