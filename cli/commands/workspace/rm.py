"""`mote-cli rm`: remove a data set, a store, a head or an encoder from the workspace."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options
from cli.output import messages, report
from featstore.errors import UserError
from featstore.files.disk import in_bytes

if TYPE_CHECKING:
    from heads.inventory.removal import Removal


def rm(
    kind: Annotated[
        str,
        typer.Argument(metavar="dataset|store|head|encoder", help="The kind of thing to remove."),
    ],
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME", help="Names as `mote-cli status` shows them."),
    ],
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Remove without asking; needed without a terminal.")
    ] = False,
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Remove data sets, stores, heads or encoders from the workspace, after showing what goes.

    What was made with them stays and is listed. What a running command uses is refused. Links are
    removed without what they lead to, and nothing outside of the workspace is touched.

    Example: `mote-cli rm store my-clips/ViT-B-16-openai--uniform-16`
    """
    from heads.inventory.removal import removals_of, remove

    workspace = options.workspace(root)
    removals = removals_of(workspace, kind, names)
    for line in _lines(removals):
        messages.print(line)
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(
                "nothing is removed without an answer: add --yes to remove what is listed"
            )
        messages.print("remove this? [y/N] ", end="")
        yes = sys.stdin.readline().strip().lower() in ("y", "yes")
    for removal in removals if yes else []:
        remove(workspace, removal)
    size = sum(removal.bytes for removal in removals if yes)
    value = {
        "removed": [removal.to_json() for removal in removals if yes],
        "kept": [removal.to_json() for removal in removals if not yes],
        "bytes": size,
    }
    words = f"removed {len(removals)}, {in_bytes(size)}" if yes else "nothing was removed"
    report(json, value, [words])


def _lines(removals: list[Removal]) -> Iterator[str]:
    for removal in removals:
        leads = f" to {removal.link}" if removal.link else f", {in_bytes(removal.bytes)}"
        yield f"goes: {removal.title} ({removal.holds}{leads}) at {removal.path}"
        for each in removal.dependents:
            yield f"  {each.kind} {each.name}: {each.why}"
