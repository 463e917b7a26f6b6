"""Lists what a workspace holds: data sets, stores, heads, encoders, and what cannot be read.

Only small files are read, and no torch is loaded. Damage becomes a line of `problems` and does not
hide the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from featstore.errors import UserError, WorkError, counted, one_line
from featstore.files.disk import folder_bytes
from featstore.files.locks import holder
from featstore.files.trash import TRASH_FOLDER
from featstore.format.metadata import StoreMetadata
from featstore.format.schema import STATUS_FAILED
from featstore.reading.store import Store
from featstore.workspace import PROTOCOL_FIELD, STORE_SUFFIX, Workspace
from featstore.writing.writer import lock_file
from heads.evaluation.comparing.compare import EVAL_FOLDER, SavedResult, read_result
from heads.files.run_files import CONFIG_FILE, HEAD_FILE, LOCK_FILE, read_config, read_metrics
from pipeline.encoders import specs
from pipeline.tars.dataset import load_dataset
from pipeline.tars.finished import RECORDS_FOLDER

_Held = TypeVar("_Held")


@dataclass(frozen=True)
class HeldDataset:
    """A packed data set; `videos` are listed ones, and `failed` of them are in no tar."""

    name: str
    folder: Path
    videos: int
    failed: int
    classes: int
    splits: Mapping[str, int]
    """Videos of every split; empty for a data set without splits."""
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the facts as strict JSON values."""
        return {**vars(self), "folder": str(self.folder)}


@dataclass(frozen=True)
class HeldStore:
    """A store below features/`dataset`; `busy` names a process that is writing to it."""

    name: str
    """The name of the folder without ".zarr"; `dataset`/`name` is unique in a workspace."""
    dataset: str
    folder: Path
    metadata: StoreMetadata
    rows_ok: int
    rows_failed: int
    tars_done: int
    bytes: int
    busy: str | None

    @property
    def complete(self) -> bool:
        """Whether the rows of every tar are there."""
        return self.tars_done == self.metadata.schema.tars

    @property
    def datasets(self) -> frozenset[str]:
        """The names of its data set: that of its folder, and the one that was extracted."""
        return frozenset({self.dataset, self.metadata.provenance.dataset})

    def to_json(self) -> dict[str, Any]:
        """Return the facts as strict JSON values."""
        made, schema = self.metadata.provenance, self.metadata.schema
        return {
            "name": self.name,
            "dataset": self.dataset,
            "folder": str(self.folder),
            "encoder": made.encoder,
            "encoder_fingerprint": made.encoder_fingerprint,
            "sampling": made.sampling,
            "crops": made.crops,
            "views": schema.views,
            "frames": schema.frames,
            **({"sequences": True} if schema.sequences else {}),
            "tier": made.tier,
            "split": made.split,
            "features": schema.storage,
            "rows_ok": self.rows_ok,
            "rows_failed": self.rows_failed,
            "tars_done": self.tars_done,
            "tars": schema.tars,
            "complete": self.complete,
            "bytes": self.bytes,
            "busy": self.busy,
        }


@dataclass(frozen=True)
class HeldHead:
    """A run: a head, finished or not, or only the results of a method without training."""

    name: str
    folder: Path
    settings: Mapping[str, Any]
    """What config.json holds; empty if there is none."""
    finished: bool
    epochs_done: int
    results: tuple[SavedResult, ...]
    """The results in its folder, newest first."""
    bytes: int
    busy: str | None
    """The process that is training it, if one is."""

    @property
    def origin(self) -> Mapping[str, Any]:
        """What it was trained on: the entries of `HeadOrigin` as config.json has them."""
        found = self.settings.get("data")
        return found if isinstance(found, Mapping) else {}

    @property
    def epochs(self) -> int | None:
        """The number of epochs that its training takes; None if it is not trained by epochs."""
        training = self.settings.get("training")
        epochs = training.get("epochs") if isinstance(training, Mapping) else None
        return epochs if isinstance(epochs, int) else None

    @property
    def trained(self) -> str:
        """The epochs done in words, such as "1 of 30 epochs"."""
        of = "? epochs" if not self.epochs else counted(self.epochs, "epoch")
        return f"{self.epochs_done} of {of}"

    @property
    def protocol(self) -> str:
        """The evaluation that trained it as a part of itself, or ""."""
        return str(self.settings.get(PROTOCOL_FIELD) or "")

    def newest(self, role: str) -> SavedResult | None:
        """Return its newest result of a kind of protocol, "closeset" or "zeroshot", if any."""
        return next((result for result in self.results if result.role == role), None)

    def to_json(self) -> dict[str, Any]:
        """Return the facts as strict JSON values, with the newest result of every kind."""
        head = self.settings.get("head")
        roles = dict.fromkeys(result.role for result in self.results)
        return {
            "name": self.name,
            "folder": str(self.folder),
            "kind": head.get("kind") if isinstance(head, Mapping) else None,
            "trained_on": self.origin.get("dataset") or None,
            "encoder": self.origin.get("encoder") or None,
            "sampling": self.origin.get("sampling") or None,
            "finished": self.finished,
            "epochs_done": self.epochs_done,
            "epochs": self.epochs,
            "protocol": self.protocol or None,
            "results": len(self.results),
            "newest": {role: result_facts(self.newest(role)) for role in roles},
            "bytes": self.bytes,
            "busy": self.busy,
        }


def result_facts(result: SavedResult | None) -> dict[str, Any] | None:
    """Return what a list says of a result: the data set, its number in percent, when, the file."""
    if result is None:
        return None
    when = datetime.fromtimestamp(result.time_ns / 1e9).astimezone()
    return {
        "protocol": result.protocol_name or result.role,
        "dataset": result.dataset,
        result.measure: result.number,
        "when": when.isoformat(timespec="seconds"),
        "file": str(result.path),
    }


@dataclass(frozen=True)
class HeldEncoder:
    """A folder below encoders/."""

    name: str
    folder: Path
    architecture: str | None
    """Such as "ViT-B/16"; None if the tower has no usual name."""
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the facts as strict JSON values."""
        return {**vars(self), "folder": str(self.folder)}


@dataclass(frozen=True)
class Problem:
    """Something in the workspace that cannot be used as it is, and why."""

    path: Path
    reason: str

    def to_json(self) -> dict[str, str]:
        """Return both as strings."""
        return {"path": str(self.path), "reason": self.reason}


@dataclass
class Contents:
    """Everything that `workspace_contents` found."""

    workspace: Workspace
    datasets: list[HeldDataset] = field(default_factory=list)
    stores: list[HeldStore] = field(default_factory=list)
    heads: list[HeldHead] = field(default_factory=list)
    encoders: list[HeldEncoder] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @cached_property
    def bytes(self) -> int:
        """The size of everything in the workspace, also of what is not listed."""
        return folder_bytes(self.workspace.root)

    def stores_of(self, dataset: str) -> list[HeldStore]:
        """Return the stores made from a data set."""
        return [store for store in self.stores if dataset in store.datasets]

    def heads_of(self, dataset: str) -> list[HeldHead]:
        """Return the heads that were trained on a data set."""
        return [head for head in self.heads if head.origin.get("dataset") == dataset]

    def to_json(self) -> dict[str, Any]:
        """Return everything as strict JSON values."""
        return {
            "root": str(self.workspace.root),
            "bytes": self.bytes,
            "datasets": [one.to_json() for one in self.datasets],
            "stores": [one.to_json() for one in self.stores],
            "heads": [one.to_json() for one in self.heads],
            "encoders": [one.to_json() for one in self.encoders],
            "problems": [one.to_json() for one in self.problems],
        }


def workspace_contents(root: Path) -> Contents:
    """Return what the workspace at `root` holds; a folder that does not exist holds nothing."""
    found = Contents(Workspace(root))
    for folder in _folders(found, root / "datasets"):
        _add(found, found.datasets, folder, _dataset)
    for parent in _folders(found, root / "features"):
        stores = {path for path in _folders(found, parent) if path.suffix == STORE_SUFFIX}
        # A replacement that was killed half way has left the store beside its place.
        kept = {path.with_suffix("") for path in parent.glob(f"*{STORE_SUFFIX}.previous")}
        for folder in sorted(stores | kept):
            _add(found, found.stores, folder, _store)
    for folder in _folders(found, root / "heads"):
        _add(found, found.heads, folder, partial(_head, found))
    for folder in _folders(found, root / "encoders"):
        _add(found, found.encoders, folder, _encoder)
    return found


def _folders(found: Contents, parent: Path) -> list[Path]:
    """Return the folders in `parent`, sorted; what cannot be listed becomes a problem."""
    try:
        folders = sorted(path for path in parent.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        found.problems.append(Problem(parent, f"cannot be read ({error.strerror})"))
        return []
    for path in folders:
        if path.name == TRASH_FOLDER:
            found.problems.append(Problem(path, "a removal was killed here; the next rm clears it"))
    return [path for path in folders if not path.name.startswith(".")]


def _add(found: Contents, known: list[_Held], folder: Path, read: Callable[[Path], _Held]) -> None:
    """Add to `known` what `folder` holds, or to the problems why it cannot be read."""
    try:
        known.append(read(folder))
    except OSError as error:
        found.problems.append(Problem(folder, f"cannot be read ({one_line(error)})"))
    except (UserError, WorkError, RecursionError) as error:
        found.problems.append(Problem(folder, one_line(error)))


def _dataset(folder: Path) -> HeldDataset:
    packing = holder(folder / RECORDS_FOLDER / "lock")
    if packing is not None:
        raise UserError(f"{packing} is packing into it")
    facts = load_dataset(folder).facts()
    return HeldDataset(
        folder.name,
        folder,
        facts["videos_listed"],
        facts["videos_failed"],
        facts["classes"],
        facts["splits"],
        folder_bytes(folder),
    )


def _store(folder: Path) -> HeldStore:
    store = Store(folder)
    failed = int(np.count_nonzero(store.status == STATUS_FAILED))
    return HeldStore(
        folder.name.removesuffix(STORE_SUFFIX),
        folder.parent.name,
        folder,
        store.metadata,
        len(store) - failed,
        failed,
        len(list(store.partitions())),
        folder_bytes(folder),
        holder(lock_file(folder)),
    )


def _head(found: Contents, folder: Path) -> HeldHead:
    settings = read_config(folder)
    results = []
    for path in sorted((folder / EVAL_FOLDER).glob("*.json")):
        try:
            results.append(read_result(path))
        except UserError as error:
            found.problems.append(Problem(path, one_line(error)))
    if settings is None and not results and not (folder / HEAD_FILE).is_file():
        raise UserError(f"it is no run: it has no {CONFIG_FILE}, no {HEAD_FILE} and no results")
    return HeldHead(
        folder.name,
        folder,
        settings or {},
        (folder / HEAD_FILE).is_file(),
        len(read_metrics(folder)),
        tuple(sorted(results, key=lambda result: result.time_ns, reverse=True)),
        folder_bytes(folder),
        holder(folder / LOCK_FILE),
    )


def _encoder(folder: Path) -> HeldEncoder:
    for name in (specs.CONFIG_FILE, specs.WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"it is no encoder: it has no {name}")
    architecture = specs.local_architecture(folder.name, folder.parent)
    return HeldEncoder(folder.name, folder, architecture, folder_bytes(folder))
