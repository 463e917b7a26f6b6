"""`mote-cli inspect`: show what a data set, a store or a run holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli import options
from cli.output import report
from featstore.errors import UserError
from featstore.workspace import CONFIG_FILE, DATASET_FILE

WANTED = (
    "give the folder of one, such as mote-data/datasets/NAME, mote-data/features/NAME/STORE.zarr "
    "or mote-data/heads/RUN"
)


def inspect_path(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of one of these.")],
    json: options.Json = False,
) -> None:
    """Say what PATH is (data set, feature store or run) and what is in it.

    Example: `mote-cli inspect mote-data/datasets/my-clips`
    """
    from featstore import open_store
    from heads.files.run_files import describe_run
    from pipeline.tars.dataset import load_dataset

    if (path / DATASET_FILE).is_file():
        facts = {"kind": "dataset", **load_dataset(path).facts()}
    elif (path / "zarr.json").is_file():
        facts = {"kind": "store", **open_store(path).facts()}
    elif (path / CONFIG_FILE).is_file():
        facts = {"kind": "run", **describe_run(path)}
    elif not path.exists():
        raise UserError(f"{path} does not exist: {WANTED}")
    else:
        raise UserError(
            f"{path} is neither a data set (dataset.json), a store (zarr.json) nor a run "
            f"(config.json): {WANTED}"
        )
    report(json, facts, {name: _short(value) for name, value in facts.items()})


def _short(value: Any) -> Any:
    if isinstance(value, list):
        more = [f"... ({len(value)})"] if len(value) > 10 else []
        return ", ".join(map(str, value[:10] + more)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items()) or "none"
    return value
