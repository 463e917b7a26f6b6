"""Open or make a store in a folder (a Path) or at a URL (a str, s3://...) with the same calls."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from featstore.format.class_texts import ClassText
from featstore.format.metadata import StoreMetadata
from featstore.reading.store import Store
from featstore.remote.contents import NoStore
from featstore.remote.mirror import open_remote
from featstore.remote.urls import is_url
from featstore.remote.writer import RemoteStoreWriter
from featstore.writing.writer import StoreWriter

log = logging.getLogger(__name__)

StorePlace: TypeAlias = Path | str
AnyWriter: TypeAlias = StoreWriter | RemoteStoreWriter


def open_store(path: str | Path, *, mapped: bool = True) -> Store:
    """Open the store at `path` for reading. A store at a URL (s3://...) is mirrored to disk first.

    Reads the metadata, the commit entries and the sizes of the features shards. `mapped` False
    reads features chunk by chunk instead of mapping them into memory (slower; for file systems that
    cannot map). A `~` at the beginning of the path is the user's home folder.
    Raises UserError if it is no store of this format or not safe to open, WorkError if the shard
    of a committed partition is missing or has the wrong size.
    """
    if isinstance(path, str) and is_url(path):
        return open_remote(path, mapped=mapped)
    store = Store(Path(os.path.expanduser(path)), mapped=mapped)
    if not store.schema.mappable:
        log.info("%s: features are %s and decoded on reading", path, store.schema.storage)
    return store


def writer_of(place: StorePlace) -> AnyWriter | None:
    """Return a writer of the store at `place`, None if there is none; errors as its `open`."""
    if isinstance(place, str):
        try:
            return RemoteStoreWriter.open(place)
        except NoStore:
            return None
    return StoreWriter.open(place) if place.exists() else None


def new_writer(
    place: StorePlace, metadata: StoreMetadata, class_texts: Mapping[str, ClassText]
) -> AnyWriter:
    """Make an empty store at `place` and return its writer; errors as the writer's `init`."""
    if isinstance(place, str):
        return RemoteStoreWriter.init(place, metadata, class_texts)
    return StoreWriter.init(place, metadata, class_texts)


def open_rows(place: StorePlace) -> Store:
    """Open a store to count and list its rows; the features of a remote store are not fetched."""
    return open_remote(place, features=False) if isinstance(place, str) else Store(place)
