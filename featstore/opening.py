"""A store in a folder (a Path) or at a URL (a str, s3://...): the same calls for both."""

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
    """Open the store at `path` for reading; of one at a URL (s3://...), a mirror on disk.

    Reads the metadata, the commit entries and the sizes of the features shards. `mapped` False
    reads features chunk by chunk instead of memory maps (slower; for file systems that cannot map).
    A `~` at the beginning of the path is the user's folder.
    Raises UserError when it is no store of this format, or one that is not safe to open, WorkError
    when the shard of a committed partition is missing or has another size.
    """
    if isinstance(path, str) and is_url(path):
        return open_remote(path, mapped=mapped)
    store = Store(Path(os.path.expanduser(path)), mapped=mapped)
    if not store.schema.mappable:
        log.info("%s: features are %s, decoded as they are read", path, store.schema.storage)
    return store


def writer_of(place: StorePlace) -> AnyWriter | None:
    """The writer of the store that is there, None when there is none; errors as its `open`."""
    if isinstance(place, str):
        try:
            return RemoteStoreWriter.open(place)
        except NoStore:
            return None
    return StoreWriter.open(place) if place.exists() else None


def new_writer(
    place: StorePlace, metadata: StoreMetadata, class_texts: Mapping[str, ClassText]
) -> AnyWriter:
    """Make an empty store there; errors as the `init` of its kind of writer."""
    if isinstance(place, str):
        return RemoteStoreWriter.init(place, metadata, class_texts)
    return StoreWriter.init(place, metadata, class_texts)


def open_rows(place: StorePlace) -> Store:
    """The store there, to count and list its rows; of a remote one no features are fetched."""
    return open_remote(place, features=False) if isinstance(place, str) else Store(place)
