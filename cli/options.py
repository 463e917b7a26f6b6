"""Options that several commands share, each defined once."""

from __future__ import annotations

import csv
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.output import fail
from featstore.errors import UserError
from featstore.workspace import STORE_SUFFIX, Workspace
from pipeline.encoders.specs import DEFAULT_ENCODER as DEFAULT_ENCODER

if TYPE_CHECKING:
    from featstore.reading.store import Store

DEFAULT_ROOT = Path("mote-data")

Root = Annotated[
    Path,
    typer.Option(
        "--root",
        envvar="MOTE_ROOT",
        metavar="DIR",
        help="Workspace: data sets, features, heads and encoders live under it.",
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
        "--sampling", metavar="TEXT", help="Which store, where several fit: its --sampling."
    ),
]
StoreName = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="NAME|URL",
        help="Which store, where several fit: its name; or one at s3://BUCKET/PREFIX.",
    ),
]
PromptSet = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="SET|FILE",
        help="Sentences for class names: a prompt set's name, or the file it comes from; default: "
        "the head's, else mote28.",
    ),
]
Descriptions = Annotated[
    list[Path] | None,
    typer.Option(
        "--descriptions",
        metavar="FILE.json",
        help='Sentences of each class, {"class name": ["...", ...]} (docs/text.md).',
    ),
]
PromptSetName = Annotated[
    str | None,
    typer.Option(
        "--prompt-set-name",
        metavar="NAME",
        help="Name of the prompt set in a file; default: the file's, without its suffix.",
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
        help="Arithmetic; auto takes bf16 where it is faster and agrees with fp32.",
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
Modulate = Annotated[
    bool,
    typer.Option(
        "--modulate/--no-modulate",
        help="Temporal feature modulation: trust the head less on classes far from its own.",
    ),
]

# What `train-head` and `finetune` set; what is left out is the recipe's.
Epochs = Annotated[
    int | None, typer.Option("--epochs", min=1, help="Passes over the training videos.")
]
WarmupEpochs = Annotated[
    float | None,
    typer.Option("--warmup-epochs", min=0, help="Epochs until the learning rate is reached."),
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
    int | None, typer.Option("--experts", min=1, help="Temporal experts of a layer that has them.")
]
TrainingSeed = Annotated[
    int | None,
    typer.Option("--seed", help="Draws the head's first weights, and all that training draws."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run of this name where it stopped.")
]

DEFAULT_MAX_FAILURES = 0.05


def workspace(root: Path) -> Workspace:
    """The workspace at `root`; `UserError` when no folder can be there."""
    if re.match(r"[a-z0-9]{2,}:/", str(root)):  # a Path has lost the second "/"
        raise UserError(f"{root} looks like a URL: only `mote-cli extract` takes one as --root")
    for folder in (root, *root.absolute().parents):
        if folder.is_dir():
            return Workspace(root)
        if folder.exists():
            raise UserError(f"{folder} is not a folder: --root takes one, which may be new")
    return Workspace(root)


def same_root(root: Path | str) -> str:
    """What the next command must add to find the same workspace: " --root DIR", or nothing."""
    if str(root) == os.environ.get("MOTE_ROOT", str(DEFAULT_ROOT)):
        return ""
    return f" --root {shlex.quote(str(root))}"


def store_path(root: Path, text: str) -> Path:
    """The store that `text` means: a path, or a name under features/ of the workspace.

    `UserError` when there is none of that name or several.
    """
    given = Path(text)
    # A folder whose replacement was killed half way is put back when it is opened.
    previous = given.with_name(f"{given.name}.previous") if given.name else given
    if "/" in text or given.exists() or previous.exists():
        return given
    features = workspace(root).root / "features"
    stores = sorted(features.glob(f"*/*{STORE_SUFFIX}"))
    found = [path for path in stores if path.name in (text, text + STORE_SUFFIX)]
    if len(found) > 1:
        places = ", ".join(map(str, found))
        raise UserError(f"store {text!r} is there {len(found)} times ({places}): give its path")
    if not found:
        known = ", ".join(path.name for path in stores) or "none"
        raise UserError(f"no store {text!r}: no such folder, and under {features} are: {known}")
    return found[0]


def known_device(name: str) -> str:
    """`name` when it is one of --device's; `UserError` otherwise."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {name!r} is unknown: choose auto, cpu or cuda")
    return name


def device(name: str) -> str:
    """The device that --device names, "cuda" for "auto" where there is one; else `UserError`."""
    from heads.arithmetic import resolve_device  # torch, which --help does without

    return resolve_device(name).type


def prompt_set(store: Store, text: str | None) -> str | None:
    """Name of the store's prompt set that --prompts means; `UserError` as `held_prompt_set`."""
    from pipeline.prompts import held_prompt_set

    return None if text is None else held_prompt_set(store, text)


def architecture(workspace: Workspace, result: Mapping[str, Any]) -> str | None:
    """Architecture of a result's image tower as its name or its folder in the workspace says."""
    from pipeline.encoders.specs import local_architecture

    return local_architecture(str(result.get("encoder", "")), workspace.root / "encoders")


def packed_class_names(workspace: Workspace, dataset: str) -> Sequence[str] | None:
    """Class names of a packed data set; None where it is not packed."""
    from pipeline.tars.dataset import DATASET_FILE, load_dataset

    folder = workspace.dataset_dir(dataset)
    return load_dataset(folder).class_names if (folder / DATASET_FILE).is_file() else None


def class_list(text: str) -> list[str]:
    """Class names from "a, b, c", those that hold a comma in quotes: '"cut, chop", run'.

    `UserError` when there is none or one is named twice.
    """
    fields = next(csv.reader([" ".join(text.split())], skipinitialspace=True), [])
    names = [name.strip() for name in fields if name.strip()]
    if not names:
        raise UserError(f'--classes {text!r} names no class: separate them with commas, "a,b,c"')
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--classes names {name!r} twice: name each class once")
    return names


def require_few_failures(failed: int, listed: int, max_failures: float, reasons: str) -> None:
    """End with one line and exit code 1 if more videos failed than `--max-failures` allows.

    `reasons` says where the reasons can be read.
    """
    if failed > max_failures * listed:
        fail(
            f"{failed} of {listed} videos failed, more than --max-failures {max_failures:g} "
            f"allows: everything else is done; {reasons}, or allow more"
        )
        raise typer.Exit(1)
