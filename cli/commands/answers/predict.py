"""`mote-cli predict`: name what happens in videos, in the user's own words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.output import progress_of, report, results, table
from featstore.errors import UserError, counted_of

if TYPE_CHECKING:
    from heads.prediction.answers import Answer
    from heads.prediction.predict import Predictor

TABLES = 10  # as many videos get a table each on a terminal; more get a line each
FORMATS = ("table", "csv", "jsonl")


def predict(
    videos: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="VIDEO",
            help="Video files, folders of videos, globs in quotes; - reads paths from stdin.",
        ),
    ] = None,
    lists: Annotated[
        list[str] | None,
        typer.Option(
            "--list",
            metavar="FILE",
            help="File with more of them: one path a line, CSV with a column path, or JSON lines.",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar='"a,b,c"|FILE',
            help="Classes in your own words, separated by commas, or a file: one class a line, "
            "CSV or JSON, perhaps with descriptions; default: the head's own.",
        ),
    ] = None,
    head: options.Head = None,
    encoder: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Encoder; default: the one the head was trained with."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show per video.")] = 5,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Frames per video or window; default: the head's."),
    ] = None,
    window: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", min=0.1, help="Predict every so many seconds of a long video."
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="|".join(FORMATS),
            help="How answers are written; default: a table on a terminal, else csv.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Add the answers to this .csv or .jsonl file; run again, it continues.",
        ),
    ] = None,
    prompts: options.PromptSet = None,
    modulate: options.Modulate = True,
    projection: options.Projection = "auto",
    precision: options.Precision = "auto",
    device: options.Device = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads; default: one per core.")
    ] = None,
    max_failures: options.MaxFailures = options.DEFAULT_MAX_FAILURES,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Name the classes that fit each video best, with scores that add up to 1.

    Without a trained head (or with `--head mean`) the embeddings of the frames are averaged.
    Every answer is printed as soon as it is there. docs/predict.md describes files of classes,
    lists, long videos and output files.

    Example: `mote-cli predict clip.mp4 --classes "arm wrestling, cooking"`
    """
    if form not in (None, *FORMATS):
        raise UserError(f"--format {form!r} is unknown: choose table, csv or jsonl")
    workspace = options.workspace(root)
    # Nothing here imports torch, so that what is named wrong is said at once.
    from heads.prediction.classes import read_classes
    from heads.prediction.request import PredictionRequest
    from heads.prediction.videos import find_videos

    request = PredictionRequest(
        videos=find_videos(videos or [], lists or []),
        classes=None if classes is None else read_classes(classes),
        head=head,
        encoder=encoder,
        top=top,
        frames=frames,
        window=window,
        prompts=prompts,
        modulate=modulate,
        projection=options.projection(projection),
        precision=precision,
        device=options.known_device(device),
        workers=workers,
        out=out,
        form=form,
    )
    from heads.prediction.predict import Predictor

    predictor = Predictor(workspace, request)
    show = _printer(predictor, form) if out is None and not json else None
    answers = []
    with progress_of("predict", "videos") as progress:
        for answer in predictor.answers(progress):
            if show is not None:
                show(answer)
            if json:
                answers.append(answer)
    if json:
        report(True, predictor.to_json(answers), {})
    elif out is not None:
        every = len(request.videos)
        told = counted_of(every - predictor.failed, every, "video", "has", "have")
        report(False, {}, [f"{out}: {told} predictions"])
    where = "the reasons are above" + (f" and in {out}" if out is not None else "")
    options.require_few_failures(predictor.failed, len(request.videos), max_failures, where)


def _printer(predictor: Predictor, form: str | None) -> Callable[[Answer], None]:
    """Return what prints an answer in the format that was asked for, or fits what stdout is."""
    from heads.prediction.answers import Lines

    windowed = predictor.request.window is not None
    chosen = form or ("table" if results.is_terminal else "csv")
    if chosen == "table":
        many = len(predictor.request.videos) > TABLES
        return _print_line if many else lambda answer: _print_table(answer, predictor.name)
    lines = Lines("csv" if chosen == "csv" else "jsonl", predictor.top, windowed)
    heading = iter([lines.header])  # it comes with the first answer: an error prints nothing

    def write(answer: Answer) -> None:
        results.file.write(next(heading, "") + lines.of(answer))
        results.file.flush()

    return write


def _print_line(answer: Answer) -> None:
    """Print a video, or each window of it, as one line with as many classes as fit into it."""
    for where, best in [] if answer.error else _parts(answer):  # a warning has said the error
        words = [f"{name} {score:.2f}" for name, score in best]
        line = f"{answer.path}{where}: {words[0]}"
        for word in words[1:]:
            if len(line) + len(word) + 2 > results.width:
                break
            line += f"; {word}"
        results.print(line)


def _print_table(answer: Answer, head: str) -> None:
    """Print a video as a table of its classes, or of its windows with the best class of each."""
    if answer.error:
        return  # a warning has said it
    parts: list[Any] = [f"{answer.path} ({answer.num_frames} frames, head {head})"]
    if answer.windows is None:
        rows = [[name, f"{score:.3f}"] for name, score in answer.best]
        parts.append(table("", ["class", "score"], rows))
    else:
        rows = [[best[0][0], f"{best[0][1]:.3f}", where] for where, best in _parts(answer)]
        parts.append(table("", ["class", "score", "seconds"], rows))
    report(False, {}, parts)


def _parts(answer: Answer) -> list[tuple[str, list[tuple[str, float]]]]:
    """Return " START to END" in seconds and the classes of each window; of the video "" and its."""
    windows = answer.windows
    if windows is None:
        return [("", answer.best)]
    return [(f" {part.start:.1f} to {part.end:.1f}", part.best) for part in windows]
