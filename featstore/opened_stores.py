"""Chooses the one store of a data set that a command works on; says what makes a missing one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from featstore.commands import STORE_SUFFIX, Extraction, pack_command
from featstore.errors import UserError, WorkError, counted, meant, one_of
from featstore.format.tiers import EMBEDDINGS
from featstore.remote.urls import is_url

if TYPE_CHECKING:
    from featstore.reading.store import Store

log = logging.getLogger(__name__)

Likely = tuple[str, Callable[["Store"], bool]]
"""Why a store is probably the one that is meant, and whether a store is it."""


class MissingStore(UserError):
    """No store fits; `why` says it without the command that makes one."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(f"{why}{remedy}")
        self.why = why


class Folders(Protocol):
    """What a choice of stores asks the workspace."""

    root: Path

    def dataset_dir(self, name: str) -> Path:
        """Return the folder of a packed data set."""

    def features_dir(self, name: str) -> Path:
        """Return the folder of a data set's stores."""

    def stores(self, dataset: str) -> list[Path]:
        """Return the folders of a data set's stores."""

    def packed_splits(self, dataset: str) -> Mapping[str, bool] | None:
        """Return the packed splits, and whether each has tars of its own; None if not packed."""

    def extracted_datasets(self) -> list[str]:
        """Return the names of the data sets that have features."""

    def packed_datasets(self) -> list[str]:
        """Return the names of the packed data sets."""

    def unlabelled(self, dataset: str) -> bool:
        """Return whether the videos of a data set have no classes."""


def no_labels(dataset: str) -> UserError:
    """Return the error for a data set without classes where classes are needed."""
    return UserError(
        f"the videos of data set {dataset!r} have no labels, so there is nothing to learn and "
        "nothing to score: pack them with classes under another name (class folders, "
        "--annotations, or --label-field for --tars); `mote-cli predict` needs no labels"
    )


class OpenedStores:
    """The stores of one data set, each opened once, when it is first needed.

    A store shows what was committed when it was opened; make a new object after a store has grown.
    """

    def __init__(self, workspace: Folders, dataset: str) -> None:
        self.dataset = dataset
        self._workspace = workspace
        self._opened: dict[Path, Store | UserError | WorkError] = {}
        self._said: set[str] = set()

    def open(self, path: Path) -> Store:
        """Return the store at `path`; if opening it fails, each call raises the same error."""
        from featstore.opening import open_store  # folders and names need no arrays

        if path not in self._opened:
            try:
                self._opened[path] = open_store(path)
            except (UserError, WorkError) as error:
                self._opened[path] = error
        found = self._opened[path]
        if isinstance(found, UserError | WorkError):
            raise found
        return found

    def default_split(self, names: Sequence[str]) -> str | None:
        """Return the first split of `names` with rows in a readable store of embeddings, if any."""
        for name in names:
            for path in self._workspace.stores(self.dataset):
                try:
                    _require_match(self.open(path), split=name)
                    return name
                except (UserError, WorkError):
                    continue  # `choose` reports stores that cannot be read
        return None

    def choose(
        self,
        *,
        split: str | None = None,
        views: int | None = None,
        encoder_fingerprint: str | None = None,
        sampling: str | None = None,
        name: str | None = None,
        crops: int | None = None,
        making: Extraction | None = None,
        likely: Sequence[Likely] = (),
        option: str = "--store",
    ) -> Store:
        """Return the data set's one store of embeddings that fits the split and other arguments.

        `name` is the name of the store's folder, with or without ".zarr", or its URL. If several
        stores fit, each of `likely` (why a store is probably meant, and whether it is) leaves only
        the stores it is true of, if there are any; the choice is logged. In messages, `making`
        gives the options of the command that makes a store, and `option` is the command line
        option that sets `name`.
        Raises UserError if no store fits (with the command that makes one), several do (with
        their names) or its videos have no labels, WorkError if the store that fits is damaged or
        not finished.
        """
        from featstore.format.metadata import read_metadata
        from featstore.opening import open_store  # as in `open`
        from featstore.reading.repair import beside, repair_command

        dataset = self.dataset
        remote = name is not None and is_url(name)
        if remote:
            _require_remote_embeddings(str(name))
        paths = [open_store(str(name)).path] if remote else self._workspace.stores(dataset)
        packed = self._workspace.packed_splits(dataset)
        # Splits that share tars also share one store of all those tars.
        own_tars = split is not None and (packed is None or packed.get(split, False))
        make = replace(making or Extraction(dataset, sampling=sampling), dataset=dataset)
        make = replace(make, split=split if own_tars and (packed or paths) else None)
        if not remote and self._workspace.unlabelled(dataset):
            raise no_labels(dataset)
        if not paths:
            before = "" if packed is not None else self._unpacked()
            run = f"run `{make.command(self._workspace.root)}`"
            raise MissingStore(
                f"no features of data set {dataset!r} under "
                f"{self._workspace.features_dir(dataset)}",
                f": {before}{run}" if before else f": {run} first",
            )
        if name is not None and not remote:
            wanted = f"{name.removesuffix(STORE_SUFFIX)}{STORE_SUFFIX}"
            known = one_of(name.removesuffix(STORE_SUFFIX), (path.stem for path in paths))
            paths = [path for path in paths if path.name == wanted]
            if not paths:
                raise UserError(f"data set {dataset!r} has no store {name!r}: {known}")
        fitting: list[Store] = []
        refused: list[str] = []
        damaged: list[WorkError] = []
        for path in paths:
            try:
                store = self.open(path)
                _require_match(store, split, views, encoder_fingerprint, sampling, crops)
                if name is None and encoder_fingerprint is None:
                    store.require_embeddings()  # else it is the head's own, or was named
                fitting.append(store)
            except WorkError as error:
                damaged.append(error)
            except UserError as error:
                refused.append(str(error))
        if not fitting:
            if split is not None and packed is not None and split not in packed:
                raise UserError(
                    f"data set {dataset!r} has no split {split!r}: "
                    + (one_of(split, packed) if packed else "it has none to name")
                )
            if damaged:
                raise damaged[0]
            if name is not None and not remote and split is not None:
                make = self._of_split(paths[0], split, encoder_fingerprint, make)
            if make.encoder is None:
                make = replace(make, encoder=self._usual_encoder())
            usual = self._workspace.features_dir(dataset) / make.file_name
            taken = make.sampling is not None and usual in paths  # made with another encoder
            make_one = make.command(self._workspace.root, store=beside(usual) if taken else None)
            raise MissingStore(
                f"no store of data set {dataset!r} fits: {'; '.join(refused)}",
                f"; make one with `{make_one}`",
            )
        meant, why = fitting, ""
        for reason, is_meant in likely:
            narrowed = [store for store in meant if is_meant(store)]
            if 0 < len(narrowed) < len(meant):
                meant, why = narrowed, reason
        chosen = ""
        if len(meant) == 1 < len(fitting):
            others = ", ".join(store.path.stem for store in fitting if store is not meant[0])
            chosen = f", {why}; {option} chooses another: {others}"
            fitting = meant
        if len(fitting) > 1:
            names = ", ".join(_describe(store) for store in fitting)
            raise UserError(
                f"{len(fitting)} stores of data set {dataset!r} fit: {names}; choose one with "
                f"{option} NAME"
            )
        store = fitting[0]
        if not store.class_names:
            raise no_labels(dataset)
        if not store.complete:
            finish = repair_command(store.path, read_metadata(store.path))
            raise WorkError(
                f"{store.path} holds {len(list(store.partitions()))} of {store.schema.tars} "
                f"partitions: finish it with `{finish}`"
            )
        for damage in damaged:
            self._say(logging.WARNING, f"left out: {damage}")
        self._say(logging.INFO, f"features of {dataset}: {_describe(store)}{chosen}")
        return store

    def _say(self, level: int, line: str) -> None:
        """Log a line once, however often a command chooses among the same stores."""
        if line not in self._said:
            self._said.add(line)
            log.log(level, "%s", line)

    def _of_split(
        self, path: Path, split: str, encoder: str | None, make: Extraction
    ) -> Extraction:
        """Return what makes the store at `path` with the split that it lacks; else `make`.

        `encoder` is the fingerprint of the one that is needed, None for any.
        """
        from featstore.reading.repair import extraction_of  # as in `choose`

        named = self._opened.get(path)
        if named is None or isinstance(named, Exception) or _rows_of(named, split):
            return make
        made = named.provenance
        if encoder not in (None, made.encoder_fingerprint) or not named.schema.pooled:
            return make
        return replace(extraction_of(made), dataset=make.dataset, split=make.split)

    def _usual_encoder(self) -> str | None:
        """Return the encoder of the data set's first readable store."""
        opened = (store for store in self._opened.values() if not isinstance(store, Exception))
        return next((store.provenance.encoder for store in opened), None)

    def _unpacked(self) -> str:
        """Say what comes before an extraction of a data set that is not packed.

        Raises UserError, which names the one that is meant, if its name is near to that of another.
        """
        place = self._workspace
        known = dict.fromkeys((*place.extracted_datasets(), *place.packed_datasets()))
        if near := meant(self.dataset, known):
            raise UserError(
                f"no data set {self.dataset!r} in {place.root}: {near}it has {', '.join(known)}"
            )
        pack, _ = pack_command(place.dataset_dir(self.dataset), place.root)
        there = f" (there are {', '.join(known)})" if known else ""
        return f"it is not packed{there}; pack it with `{pack}`, then "


def _require_match(
    store: Store,
    split: str | None,
    views: int | None = None,
    encoder_fingerprint: str | None = None,
    sampling: str | None = None,
    crops: int | None = None,
) -> None:
    """Raise UserError, which says why, if the store does not fit the arguments."""
    names, made = store.split_names, store.provenance
    reason = ""
    if store.sequences:
        reason = "holds sequences, not the equally many frames of every video that heads work on"
    elif not store.schema.pooled:
        reason = f"holds {store.tier}, not the embeddings that heads work on"
    elif split is not None and not _rows_of(store, split):
        held = [name for name in names if _rows_of(store, name)]
        reason = f"has no rows of split {split!r} (it has {', '.join(held) or 'none'})"
    elif views is not None and store.schema.views != views:
        reason = f"has {counted(store.schema.views, 'view')}, not {views}"
    elif crops not in (None, made.crops):
        reason = f"has {counted(made.crops, 'crop')}, not {crops}"
    elif encoder_fingerprint not in (None, made.encoder_fingerprint):
        reason = f"was made with another encoder ({made.encoder})"
    elif sampling not in (None, made.sampling):
        reason = f"has sampling {made.sampling}, not {sampling}"
    if reason:
        raise UserError(f"{store.path.name} {reason}")


def _rows_of(store: Store, split: str) -> int:
    """Return how many rows of a split a store has, 0 for a split that it does not know."""
    return len(store.split(split)) if split in store.split_names else 0


def _require_remote_embeddings(url: str) -> None:
    """Raise UserError for a remote store of another tier, before its terabytes are fetched."""
    from featstore.remote.writer import RemoteStoreWriter  # obstore takes a while to load

    writer = RemoteStoreWriter.open(url)
    tier = writer.schema.tier
    writer.close()
    if tier != EMBEDDINGS:
        raise UserError(
            f"{url} holds {tier}, not the embeddings that heads work on: choose or extract a "
            "store without --tier"
        )


def _describe(store: Store) -> str:
    made = store.provenance
    return (
        f"{store.path.name} (sampling {made.sampling}, {counted(store.schema.views, 'view')}, "
        f"encoder {made.encoder})"
    )
