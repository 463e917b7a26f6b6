"""Options that several commands share, each defined once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cli.output import fail, warn
from featstore.commands import DEFAULT_ROOT as DEFAULT_ROOT
from featstore.commands import ROOT_VARIABLE
from featstore.errors import UserError, WorkError, counted, meant, one_line, one_of
from featstore.workspace import STORE_SUFFIX, Workspace
from pipeline.encoders.specs import DEFAULT_ENCODER as DEFAULT_ENCODER

if TYPE_CHECKING:
    from featstore.reading.store import Store

Kept = TypeVar("Kept")

Root = Annotated[
    Path,
    typer.Option(
        "--root",
        envvar=ROOT_VARIABLE,
        metavar="DIR",
        help="Workspace: the folder that holds data sets, features, heads and encoders.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout; the rest goes to stderr.")
]
Dataset = Annotated[str, typer.Option("--dataset", metavar="NAME", help="Name of the data set.")]
Split = Annotated[
    str | None,
    typer.Option("--split", metavar="NAME", help="Use the videos of this split."),
]
StoreSampling = Annotated[
    str | None,
    typer.Option(
        "--sampling", metavar="TEXT", help="If several stores fit, take the one of this sampling."
    ),
]
StoreName = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="NAME|URL",
        help="If several stores fit, take the one of this name, or the one at s3://BUCKET/PREFIX.",
    ),
]
PromptSet = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="SET|FILE",
        help="Sentences for class names: the name of a prompt set, or the file it was read from; "
        "default: the head's prompt set, else mote28.",
    ),
]
Descriptions = Annotated[
    list[Path] | None,
    typer.Option(
        "--descriptions",
        metavar="FILE.json|FILE.csv",
        help='Sentences for each class, {"class name": ["...", ...]}, or CSV id,name of rephrased '
        'names, "class name: one sentence" (docs/text.md).',
    ),
]
PromptSetName = Annotated[
    str | None,
    typer.Option(
        "--prompt-set-name",
        metavar="NAME",
        help="Name for the prompt set in a file; default: the file's name without its suffix.",
    ),
]
Device = Annotated[
    str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where the network runs.")
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="auto|fp32|bf16|fp16",
        help="Number format of the arithmetic; auto takes bf16 if it is faster and agrees with "
        "fp32.",
    ),
]
MaxFailures = Annotated[
    float,
    typer.Option(
        "--max-failures",
        metavar="FRACTION",
        min=0.0,
        max=1.0,
        help="Exit with 1 when more than this share of the videos failed.",
    ),
]
Head = Annotated[
    str | None,
    typer.Option(
        "--head",
        metavar="RUN",
        help="Name of a trained head, or `mean` for CLIP's mean of frames; default: the newest.",
    ),
]
Exclude = Annotated[
    Path | None,
    typer.Option(
        "--exclude",
        metavar="FILE",
        help="Leave out the videos of this list: one key a line, or CSV with a column key; if it "
        "has a column exclude, the rows that say yes.",
    ),
]
Modulate = Annotated[
    bool,
    typer.Option(
        "--modulate/--no-modulate",
        help="Temporal feature modulation: trust the head less on classes that are far from those "
        "it was trained on.",
    ),
]
Projection = Annotated[
    str,
    typer.Option(
        "--projection",
        metavar="auto|on|off",
        help="Whether a head's projection is used; auto: for the classes it was trained on, and "
        "not for others.",
    ),
]

# Settings of `train-head` and `finetune`; those that are not given come from the recipe.
Epochs = Annotated[
    int | None, typer.Option("--epochs", min=1, help="Passes over the training videos.")
]
WarmupEpochs = Annotated[
    float | None,
    typer.Option("--warmup-epochs", min=0, help="Epochs in which the learning rate rises."),
]
WeightDecay = Annotated[
    float | None, typer.Option("--weight-decay", min=0, help="AdamW's weight decay.")
]
TrainedFrames = Annotated[
    int | None,
    typer.Option("--frames", min=1, help="Frames per video in training and evaluation."),
]
Layers = Annotated[
    int | None, typer.Option("--layers", min=1, help="Layers of the temporal transformer.")
]
Experts = Annotated[
    int | None, typer.Option("--experts", min=1, help="Temporal experts per layer with experts.")
]
TrainingSeed = Annotated[
    int | None,
    typer.Option("--seed", help="Seed of the head's first weights and of all random choices."),
]
ClassSampling = Annotated[
    str | None,
    typer.Option(
        "--class-sampling",
        metavar="balanced",
        help="Let all classes come equally often in an epoch, however many videos they have.",
    ),
]
ClassWeights = Annotated[
    str | None,
    typer.Option(
        "--class-weights",
        metavar="balanced|sqrt|FILE",
        help="Let rare classes count more in the loss, or as a CSV class,weight says.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run of this name where it stopped.")
]

DEFAULT_MAX_FAILURES = 0.05


def projection(text: str) -> bool | None:
    """Return whether a projection is asked for; None for "auto". UserError for another word."""
    known = {"auto": None, "on": True, "off": False}
    if text not in known:
        raise UserError(f"--projection {text!r} is unknown: {one_of(text, tuple(known))}")
    return known[text]


def words_given(
    context: typer.Context,
    *left_out: str,
    absolute: Mapping[str, Callable[[str], str]] | None = None,
) -> list[str]:
    """Return the words of a command that mean the same in any folder.

    They are the options typed or in the environment, without those called `left_out`. Paths become
    absolute, and so do the values of options that `absolute` has a function for.
    """
    words: list[str] = []
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if source is None or source.name.startswith("DEFAULT") or name in left_out:
            continue
        value, option = context.params[name], parameter.opts[0]
        if isinstance(value, bool):
            words.append(option if value else parameter.secondary_opts[0])
            continue
        whole = (absolute or {}).get(name)
        for each in value if isinstance(value, list | tuple) else [value]:
            words += [option] * (parameter.param_type_name == "option")
            plain = os.path.abspath(each) if isinstance(each, Path) else str(each)
            words.append(plain if whole is None else whole(str(each)))
    return words


def workspace(root: Path) -> Workspace:
    """Return the workspace at `root`; raises UserError if `root` cannot be a folder."""
    if re.match(r"[a-z0-9]{2,}:/", str(root)):  # a Path has lost the second "/"
        raise UserError(f"{root} looks like a URL: only `mote-cli extract` takes one as --root")
    for folder in (root, *root.absolute().parents):
        if folder.is_dir():
            return Workspace(root)
        if folder.exists():
            raise UserError(f"{folder} is not a folder: --root takes a folder, also a new one")
    return Workspace(root)


def store_path(root: Path, text: str) -> Path:
    """Return the path of the store `text`: a path, or STORE or DATASET/STORE of the workspace.

    Raises UserError if no store or several stores have that name.
    """
    given = Path(text)
    # If a replacement of the folder was killed half way, opening it puts the folder back.
    previous = given.with_name(f"{given.name}.previous") if given.name else given
    if given.exists() or previous.exists():
        return given
    features = workspace(root).root / "features"
    stores = sorted(features.glob(f"*/*{STORE_SUFFIX}"))
    name = text.removesuffix(STORE_SUFFIX)
    found = [p for p in stores if name in (p.stem, f"{p.parent.name}/{p.stem}")]
    if len(found) > 1:
        places = " or ".join(f"{path.parent.name}/{path.stem}" for path in found)
        raise UserError(f"the name {text!r} fits {len(found)} stores: name {places}")
    if not found and "/" in text:
        return given
    if not found:
        known = ", ".join(path.name for path in stores) or "none"
        near = meant(text.removesuffix(STORE_SUFFIX), (path.stem for path in stores))
        raise UserError(
            f"no store {text!r}: {near}no such folder, and under {features} are: {known}"
        )
    return found[0]


def known_device(name: str) -> str:
    """Return `name` if --device knows it; raises UserError otherwise."""
    if name not in ("auto", "cpu", "cuda"):
        near = meant(name, ("auto", "cpu", "cuda"), {"gpu": "cuda"})
        raise UserError(f"device {name!r} is unknown: {near}choose auto, cpu or cuda")
    return name


def device(name: str) -> str:
    """Return the device that --device means, "cpu" or "cuda"; raises UserError if it is absent."""
    from heads.arithmetic import resolve_device  # imports torch, which --help does not need

    return resolve_device(name).type


def prompt_set(store: Store, text: str | None) -> str | None:
    """Return the name of the prompt set that --prompts means; errors as `held_prompt_set`."""
    from pipeline.prompts import held_prompt_set

    return None if text is None else held_prompt_set(store, text)


def packed_class_names(workspace: Workspace, dataset: str) -> Sequence[str] | None:
    """Return the class names of a packed data set, or None if it is not packed."""
    from pipeline.tars.dataset import DATASET_FILE, load_dataset

    folder = workspace.dataset_dir(dataset)
    return load_dataset(folder).class_names if (folder / DATASET_FILE).is_file() else None


def video_paths(workspace: Workspace, dataset: str) -> Mapping[str, str]:
    """Return the paths of a data set's videos by key; {} if it is not packed in this workspace."""
    from pipeline.tars.paths import video_paths as paths_in

    return paths_in(workspace.dataset_dir(dataset))


def content_marks(workspace: Workspace, dataset: str) -> Mapping[str, Sequence[str]]:
    """Return what tells the content of a data set's videos by key, as far as it is known here."""
    from heads.quality.copies import content_marks as marks_in

    try:
        return marks_in(workspace.root / "quality", workspace.dataset_dir(dataset))
    except UserError:  # a head may come from a data set whose name is no folder's name here
        return {}


def kept(save: Callable[[], Kept], place: Path) -> tuple[Kept | None, str]:
    """Call `save`; return its result and "", or None and why it cannot write to `place`.

    So that a command in a folder that cannot be written prints what it found, and then ends with
    `require_kept`.
    """
    try:
        return save(), ""
    except OSError as error:
        return None, f"{error.filename or place} ({error.strerror or one_line(error)})"


def require_kept(refused: str, what: str, remedy: str) -> None:
    """Raise WorkError, which names the file and the `remedy`, if `kept` was refused to write."""
    if refused:
        raise WorkError(f"{what} printed, but not kept: cannot write {refused}; {remedy}")


def require_few_failures(
    failed: int, listed: int, max_failures: float, reasons: str, first: str = ""
) -> None:
    """End with one line and exit code 1 if more videos failed than `--max-failures` allows.

    `reasons` says where the reasons can be read; `first` is the first of them. If all videos
    failed, the line says so, as a warning if this is allowed.
    """
    if listed and failed == listed:
        why = f" (the first: {first})" if first else ""
        all_failed = (
            f"all {counted(listed, 'video')} failed{why}, so there is nothing to go on with: "
            f"{reasons}; give video files that a player can open"
        )
        if failed <= max_failures * listed:
            warn(all_failed)
            return
        fail(all_failed)
        raise typer.Exit(1)
    if failed > max_failures * listed:
        fail(
            f"{failed} of {counted(listed, 'video')} failed, more than --max-failures "
            f"{max_failures:g} allows: the other videos are done; {reasons}, or allow more"
        )
        raise typer.Exit(1)
