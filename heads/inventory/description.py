"""Describes one thing of a workspace, found by its folder or its name, or the whole workspace."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from featstore.errors import UserError, meant
from featstore.files.disk import folder_bytes
from featstore.opening import open_store
from featstore.workspace import CONFIG_FILE, DATASET_FILE, NAME_PATTERN, STORE_SUFFIX
from heads.evaluation.comparing.compare import EVAL_FOLDER
from heads.files.run_files import HEAD_FILE, describe_run
from heads.inventory.contents import Contents, result_facts, workspace_contents
from heads.inventory.missing import next_steps
from pipeline.encoders import specs
from pipeline.tars.dataset import load_dataset

log = logging.getLogger(__name__)

FOLDERS: Final = ("datasets", "features", "heads", "encoders")
WANTED: Final = (
    "give the folder of one, such as mote-data/datasets/NAME, mote-data/features/NAME/STORE.zarr "
    "or mote-data/heads/RUN, or a name as `mote-cli status` shows it"
)


def describe(text: str, root: Path) -> dict[str, Any] | Contents:
    """Return what `text` names, JSON-ready with its `kind`; for a workspace, its contents.

    `text` is a folder, or the name of something in the workspace at `root`. Raises UserError if it
    is neither, and what reading a damaged data set, store or run raises.
    """
    path = Path(text)
    if not path.exists() and NAME_PATTERN.fullmatch(text):
        path = _named(text, root)
    home = _workspace_of(path)
    if (path / DATASET_FILE).is_file():
        facts = {"kind": "dataset", **load_dataset(path).facts()}
        return facts | (_around_dataset(home, path.name) if home else {})
    if (path / "zarr.json").is_file():
        return {"kind": "store", **open_store(path).facts(), "size": folder_bytes(path)}
    if (path / CONFIG_FILE).is_file() or (path / HEAD_FILE).is_file():
        return {"kind": "run", **describe_run(path), **_around_run(path)}
    if (path / specs.CONFIG_FILE).is_file():
        return _encoder(path, home)
    if any((path / name).is_dir() for name in FOLDERS):
        return workspace_contents(path)
    if home is not None and path.absolute().parent.name == "features":
        return {"kind": "features", "name": path.name, **_around_dataset(home, path.name)}
    if home is not None and (path / EVAL_FOLDER).is_dir():
        return {"kind": "results", "name": path.name, **_around_run(path)}
    if not path.exists():
        raise UserError(f"{text} does not exist: {_near(text, root)}{WANTED}")
    raise UserError(
        f"{text} is neither a data set (dataset.json), a store (zarr.json), a run (config.json) "
        f"nor a workspace: {WANTED}"
    )


def _named(name: str, root: Path) -> Path:
    """Return the folder of what has this name in a workspace; `name` itself if nothing has it."""
    places = [root / folder / name for folder in FOLDERS]
    places += sorted(root.glob(f"features/*/{name.removesuffix(STORE_SUFFIX)}{STORE_SUFFIX}"))
    found = [place for place in places if place.is_dir()]
    # The packed data set tells of its features, too.
    if len(found) > 1 and found[:2] == places[:2]:
        del found[1]
    if len(found) > 1:
        log.info("%s is also the name of %s", name, ", ".join(str(place) for place in found[1:]))
    return found[0] if found else Path(name)


def _near(text: str, root: Path) -> str:
    names = [path.name for folder in FOLDERS for path in root.glob(f"{folder}/[!.]*")]
    return meant(text, names)


def _workspace_of(path: Path) -> Path | None:
    """Return the workspace that holds the data set, run, encoder or features at `path`."""
    parent = path.absolute().parent
    return parent.parent if parent.name in FOLDERS else None


def _around_dataset(home: Path, name: str) -> dict[str, Any]:
    """Return what a workspace holds for a data set, and what is missing."""
    contents = workspace_contents(home)
    stores = contents.stores_of(name)
    return {
        "stores": [f"{store.dataset}/{store.name}" for store in stores],
        "heads": [head.name for head in contents.heads_of(name)],
        "size": folder_bytes(home / "datasets" / name),
        "size_of_stores": sum(store.bytes for store in stores),
        **_next(contents, [name, *(f"{store.dataset}/{store.name}" for store in stores)]),
    }


def _around_run(path: Path) -> dict[str, Any]:
    """Return the newest results of a run, by kind of protocol, its size, and what is missing."""
    facts: dict[str, Any] = {"size": folder_bytes(path)}
    home = _workspace_of(path)
    if home is None:
        return facts
    contents = workspace_contents(home)
    for head in (each for each in contents.heads if each.name == path.name):
        roles = dict.fromkeys(result.role for result in head.results)
        facts["newest"] = {role: result_facts(head.newest(role)) for role in roles}
    return facts | _next(contents, [path.name])


def _encoder(path: Path, home: Path | None) -> dict[str, Any]:
    facts = {
        "kind": "encoder",
        "name": path.name,
        "architecture": specs.local_architecture(str(path.absolute()), None),
        "size": folder_bytes(path),
    }
    if home is None:
        return facts
    contents = workspace_contents(home)
    made = [s for s in contents.stores if s.metadata.provenance.encoder == path.name]
    heads = [head.name for head in contents.heads if head.origin.get("encoder") == path.name]
    return {**facts, "stores": [f"{s.dataset}/{s.name}" for s in made], "heads": heads}


def _next(contents: Contents, names: Iterable[str]) -> dict[str, Any]:
    about = set(names)
    lines = [step.line for step in next_steps(contents) if step.about in about]
    return {"next": lines} if lines else {}
