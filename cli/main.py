"""The application: its commands, and how errors become one line and an exit code."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import typer

from cli.commands import (
    compare,
    demo,
    doctor,
    export,
    extract,
    finetune,
    import_checkpoint,
    pack,
    predict,
    protocols,
    store,
    tradeoff,
    train_head,
    verify,
)
from cli.commands import eval as evaluate
from cli.commands import inspect as inspect_path
from cli.output import fail, log_to_stderr
from featstore.errors import UserError, WorkError, one_line

EXIT_WORK_FAILED = 1
EXIT_USER_INPUT = 2
EXIT_INTERRUPTED = 130  # what shells give for Ctrl-C

# Typer 0.2x carries its own copy of click; this finds the base of its errors in either.
_UsageError: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="mote-cli",
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help=(
        "Open-vocabulary action recognition on video: encode frames once with CLIP, train "
        "temporal heads (MoTE) in minutes, say exactly what was measured.\n\n"
        "Start with `mote-cli demo`. On your own videos: `pack`, `extract`, `train-head`, "
        "`eval`, `predict`."
    ),
)
app.command("demo")(demo.demo)
app.command("pack")(pack.pack)
app.command("extract")(extract.extract)
app.command("train-head")(train_head.train_head)
app.command("finetune")(finetune.finetune)
app.command("eval")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("tradeoff")(tradeoff.tradeoff)
app.add_typer(protocols.app, name="protocols")
app.command("predict")(predict.predict)
app.command("import-checkpoint")(import_checkpoint.import_checkpoint)
app.command("export")(export.export)
app.add_typer(store.app, name="store")
app.command("inspect")(inspect_path.inspect_path)
app.command("verify")(verify.verify)
app.command("doctor")(doctor.doctor)


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
