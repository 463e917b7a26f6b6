"""`mote-cli inspect`: show what a data set, a store, a run or a workspace holds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli import options
from cli.commands.first_steps.status import report_contents
from cli.output import percent, report
from featstore.files.disk import in_bytes


def inspect_path(
    path: Annotated[
        str, typer.Argument(metavar="PATH|NAME", help="Folder of one of these, or its name.")
    ],
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Say what PATH is (data set, store, run, encoder or workspace) and what is in it.

    A name, such as my-clips, is looked up in the workspace.

    Example: `mote-cli inspect mote-data/datasets/my-clips`
    """
    from heads.inventory.description import describe

    found = describe(path, options.workspace(root).root)
    if not isinstance(found, dict):
        report_contents(json, found)
        return
    report(json, found, {name: _short(name, value) for name, value in found.items()})


def _short(name: str, value: Any) -> Any:
    if name.startswith("size"):
        return in_bytes(value)
    if name == "newest":
        value = {
            f"{role} {facts['dataset']}": f"{percent(facts.get('top1', facts.get('mean_ap')))} "
            f"({facts['when'][:10]})"
            for role, facts in value.items()
        }
    if name == "failures":
        value = [f"{video['key']}: {video['reason']}" for video in value]
    if isinstance(value, list):
        more = [f"... ({len(value)})"] if len(value) > 10 else []
        return ", ".join(map(str, value[:10] + more)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_words(entry)}" for name, entry in value.items()) or "none"
    return "-" if value is None else value


def _in_words(value: Any) -> Any:
    """Return an entry of an entry without the signs of a programming language."""
    if isinstance(value, dict):
        return f"({', '.join(f'{name} {_in_words(entry)}' for name, entry in value.items())})"
    if isinstance(value, list):
        return " ".join(str(_in_words(entry)) for entry in value) or "none"
    return "-" if value is None else value
