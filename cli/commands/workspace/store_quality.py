"""`mote-cli store duplicates`, `leaks` and `suspects`: videos of a store that deserve a look."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.output import Shown, progress_of, report, table
from featstore.commands import command, workspace_of
from featstore.errors import UserError, safe_text

if TYPE_CHECKING:
    from heads.quality.copies import Copies
    from heads.quality.part import Part

SHOWN = 8  # groups or suspects that are printed

StorePart = Annotated[
    str,
    typer.Argument(
        metavar="STORE[:SPLIT]",
        help="Path of a store, or its name (STORE or DATASET/STORE); with :SPLIT only this split.",
    ),
]
OutFolder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Folder for the lists and the picture; default: quality/DATASET/STORE/SPLIT of the "
        "workspace; of leaks, a folder for the other store or split in it.",
    ),
]
_ELSEWHERE = "name another folder for the lists with --out"
Picture = Annotated[
    bool,
    typer.Option("--picture/--no-picture", help="Draw what was found, if the tars are at hand."),
]


def duplicates(
    store: StorePart,
    out: OutFolder = None,
    picture: Picture = True,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Find videos that are in a store more than once: re-encoded, cropped, trimmed, mirrored.

    Videos are compared frame by frame in the stored embeddings; how alike copies have to be is
    found on the store itself. Nothing is changed: `train-head --exclude` and `pack --exclude` take
    the list that is written (docs/data-quality.md).

    Example: `mote-cli store duplicates my-store`
    """
    part = _part(root, store)
    from heads.quality.search import find_duplicates

    with progress_of("compare", "videos") as progress:
        found = find_duplicates(part, progress=progress)
    _report_copies(found, _folder(root, out, part), picture, json)


def leaks(
    train: StorePart,
    test: StorePart,
    out: OutFolder = None,
    picture: Picture = True,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Find test videos that are copies of training videos, in two stores or two splits of one.

    The list names the training videos, so that `train-head --exclude` trains without them.

    Example: `mote-cli store leaks my-store:train my-store:val`
    """
    first, second = _part(root, train), _part(root, test)
    from heads.quality.search import find_leaks

    with progress_of("compare", "videos") as progress:
        found = find_leaks(first, second, progress=progress)
    _report_copies(found, _folder(root, out, first, second), picture, json)


def suspects(
    store: StorePart,
    out: OutFolder = None,
    picture: Picture = True,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Rank videos whose label does not fit what they look like, and name blank ones and outliers.

    Every video is classified by all the others. The most suspicious ones come first; the list
    proposes to exclude those that very probably have a wrong label. Look before you exclude.

    Example: `mote-cli store suspects my-store:train`
    """
    part = _part(root, store)
    from heads.quality.suspects import find_suspects

    with progress_of("classify", "videos") as progress:
        found = find_suspects(part, progress=progress)
    folder = _folder(root, out, part)
    files, refused = options.kept(lambda: found.save(folder, picture), folder)
    lines = [
        [s.key, s.class_name or "-", s.looks_like or "-", s.problem, f"{s.score:.2f}"]
        for s in [s for s in found.ranked if s.problem][:SHOWN]
    ]
    following = _next(part, files, found.excluded)
    report(
        json,
        {**found.to_json(), "files": _paths(files), **following},
        [
            {"videos": found.words, "suspects": found.counts},
            *_table(lines, ["most suspicious", "class", "looks like", "why", "score"]),
            {**_files(files), **following},
        ],
    )
    options.require_kept(refused, "what was found is", _ELSEWHERE)


def _report_copies(found: Copies, folder: Path, picture: bool, json: bool) -> None:
    files, refused = options.kept(lambda: found.save(folder, picture), folder)
    lines: list[str] = []
    for number, group in enumerate(found.groups[:SHOWN], start=1):
        lines.append(f"{number}. {group.words}")
        lines += [f"  {safe_text(line)}" for line in group.lines]
    if len(found.groups) > SHOWN:
        where = f" in {files['list']}" if files else ""
        lines.append(f"and {len(found.groups) - SHOWN} more groups{where}")
    following = _next(found.parts[0], files, found.excluded)
    report(
        json,
        {**found.to_json(), "files": _paths(files), **following},
        [{"videos": found.words, "found": found.counts}, *lines, {**_files(files), **following}],
    )
    options.require_kept(refused, "what was found is", _ELSEWHERE)


def _table(lines: list[list[str]], columns: list[str]) -> list[Shown]:
    return [table("", columns, lines)] if lines else []


def _files(files: dict[str, Path] | None) -> dict[str, Any]:
    return {name: file for name, file in (files or {}).items() if name != "json"}


def _paths(files: dict[str, Path] | None) -> dict[str, str]:
    return {name: str(file) for name, file in (files or {}).items()}


def _next(part: Part, files: dict[str, Path] | None, excluded: int) -> dict[str, str]:
    """Return the command that trains without what was found; nothing if there is none."""
    from heads.evaluation.next_steps import after_rewriting

    training = after_rewriting(part.store.path) if excluded else None
    if training is None or not files or not training.startswith("mote-cli train-head"):
        return {}
    listed = command("x", exclude=files["list"]).removeprefix("mote-cli x ")
    return {"next": f"{training} {listed}"}


def _folder(root: Path, out: Path | None, part: Part, other: Part | None = None) -> Path:
    """Return the folder for the lists: each store, split and pair of them has its own."""
    from pipeline.annotations.listing import key_from_name

    def place(part: Part) -> Path:
        path = part.store.path
        # Stores of several data sets have the same name: only with the data set's it is their own.
        dataset = path.absolute().parent.name if workspace_of(path) else ""
        return Path(dataset, path.stem, key_from_name(part.split))

    own = place(part)
    if other is not None and other.store.path == part.store.path:
        own /= key_from_name(other.split)
    elif other is not None:
        own /= place(other)
    folder = out or options.workspace(root).root / "quality" / own
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file: name a folder, also a new one")
    return folder


def _part(root: Path, text: str) -> Part:
    """Open STORE or STORE:SPLIT; UserError for an unknown store or split, or without embeddings."""
    name, _, split = text.rpartition(":")
    whole = not name or Path(text).exists()
    path = options.store_path(root, text if whole else name)
    # Only then, so that a wrong name is answered at once.
    from featstore.opening import open_store
    from heads.quality.part import Part

    store = open_store(path)
    dataset_dir = options.workspace(root).dataset_dir(store.provenance.dataset)
    return Part.of(store, "" if whole else split, dataset_dir)
