"""The application: its commands, and how errors become one line and an exit code."""

from __future__ import annotations

import contextlib
import sys

import typer

from cli import demo, doctor, evaluate, extract, inspect_path, pack, predict, train_head
from cli.output import fail, log_to_stderr
from featstore.errors import UserError, WorkError, one_line

EXIT_WORK_FAILED = 1
EXIT_USER_INPUT = 2
EXIT_INTERRUPTED = 130  # what shells give for Ctrl-C

app = typer.Typer(
    name="mote-cli",
    no_args_is_help=True,
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
app.command("eval")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("inspect")(inspect_path.inspect_path)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line: 0 done, 1 the work failed, 2 the user's input is wrong."""
    log_to_stderr()
    code = 0
    try:
        app()
    except UserError as error:
        fail(one_line(error, limit=1000))
        code = EXIT_USER_INPUT
    except WorkError as error:
        fail(one_line(error, limit=1000))
        code = EXIT_WORK_FAILED
    except OSError as error:
        # A full disk, a folder without permission, a vanished file: no traceback helps there.
        fail(one_line(error))
        code = EXIT_WORK_FAILED
    except KeyboardInterrupt:
        fail("interrupted: what was finished is kept, the same command goes on from there")
        code = EXIT_INTERRUPTED
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.exit(code)


if __name__ == "__main__":
    main()
