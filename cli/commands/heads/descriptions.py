"""`mote-cli descriptions ...`: sentences about each class, in a file that people can read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.output import Shown, report
from featstore.commands import command
from featstore.errors import UserError

if TYPE_CHECKING:
    from pipeline.descriptions.check import DescriptionsCheck, Finding

_SHOWN = 50  # findings that people are shown; --json has all

app = typer.Typer(
    rich_markup_mode="markdown",
    help=(
        "Write, take over and check sentences about each class, which guide the training of class "
        "texts.\n\n"
        "A file holds spatial and temporal sentences of each class (docs/descriptions.md).\n\n"
        "Example: `mote-cli descriptions template --dataset my-clips -o mine.json`"
    ),
)

ClassesOf = Annotated[
    str | None,
    typer.Option("--dataset", metavar="NAME", help="Take the classes of this packed data set."),
]
Classes = Annotated[
    str | None,
    typer.Option(
        "--classes", metavar="FILE", help="Take the classes of this file, one name a line, or CSV."
    ),
]
OutFile = Annotated[
    Path, typer.Option("--out", "-o", metavar="FILE.json", help="The file of descriptions.")
]


@app.command("check")
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file of descriptions.")],
    dataset: ClassesOf = None,
    classes: Classes = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            metavar="SPEC",
            help="Also count tokens: the CLIP whose text tower reads the sentences.",
        ),
    ] = None,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Check a file against classes and, with --encoder, against a text tower's room.

    Everything that is wrong is listed by class. The exit code is 1 if anything is.

    Example: `mote-cli descriptions check mine.json --dataset my-clips`
    """
    from heads.evaluation.next_steps import after_descriptions
    from pipeline.descriptions.check import check_descriptions

    names = _class_names(dataset, classes, root)
    tower = None
    if encoder is not None:
        from pipeline.clip_encoder import load_encoder

        folder = options.workspace(root).root / "encoders"
        tower = load_encoder(encoder, "fp32", encoders_dir=folder)
    checked = check_descriptions(file, names, tower)
    use = {} if checked.wrong else after_descriptions(root, dataset, file, encoder)
    report(json, checked.to_json() | use, [*_shown(checked), use])
    raise typer.Exit(int(bool(checked.wrong)))


@app.command("template")
def template(
    out: OutFile,
    dataset: ClassesOf = None,
    classes: Classes = None,
    per_class: Annotated[
        int,
        typer.Option("--per-class", metavar="N", min=1, help="Sentences of each kind for a class."),
    ] = 2,
    prompt: Annotated[
        Path | None,
        typer.Option(
            "--prompt",
            metavar="FILE.txt",
            help="Write the request for a language model into this file and do not print it.",
        ),
    ] = None,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Write descriptions made of templates, and the request for a language model.

    Give the request to any language model and save its answer as a file. The templates, which say
    nothing but the class's name, are there for training without one.

    Example: `mote-cli descriptions template --dataset my-clips -o mine.json`
    """
    from featstore.files.durable import write_bytes
    from heads.evaluation.next_steps import after_descriptions
    from pipeline.descriptions.wording import request_text, template_descriptions

    names = _class_names(dataset, classes, root)
    made = template_descriptions(names, per_class)
    text = request_text(names, per_class)
    if prompt is not None and (prompt.exists() or prompt.absolute() == out.absolute()):
        raise UserError(f"{prompt} exists already: name another file for the request")
    made.write(out)
    if prompt is not None:
        write_bytes(prompt, text.encode())
    asked = "ANSWER.json" if prompt is None else prompt.with_suffix(".json")
    follow = command(*("descriptions", "check", asked), dataset=dataset, classes=classes, root=root)
    use = after_descriptions(root, dataset, out)
    facts = {
        "descriptions": f"{out}, {len(names)} classes with {made.per_class} spatial and "
        f"{made.per_class} temporal sentences each, from templates",
        **use,
        "request": f"{prompt or 'below'}; save the answer as {asked} and check it",
        "then": follow,
    }
    value = {
        "file": str(out),
        "classes": len(names),
        "per_class": made.per_class,
        "hash": made.hash,
        "prompt": text,
        "prompt_file": None if prompt is None else str(prompt),
        "then": follow,
        **use,
    }
    report(json, value, [facts, *([] if prompt is not None else text.rstrip().split("\n"))])


@app.command("import")
def import_published(
    spatial: Annotated[
        Path, typer.Argument(metavar="SPATIAL", help='File {"0": ["...", ...], ...} of N_s_...')
    ],
    temporal: Annotated[
        Path, typer.Argument(metavar="TEMPORAL", help="The file N_t_... that belongs to it.")
    ],
    classes: Annotated[
        Path,
        typer.Option(
            "--classes",
            metavar="LIST",
            help="Names of the numbers, in the published order: one a line, or CSV id,name.",
        ),
    ],
    out: OutFile,
    append: Annotated[
        bool, typer.Option("--append", help="Add the classes to the file, as for the novel half.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Turn a pair of published files, keyed by class number, into one keyed by class name.

    The files of HMDB51 follow a list that exchanges kick with kick ball and sword with sword
    exercise; their sentences go to the class that they are about, and this is said.

    Example: `mote-cli descriptions import S.json T.json --classes LIST -o mine.json`
    """
    from pipeline.descriptions.published import import_descriptions

    checked, exchanges = import_descriptions(spatial, temporal, classes, out, append=append)
    value = checked.to_json() | {"exchanges": [vars(exchange) for exchange in exchanges]}
    report(json, value, [*_shown(checked), *(f"names: {exchange}" for exchange in exchanges)])
    raise typer.Exit(int(bool(checked.wrong)))


def _class_names(dataset: str | None, classes: str | None, root: Path) -> Sequence[str]:
    """Return the classes of the data set or file; UserError unless exactly one is named."""
    if (dataset is None) == (classes is None):
        raise UserError("name the classes with --dataset NAME or with --classes FILE, one of them")
    if dataset is None:
        from heads.prediction.classes import read_classes

        return read_classes(str(classes)).names
    from pipeline.tars.dataset import load_dataset

    names = load_dataset(options.workspace(root).dataset_dir(dataset)).class_names
    if not names:
        raise UserError(f"data set {dataset} has no classes to describe: name another")
    return names


def _shown(checked: DescriptionsCheck) -> Iterator[Shown]:
    made, longest = checked.descriptions, checked.longest
    facts: dict[str, Any] = {
        "descriptions": checked.file,
        "classes": f"{checked.described} of {checked.classes} are described",
        "sentences": checked.sentences
        if made is None
        else f"{checked.sentences}, {made.per_class} spatial and {made.per_class} temporal each",
    }
    if longest is not None:
        size = f"{longest.characters} characters"
        size += "" if longest.tokens is None else f", {longest.tokens} tokens"
        facts["longest"] = f"{size}, of class {longest.class_name!r}"
    if checked.encoder is None:
        facts["tokens"] = "not counted: name the tower with --encoder"
    elif checked.room is None:
        facts["tokens"] = f"the tokeniser of {checked.encoder} cuts long sentences"
    else:
        facts["tokens"] = f"{checked.encoder} takes {checked.room}"
    if made is not None:
        facts["hash"] = made.hash
    yield facts
    yield from _listed("wrong", checked.wrong)
    yield from _listed("doubtful", checked.doubtful)
    if not checked.wrong:
        yield "every class has its sentences"


def _listed(word: str, findings: Sequence[Finding]) -> Iterator[str]:
    yield from (f"{word}: {finding}" for finding in findings[:_SHOWN])
    if len(findings) > _SHOWN:
        yield f"{word}: and {len(findings) - _SHOWN} more, which --json lists"
