"""Removes a data set, a store, a head or an encoder from a workspace, and nothing outside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from featstore.errors import UserError, WorkError, counted, one_of
from featstore.files.disk import folder_bytes
from featstore.files.locks import holder, unused
from featstore.files.trash import empty_trash, remove_whole
from featstore.workspace import STORE_SUFFIX, Workspace
from featstore.writing.writer import lock_file
from heads.files.run_files import LOCK_FILE
from heads.inventory.contents import Contents, HeldHead, HeldStore, workspace_contents
from pipeline.tars.finished import RECORDS_FOLDER

FOLDERS: Final[Mapping[str, str]] = {
    "dataset": "datasets",
    "store": "features",
    "head": "heads",
    "encoder": "encoders",
}
"""The kinds of things that can be removed, and the folder of the workspace that holds them."""
_WORDS: Final = {"dataset": "data set"}


@dataclass(frozen=True)
class Dependent:
    """Something that stays although it was made with what is removed."""

    kind: str
    name: str
    why: str


@dataclass(frozen=True)
class Removal:
    """One thing to remove: where it lies, what goes with it, and what depends on it."""

    kind: str
    name: str
    path: Path
    bytes: int
    holds: str
    """What goes, in words."""
    link: str | None
    """Where `path` leads if it is a link; only the link is removed then."""
    dependents: tuple[Dependent, ...]

    @property
    def title(self) -> str:
        """The kind and the name in words: "data set my-clips"."""
        return f"{_WORDS.get(self.kind, self.kind)} {self.name}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as strict JSON values."""
        dependents = [vars(each) for each in self.dependents]
        return {**vars(self), "path": str(self.path), "dependents": dependents}


def removals_of(workspace: Workspace, kind: str, names: Sequence[str]) -> list[Removal]:
    """Return what would be removed; nothing is changed but for leftovers of killed removals.

    `kind` is one of `FOLDERS`. A name may also be the path of the thing in the workspace; that of
    a store is NAME or DATASET/NAME. Raises UserError if there is no such thing, if several stores
    have the name, or if it lies outside the workspace; WorkError if a running command uses it.
    """
    if kind not in FOLDERS:
        raise UserError(f"{kind!r} cannot be removed: {one_of(kind, FOLDERS)}")
    base = workspace.root / FOLDERS[kind]
    for folder in (base, *base.glob("*")) if kind == "store" else (base,):
        if _inside(workspace, folder):
            empty_trash(folder)
    contents = workspace_contents(workspace.root)
    paths = dict.fromkeys(_find(workspace, kind, name) for name in names)
    removals = [_removal(contents, kind, path) for path in paths]
    for removal in removals:
        _require_idle(contents, removal)
    return removals


def remove(workspace: Workspace, removal: Removal) -> None:
    """Remove what `removals_of` found, by one rename and then file by file.

    Raises WorkError if a command has begun to use it, or if its files cannot be deleted.
    """
    path = removal.path
    _require_inside(workspace, path)
    _require_idle(workspace_contents(workspace.root), removal)
    lock = None if removal.link is not None else _own_lock(removal)
    notes = (path.with_name(f"{path.name}.encoder.json"),) if removal.kind == "store" else ()
    with unused(lock, removal.title) if lock is not None else nullcontext():
        remove_whole(path, *notes)


def _find(workspace: Workspace, kind: str, text: str) -> Path:
    """Return the path of the thing that `text` names; errors as `removals_of`."""
    base = workspace.root / FOLDERS[kind]
    if "/" in text and _below(Path(text), base):
        text = Path(os.path.abspath(text)).relative_to(os.path.abspath(base)).as_posix()
    elif "/" in text and os.path.lexists(text):
        raise UserError(
            f"{text} does not lie in {base}: rm removes only what is in the workspace; delete the "
            "folder yourself if you no longer need it"
        )
    if kind == "store":
        return _find_store(workspace, text)
    folder: Callable[[str], Path] = {
        "dataset": workspace.dataset_dir,
        "head": workspace.head_dir,
        "encoder": workspace.encoder_dir,
    }[kind]
    path = folder(text)
    if not os.path.lexists(path):
        known = one_of(text, (each.name for each in _visible(base)))
        raise UserError(f"no {_WORDS.get(kind, kind)} {text!r} in {base}: {known}")
    _require_inside(workspace, path)
    return path


def _find_store(workspace: Workspace, text: str) -> Path:
    base = workspace.root / FOLDERS["store"]
    name = text.removesuffix(STORE_SUFFIX)
    stores = {
        f"{path.parent.name}/{path.name.removesuffix(STORE_SUFFIX)}": path
        for parent in _visible(base)
        for path in _visible(parent)
        if path.suffix == STORE_SUFFIX
    }
    found = [known for known in stores if name in (known, known.partition("/")[2])]
    if len(found) > 1:
        raise UserError(f"{len(found)} stores have the name {name!r}: name {' or '.join(found)}")
    if not found:
        raise UserError(f"no store {name!r} in {base}: {one_of(name, stores)}")
    _require_inside(workspace, stores[found[0]])
    return stores[found[0]]


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*") if not p.name.startswith(".") and p.is_dir())


def _below(path: Path, base: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(base))


def _inside(workspace: Workspace, folder: Path) -> bool:
    return folder.resolve().is_relative_to(workspace.root.resolve())


def _require_inside(workspace: Workspace, path: Path) -> None:
    """Raise UserError if a link on the way to `path` leads out of the workspace."""
    if not _inside(workspace, path.parent):
        raise UserError(
            f"{path} lies behind a link at {path.parent.resolve()}, outside of the workspace: rm "
            "follows no links; delete it there yourself if you no longer need it"
        )


def _removal(contents: Contents, kind: str, path: Path) -> Removal:
    base = contents.workspace.root / FOLDERS[kind]
    name = path.relative_to(base).as_posix().removesuffix(STORE_SUFFIX)
    dependents = tuple(_dependents(contents, kind, name, path))
    removal = Removal(kind, name, path, 0, "", None, dependents)
    if path.is_symlink():
        return replace(removal, link=os.readlink(path), holds="only the link")
    return replace(removal, bytes=folder_bytes(path), holds=_holds(contents, kind, path))


def _holds(contents: Contents, kind: str, path: Path) -> str:
    if kind == "dataset":
        for dataset in (each for each in contents.datasets if each.folder == path):
            return counted(dataset.videos - dataset.failed, "video")
    if kind == "store":
        for store in (each for each in contents.stores if each.folder == path):
            return counted(store.rows_ok + store.rows_failed, "row")
    if kind == "head":
        for head in (each for each in contents.heads if each.folder == path):
            state = "" if head.finished else ", training not finished"
            return f"{counted(len(head.results), 'result')}{state}"
    return "all its files"


def _dependents(contents: Contents, kind: str, name: str, path: Path) -> Iterable[Dependent]:
    if kind == "dataset":
        for store in contents.stores_of(name):
            yield _store(store, "stays; without the tars no more can be extracted")
        for head in contents.heads_of(name):
            yield Dependent("head", head.name, "was trained on it; stays")
        for head in contents.heads:
            count = sum(result.dataset == name for result in head.results)
            if count:
                yield Dependent("result", head.name, f"{count} measured on it; stay")
    if kind == "store":
        for store in (each for each in contents.stores if each.folder == path):
            for head in _trained_on(contents, store):
                yield Dependent("head", head.name, "was trained on it; stays")
            for head in contents.heads:
                count = sum(_tests(result.values, store) for result in head.results)
                if count:
                    yield Dependent("result", head.name, f"{count} measured on it; stay")
    if kind == "head":
        for encoder in (each for each in contents.encoders if each.name == name):
            yield Dependent("encoder", encoder.name, "was tuned or imported with it; stays")
        for head in contents.heads:
            begun = head.settings.get("from_head")
            if isinstance(begun, Mapping) and begun.get("run") == name != head.name:
                yield Dependent("head", head.name, "began with it; stays")
    if kind == "encoder":
        for store in contents.stores:
            if store.metadata.provenance.encoder == name:
                yield _store(store, "was made with it; stays, but cannot grow")
        for head in contents.heads:
            if head.origin.get("encoder") == name:
                yield Dependent("head", head.name, "needs it to predict; stays")


def _store(store: HeldStore, why: str) -> Dependent:
    return Dependent("store", f"{store.dataset}/{store.name}", why)


def _trained_on(contents: Contents, store: HeldStore) -> list[HeldHead]:
    """Return the heads whose origin describes the features of a store."""
    made = store.metadata.provenance
    wanted = {
        "dataset": made.dataset,
        "encoder_fingerprint": made.encoder_fingerprint,
        "sampling": made.sampling,
        "crops": made.crops,
    }
    return [
        head
        for head in contents.heads
        if all(head.origin.get(name) == value for name, value in wanted.items())
        and head.settings.get("mode") is None  # trained from a store
    ]


def _tests(result: Mapping[str, Any], store: HeldStore) -> bool:
    return result.get("dataset") in store.datasets and result.get("store") == store.folder.name


def _own_lock(removal: Removal) -> Path | None:
    """Return the lock that a command holds while it writes to the thing; an encoder has none."""
    if removal.kind == "store":
        return lock_file(removal.path)
    inner = {"dataset": f"{RECORDS_FOLDER}/lock", "head": LOCK_FILE}.get(removal.kind)
    return None if inner is None else removal.path / inner


def _require_idle(contents: Contents, removal: Removal) -> None:
    """Raise WorkError if a running command writes to the thing or works with it."""
    lock = _own_lock(removal)
    users = [(removal.title, None if lock is None else holder(lock))]
    stores: list[HeldStore] = []
    heads: list[HeldHead] = []
    if removal.kind == "dataset":
        stores = contents.stores_of(removal.name)
        heads = [h for h in contents.heads_of(removal.name) if h.settings.get("mode") is not None]
    elif removal.kind == "store":
        held = [each for each in contents.stores if each.folder == removal.path]
        heads = [head for store in held for head in _trained_on(contents, store)]
    elif removal.kind == "encoder":
        name = removal.name
        stores = [s for s in contents.stores if s.metadata.provenance.encoder == name]
        heads = [h for h in contents.heads if name in (h.name, h.origin.get("encoder"))]
    users += [(f"store {store.dataset}/{store.name}", store.busy) for store in stores]
    users += [(f"head {head.name}", head.busy) for head in heads]
    for what, process in users:
        if process is not None:
            needs = "" if what == removal.title else f", which needs {removal.title}"
            raise WorkError(f"{process} is working on {what}{needs}: wait for it or stop it")
